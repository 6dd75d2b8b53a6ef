"""Junctions, one by one: responses of base and steered policies with every candidate.

The policies respond to the same prompts under the same noise. The viewer of the report shows them:
a few prompts of each objective, the first family, β = 1. No other table has words.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import Profile

UNIT = ["objective", "prompt", "seed"]
CELL = ["method", "value_model", "target_ratio"]
LABELS = ["replicate", "family", "model", *CELL, "gate", "beta"]
MEASURED = ("tokens", "steered", "shifted", "kl")
LATER_PROMPTS = 1  # of each objective that replicates after the first show


class Junctions(Figure):
    """Junctions, one by one."""

    own_section = False

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return base, SIA, dense steering, random and junction gate, with their candidates."""
        family, ratios = profile.families[0], profile.sweep.reduced_ratios
        requests = [methods.base(replicate, family)]
        for loss in profile.losses:
            requests += methods.curve(profile, replicate, family, loss, ratios)
            requests.append(
                methods.steered(replicate, family, loss, gate="random", ratio=min(ratios))
            )
            requests += methods.divergence_gates(profile, replicate, family, loss, [min(ratios)])
        return FigureCells(cells=requests, views=requests)

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """Return a row per candidate (see `engine.traces`), with the score of its response."""
        frames, score = [], profile.score
        for replicate in replicates:
            for request in self.cells(profile, replicate).views:
                cell, labels = results.resolve(request), request.labels()
                scores = results.rows(cell)[[*UNIT, score]].astype({"objective": str})
                candidates = results.rows(cell, "view")
                if replicate > 0:
                    candidates = candidates[candidates["prompt"] < LATER_PROMPTS]
                candidates = candidates.merge(
                    scores.rename(columns={score: "score"}), on=UNIT, how="left",
                    validate="many_to_one",
                )  # fmt: skip
                frames.append(candidates.assign(**{name: labels[name] for name in LABELS}))
        texts = ("objective", "asked", "word", "family", "model", "method", "value_model", "gate")
        return pd.concat(frames, ignore_index=True).astype(dict.fromkeys(texts, "category"))

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate length, steered and shifted tokens, on the prompts that all replicates show."""
        last = rows.groupby("replicate")["prompt"].max().min()
        rows = rows[rows["prompt"] <= last]
        scores = estimates.method_scores(responses(rows), MEASURED)
        return estimates.summarize(scores, MEASURED, profile)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw nothing: the report shows the responses."""
        return []


def rounding_gap(rows: pd.DataFrame) -> float:
    """Return by how much entropies of the shown probabilities miss those of decoding, at most."""
    step = [*LABELS, *UNIT, "step"]
    surprise = -np.exp(rows["base_logprob"]) * rows["base_logprob"]
    steps = rows.assign(shown=surprise).groupby(step, observed=True, dropna=False)
    entropies = steps.agg(shown=("shown", "sum"), decoded=("entropy", "first"))
    return float((entropies["shown"] - entropies["decoded"]).abs().max())


def responses(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row per response: its tokens, those steered and shifted, and KL(steered‖base)."""
    tilted = np.exp(rows["tilted"]) * (rows["tilted"] - rows["base_logprob"])
    rows = rows.assign(
        kl=tilted.where(rows["steered"] & np.isfinite(rows["tilted"]), 0.0),
        shifted=~rows["unsteered"],
    )
    unit = [*estimates.UNIT, "family", "model", "gate", "beta", *CELL]
    lengths = rows[rows["chosen"]].groupby(unit, observed=True, as_index=False).agg(
        tokens=("step", "size"),
        steered=("steered", "sum"),
        shifted=("shifted", "sum"),
        score=("score", "first"),
    )  # fmt: skip
    drift = rows.groupby(unit, observed=True, as_index=False)["kl"].sum()
    usual = {"best_of": 1, "search": "", "tuned": False, "threshold": np.nan}
    return lengths.merge(drift, on=unit, validate="one_to_one").assign(**usual)
