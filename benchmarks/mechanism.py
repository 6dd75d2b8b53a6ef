"""Why sparsity helps where it does: what changes when one thing is changed at a time.

floor: candidates need some base probability on steered steps. inverted: steering where the base is sure. early: value models that have
seen few samples once. worlds: base models of other corpora (first family), values learned from their samples. β = 1 unless said.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks import plan, summary
from benchmarks.cells import Cell
from benchmarks.profile import Profile

METRICS = ("judge", "content", "fluency_errors", "kl")
MEASURED = ("judge", "content", "fluency_errors", "kl", "steered", "tokens")


def cells(profile: Profile, replicate: int) -> plan.Wanted:
    sweep, first = profile.sweep, profile.families[0]
    strong = max(sweep.tuning)
    wanted = []
    for family in profile.families:
        wanted.append(plan.base(replicate, family))
        for loss in plan.VALUES:
            wanted += plan.curve(profile, replicate, family, loss, sweep.claimed)
            wanted += plan.curve(profile, replicate, family, loss, sweep.claimed, floor=sweep.floor)
            wanted += [plan.steered(replicate, family, loss, gate="inverted-entropy", ratio=r) for r in sweep.claimed]
            wanted += [plan.steered(replicate, family, loss, gate="random", ratio=r) for r in sweep.claimed]
    for loss in plan.VALUES:
        for floor in (0.0, sweep.floor):
            wanted += plan.curve(profile, replicate, first, loss, sweep.few[:1], beta=strong, floor=floor)
        early = {"value_model": f"value-{loss}-early", "beta": 1.0}
        wanted += [Cell(replicate, first, gate="entropy", target_ratio=r, **early) for r in sweep.claimed]
        wanted.append(Cell(replicate, first, gate="every", target_ratio=1.0, **early))
    for world in profile.worlds:
        model = f"base@{world.name}"
        wanted.append(Cell(replicate, first, model=model))
        for loss in plan.VALUES:
            under = {"model": model, "value_model": f"value-{loss}@{world.name}", "beta": 1.0}
            wanted += [Cell(replicate, first, gate="entropy", target_ratio=r, **under) for r in sweep.few]
            wanted += [Cell(replicate, first, gate="random", target_ratio=r, **under) for r in sweep.few]
            wanted.append(Cell(replicate, first, gate="every", target_ratio=1.0, **under))
    return plan.Wanted(wanted)


def collect(profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
    return plan.table(cells, MEASURED, profile, replicates, results)


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Every cell, and paired within the same model, values, β and floor: SIA, and the mean of SIA over the claimed ratios, against dense;
    SIA against the inverted and the random gate; steered against base; and with a floor against without (versus "no floor")."""
    found = list(summary.entries(rows, METRICS).values())
    differences = []
    for entry in found:
        labels = entry.labels
        if labels["gate"] == "never":
            continue
        setting = {k: labels[k] for k in ("family", "model", "value_model", "beta", "floor")}
        base = summary.the(found, family=labels["family"], model=labels["model"], gate="never")
        differences.append(summary.difference(entry, base, versus="base"))
        if labels["method"] == "sia":
            others = summary.select(found, **setting, method=("inverted-entropy", "random"), target_ratio=labels["target_ratio"])
            differences += [summary.difference(entry, other) for other in [summary.the(found, **setting, method="dense"), *others]]
        if labels["method"] == "dense":
            claimed = summary.select(found, **setting, method="sia", target_ratio=profile.sweep.claimed)
            if len(claimed) == len(profile.sweep.claimed):
                differences.append(summary.difference(summary.mean_of(claimed, method="sia-claimed"), entry))
        if labels["floor"]:
            without = summary.the(found, **(setting | {"floor": 0.0}), method=labels["method"], target_ratio=labels["target_ratio"])
            differences.append(summary.difference(entry, without, versus="no floor"))
    return summary.summarize([*found, *differences, *summary.over_families(differences)], METRICS, profile)
