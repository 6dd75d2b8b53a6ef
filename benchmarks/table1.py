"""Table 1: every method, objective and family: what it reaches, how far it drifts, what it costs. Best in bold, with intervals.

win: share of responses that the judge scores above the base's to the same prompt under the same noise, ties half.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks import plan, summary
from benchmarks.profile import Profile

METRICS = ("reward", "judge", "win", "distinct", "kl", "surprise", "tokens", "positions")
MEASURED = ("reward", "judge", "distinct", "kl", "surprise", "steered", "tokens", "model_tokens", "value_tokens")
HEADS = {
    "reward": "reward (SD)",
    "judge": "judge",
    "win": "win rate",
    "distinct": "distinct-2",
    "kl": "KL (nats)",
    "surprise": "−ln π (nats)",
    "tokens": "length",
    "positions": "cost (positions)",
}
BETTER = {"reward": 1, "judge": 1, "win": 1, "distinct": 1, "kl": -1, "surprise": -1, "positions": -1}


def cells(profile: Profile, replicate: int) -> plan.Wanted:
    wanted, sweep = [], profile.sweep
    for family in profile.families:
        wanted += plan.baselines(profile, replicate, family)
        for loss in plan.VALUES:
            for tuned in (False, True):
                wanted += plan.curve(profile, replicate, family, loss, sweep.few, tuned=tuned)
        wanted.append(plan.searched(plan.steered(replicate, family, ratio=min(sweep.few)), sweep.beams))
    return plan.Wanted(wanted)


def collect(profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
    rows = plan.table(cells, MEASURED, profile, replicates, results)
    rows = rows[(rows["search"] != "best-of") | (rows["best_of"] == profile.sweep.beams)]
    base = rows[(rows["method"] == "base") & (rows["search"] == "")]
    unit = ["family", *summary.UNIT]
    paired = (
        rows[unit]
        .astype({"family": str, "objective": str})
        .merge(base[[*unit, "judge"]].astype({"family": str, "objective": str}), on=unit, how="left", validate="many_to_one")["judge"]
        .to_numpy()
    )
    return rows.assign(win=((rows["judge"] > paired) + 0.5 * (rows["judge"] == paired)).astype("float32"))


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Every method, and the paired difference of each judge score to the base's."""
    rows = rows.assign(positions=rows["model_tokens"] + rows["value_tokens"])
    found = list(summary.entries(rows, METRICS).values())
    differences = [
        summary.difference(entry, summary.the(found, family=entry.labels["family"], method="base", search=""), versus="base")
        for entry in found
    ]
    return summary.summarize([*found, *differences], METRICS, profile)
