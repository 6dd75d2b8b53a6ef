"""Figure 2: alignment against the share of steered tokens, beside static baselines, in four settings.

Settings: values by the paper's loss ("mean") or by the per-token loss ("token"), each at β = 1 and with every method at
its own best β, chosen by the judge on validation prompts. The drawing shows three of them; the table has all four.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks import plan, summary
from benchmarks.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "kl")
MEASURED = ("judge", "reward", "fluency_errors", "kl", "steered", "tokens")
SETTINGS = {
    ("value-mean", False): "paper's loss, β = 1",
    ("value-token", False): "per-token loss, β = 1",
    ("value-token", True): "per-token loss, best β",
    ("value-mean", True): "paper's loss, best β",
}


def cells(profile: Profile, replicate: int) -> plan.Wanted:
    wanted, sweep = [], profile.sweep
    for family in profile.families:
        wanted += plan.baselines(profile, replicate, family)
        for loss in plan.VALUES:
            wanted += plan.curve(profile, replicate, family, loss) + plan.curve(profile, replicate, family, loss, tuned=True)
            wanted += [plan.steered(replicate, family, loss, gate="random", ratio=r) for r in sweep.ratios]
        wanted += [plan.steered(replicate, family, gate="random", ratio=r, tuned=True) for r in sweep.ratios]
    return plan.Wanted(wanted)


def collect(profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
    return plan.table(cells, MEASURED, profile, replicates, results)


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Every method, and paired: SIA − dense, SIA − random, the mean of SIA over the claimed ratios − dense; SIA at each ratio against
    every baseline. Family "all": the mean over both."""
    found = [
        e for e in summary.entries(rows, METRICS).values() if e.labels["search"] != "best-of" or e.labels["best_of"] == profile.sweep.beams
    ]
    differences = []
    for family in profile.families:
        static = [e for e in summary.select(found, family=family) if e.labels["value_model"] not in plan.VALUES.values()]
        for value_model, tuned in SETTINGS:
            setting = {"family": family, "value_model": value_model, "tuned": tuned}
            dense = summary.the(found, **setting, method="dense")
            sparse = summary.select(found, **setting, method="sia")
            for sia in sparse:
                others = summary.select(found, **setting, method="random", target_ratio=sia.labels["target_ratio"])
                differences += [summary.difference(sia, other) for other in [dense, *others]]
                differences += [summary.difference(sia, e, versus=method_name(e)) for e in static]
            claimed = [e for e in sparse if e.labels["target_ratio"] in profile.sweep.claimed]
            differences.append(summary.difference(summary.mean_of(claimed, method="sia-claimed"), dense))
    return summary.summarize([*found, *differences, *summary.over_families(differences)], METRICS, profile)


def method_name(entry: summary.Entry) -> str:
    """What a baseline is called when something is taken against it."""
    return "best-of-n" if entry.labels["search"] == "best-of" else entry.labels["method"]
