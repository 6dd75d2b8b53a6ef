"""Figure 1: where to steer. Six gates at matched ratios, both value losses at β = 1, and what the entropy gate gains over each other."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks import plan, summary
from benchmarks.profile import Profile

GATES = ("entropy", "entropy-rise", "attention", "attention-rise", "position", "random")
METRICS = ("judge", "reward", "fluency_errors", "kl")
MEASURED = ("judge", "reward", "fluency_errors", "kl", "steered", "tokens")


def cells(profile: Profile, replicate: int) -> plan.Wanted:
    wanted = []
    for family in profile.families:
        wanted.append(plan.base(replicate, family))
        for loss in plan.VALUES:
            wanted += [plan.steered(replicate, family, loss, gate=g, ratio=r) for g in GATES for r in profile.sweep.ratios]
            wanted.append(plan.dense(replicate, family, loss))
    return plan.Wanted(wanted)


def collect(profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
    return plan.table(cells, MEASURED, profile, replicates, results)


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Every gate, and paired the entropy gate against each other at the same target; family "all": the mean over both."""
    found = list(summary.entries(rows, METRICS).values())
    differences = []
    for entropy in summary.select(found, method="sia"):
        same = {k: entropy.labels[k] for k in ("family", "value_model", "target_ratio")}
        others = summary.select(found, method=tuple(g for g in GATES if g != "entropy"), **same)
        differences += [summary.difference(entropy, other) for other in others]
    return summary.summarize([*found, *differences, *summary.over_families(differences)], METRICS, profile)
