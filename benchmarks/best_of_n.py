"""Best-of-N with and without steering: of N responses the reward model chooses one. First family, per-token values, β = 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from benchmarks import plan, summary
from benchmarks.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "positions")
MEASURED = ("judge", "reward", "fluency_errors", "steered", "tokens", "model_tokens", "value_tokens")


def cells(profile: Profile, replicate: int) -> plan.Wanted:
    """Each of these tries up to N responses, which hold those of every smaller N."""
    family, sweep = profile.families[0], profile.sweep
    base = plan.base(replicate, family)
    steered = [plan.steered(replicate, family, ratio=r) for r in sweep.few] + [plan.dense(replicate, family)]
    return plan.Wanted([plan.searched(cell, sweep.responses) for cell in (base, replace(base, model="instruct"), *steered)])


def collect(profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
    return plan.table(cells, MEASURED, profile, replicates, results)


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Every method at every N, and paired: each steered one against the base at the same N, against itself without a search, and
    SIA against dense. positions: of tokens through all models, the reward model's reading among them."""
    rows = rows.assign(positions=rows["model_tokens"] + rows["value_tokens"])
    found = list(summary.entries(rows, METRICS).values())
    differences = []
    for entry in found:
        same = {k: entry.labels[k] for k in ("family", "best_of")}
        if entry.labels["method"] != "base":
            differences.append(summary.difference(entry, summary.the(found, method="base", **same)))
        if entry.labels["method"] == "sia":
            differences.append(summary.difference(entry, summary.the(found, method="dense", **same)))
        if entry.labels["best_of"] > 1:
            alone = {k: entry.labels[k] for k in ("method", "family", "target_ratio")}
            differences.append(summary.difference(entry, summary.the(found, best_of=1, **alone), versus="one response"))
    return summary.summarize([*found, *differences], METRICS, profile)
