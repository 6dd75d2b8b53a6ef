"""Junctions, one by one: whole responses of base and steered policies to the same prompts under the same noise, with every candidate.

What the viewer of the report shows: a few prompts of each objective, the first family, β = 1. No other table has words.
"""

from __future__ import annotations

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
MEASURED = ("tokens", "steered", "shifted", "kl")


class Junctions(Figure):
    """Junctions, one by one."""

    title = "Junctions, one by one"
    own_section = False

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        family, ratios = profile.families[0], profile.sweep.reduced_ratios
        wanted = [methods.base(replicate, family)]
        for loss in profile.losses:
            wanted += methods.curve(profile, replicate, family, loss, ratios)
            wanted.append(
                methods.steered(replicate, family, loss, gate="random", ratio=min(ratios))
            )
        return FigureCells(cells=wanted, views=wanted)

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """One row per candidate (see probes.view), with the score of its response."""
        frames = []
        for replicate in replicates:
            for cell in self.cells(profile, replicate).views:
                settled = results.resolve(cell)
                scores = results.rows(settled)[[*UNIT, "tokens", profile.score]].rename(
                    columns={profile.score: "score"}
                )
                shown = results.rows(settled, "view").merge(
                    scores.astype({"objective": str}), on=UNIT, how="left", validate="many_to_one"
                )
                if (shown.groupby(UNIT)["step"].transform("max") + 1 != shown.pop("tokens")).any():
                    raise ArithmeticError(
                        f"{cell.method} was viewed with other responses than were measured: this machine does not repeat itself"
                    )
                names = ("replicate", "family", "model", *CELL, "gate", "beta")
                labels = cell.labels()
                frames.append(shown.assign(**{name: labels[name] for name in names}))
        table = pd.concat(frames, ignore_index=True)
        return table.astype(
            dict.fromkeys(
                ("objective", "asked", "word", "family", "model", "method", "value_model", "gate"),
                "category",
            )
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """How long the responses shown are, how many tokens of them were steered, and shifted."""
        found = estimates.method_scores(responses(rows), MEASURED)
        return estimates.summarize(found, MEASURED, profile)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Nothing: the report shows them."""
        return []


def responses(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each response: how many tokens it has, how many of them were steered and shifted, and KL(steered‖base) in nats."""
    taken = rows[rows["chosen"]]
    moved = np.exp(rows["tilted"]) * (rows["tilted"] - rows["base_logprob"])
    divergence = moved.where(rows["steered"] & np.isfinite(rows["tilted"]), 0.0)
    unit = [*estimates.UNIT, "family", "model", "gate", "beta", *CELL]
    found = taken.groupby(unit, observed=True, as_index=False).agg(
        tokens=("step", "size"),
        steered=("steered", "sum"),
        stayed=("unsteered", "sum"),
        score=("score", "first"),
    )
    found["shifted"] = found["tokens"] - found["stayed"]
    drift = rows.assign(kl=divergence).groupby(unit, observed=True, as_index=False)["kl"].sum()
    usual = {"best_of": 1, "search": "", "tuned": False, "floor": 0.0, "threshold": np.nan}
    return found.merge(drift, on=unit, validate="one_to_one").assign(**usual)
