"""Figure 3: weak to strong. Value models of three sizes steer language models of three sizes; a smaller one a larger one above all.

Values by the per-token loss, β = 1, first family. The usual size is called medium.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks import plan, summary
from benchmarks.cells import Cell
from benchmarks.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "kl")
MEASURED = ("judge", "reward", "fluency_errors", "kl", "steered", "tokens")
SIZES = {"small": "-small", "medium": "", "large": "-large"}  # → how kinds of models end
WEAKER = [("small", "medium"), ("small", "large"), ("medium", "large")]  # (value model, language model)


def cells(profile: Profile, replicate: int) -> plan.Wanted:
    wanted, family, sweep = [], profile.families[0], profile.sweep
    for model in SIZES.values():
        wanted.append(Cell(replicate, family, model=f"base{model}"))
        for value in SIZES.values():
            under = {"model": f"base{model}", "value_model": f"value-token{value}", "beta": 1.0}
            wanted += [Cell(replicate, family, gate="entropy", target_ratio=r, **under) for r in sweep.claimed]
            wanted.append(Cell(replicate, family, gate="every", target_ratio=1.0, **under))
    return plan.Wanted(wanted)


def collect(profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
    return plan.table(cells, MEASURED, profile, replicates, results)


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Every pair of sizes, and paired: its gain over the base model; SIA, and the mean of SIA over the claimed ratios, against dense.

    Method "weak-to-strong": the mean over the pairs whose value model is the smaller one.
    """
    found = list(summary.entries(rows, METRICS).values())
    differences, gains, shortfalls = [], {}, []
    for value in SIZES:
        for model in SIZES:
            pair = {"model": f"base{SIZES[model]}", "value_model": f"value-token{SIZES[value]}"}
            base = summary.the(found, model=pair["model"], gate="never")
            dense = summary.the(found, **pair, method="dense")
            sparse = summary.select(found, **pair, method="sia")
            differences += [summary.difference(e, base, versus="base") for e in [*sparse, dense]]
            differences += [summary.difference(e, dense) for e in sparse]
            claimed = summary.mean_of([e for e in sparse if e.labels["target_ratio"] in profile.sweep.claimed], method="sia-claimed")
            differences.append(summary.difference(claimed, dense))
            if (value, model) in WEAKER:
                gains.setdefault("sia-claimed", []).append(summary.difference(claimed, base, versus="base"))
                gains.setdefault("dense", []).append(summary.difference(dense, base, versus="base"))
                shortfalls.append(differences[-1])
    names = {"model": "", "value_model": "", "search": ""}
    pooled = [summary.mean_of(many, **names, method=f"weak-to-strong {method}", versus="base") for method, many in gains.items()]
    pooled.append(summary.mean_of(shortfalls, **names, method="weak-to-strong sia-claimed", versus="dense"))
    return summary.summarize([*found, *differences, *pooled], METRICS, profile)
