"""Figure 4: strength. The grid of β and ratio for both value losses (first family); what each ratio reaches at its own best β; and
sparse against dense in every setting of the claims: at β = 1, at each method's best β, and at equal drift, each
with and without a floor on the candidates' base probability (both families).

At equal drift: SIA at β = 1 against dense steering at the smaller β whose KL per response is the same, linear between measured β (and
the base, at KL 0) in every resample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks import plan, summary
from benchmarks.cells import OBJECTIVES
from benchmarks.profile import Profile

METRICS = ("judge", "content", "fluency_errors", "kl", "kl_per_token")
MEASURED = ("judge", "content", "fluency_errors", "kl", "steered", "tokens")


def cells(profile: Profile, replicate: int) -> plan.Wanted:
    wanted, sweep, first = [], profile.sweep, profile.families[0]
    for family in profile.families:
        wanted.append(plan.base(replicate, family))
        for loss in plan.VALUES:
            weaker = [beta for beta in sweep.betas if beta < 1]
            for beta in sweep.betas if family == first else [1.0]:
                wanted += plan.curve(profile, replicate, family, loss, beta=beta)
            wanted += [plan.dense(replicate, family, loss, beta=beta) for beta in weaker]
            wanted += plan.curve(profile, replicate, family, loss, tuned=True)
            floor = {"floor": sweep.floor, "ratios": sweep.claimed}
            wanted += plan.curve(profile, replicate, family, loss, **floor)
            wanted += plan.curve(profile, replicate, family, loss, tuned=True, **floor)
            wanted += [plan.dense(replicate, family, loss, beta=beta, floor=sweep.floor) for beta in weaker]
    return plan.Wanted(wanted)


def collect(profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
    return plan.table(cells, MEASURED, profile, replicates, results)


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Every cell, and paired: SIA at each ratio, and its mean over the claimed ones, against dense at the same β, with each at its own
    best β, and (`matched`: "kl") at equal drift. Per objective and pooled; family "all": the mean over both."""
    found = list(summary.entries(rows, METRICS).values())
    differences, matched = [], []
    for dense in summary.select(found, method="dense"):
        setting = {k: dense.labels[k] for k in ("family", "value_model", "tuned", "floor")}
        setting |= {} if dense.labels["tuned"] else {"beta": dense.labels["beta"]}
        sparse = summary.select(found, method="sia", **setting)
        if not sparse:
            continue
        differences += [summary.difference(sia, dense) for sia in sparse]
        claimed = [e for e in sparse if e.labels["target_ratio"] in profile.sweep.claimed]
        differences.append(summary.difference(summary.mean_of(claimed, method="sia-claimed"), dense))
        if not setting["tuned"] and setting["beta"] == 1:
            weaker = summary.select(found, method="dense", **{k: setting[k] for k in ("family", "value_model", "floor")}, tuned=False)
            base = summary.the(found, family=setting["family"], gate="never")
            matched.append((base, sorted(weaker, key=lambda e: e.labels["beta"]), claimed))
    strong = [e for e in summary.select(found, family=profile.families[0], floor=0.0, tuned=False) if e.labels["gate"] != "never"]
    for loss in plan.VALUES.values():  # what replacing the logits by the values, or a strong tilt, does
        for ratio in (*profile.sweep.ratios, 1.0):
            same = {"value_model": loss, "target_ratio": ratio}
            usual = summary.the(strong, **same, beta=1.0)
            differences += [summary.difference(e, usual, versus="β = 1") for e in summary.select(strong, **same) if e.labels["beta"] != 1]
    pooled = summary.over_families([d for d in differences if d.labels["versus"] == "dense"])
    table = summary.summarize([*found, *differences, *pooled], METRICS, profile)
    return pd.concat([table, at_equal_drift(matched, profile)], ignore_index=True)


def at_equal_drift(
    settings: Sequence[tuple[summary.Entry, Sequence[summary.Entry], Sequence[summary.Entry]]], profile: Profile
) -> pd.DataFrame:
    """SIA − dense in judge score where both have the KL of SIA, by ratio and for their mean; of each family and the mean over them.

    settings: (base, dense by ascending β, SIA by ratio) of each family, loss and floor.
    """
    records, families = [], {}
    for base, dense, sparse in settings:
        for number, objective in [*enumerate(OBJECTIVES), (None, "all")]:
            ends = [_gains(base, dense, sparse, number, replicate, profile) for replicate in (None, *range(base.shape[0]))]
            for i, name in enumerate(
                [*(e.labels for e in sparse), dict(sparse[0].labels) | {"method": "sia-claimed", "target_ratio": None}]
            ):
                labels = name | {"objective": objective, "metric": "judge", "versus": "dense", "matched": "kl"}
                labels |= {
                    "seeds": base.shape[3],
                    "replicates": base.shape[0],
                    "n": int(np.prod(base.shape[:3])) // (1 if number is None else base.shape[1]),
                }
                draws = [x[:, i] if i < len(sparse) else x.mean(1) for x in ends]
                records.append(_record(labels, draws, profile))
                key = (labels["value_model"], labels["floor"], objective, labels["method"], labels["target_ratio"])
                families.setdefault(key, []).append((labels, draws))
    for many in families.values():
        if len(many) > 1:
            draws = [np.mean(group, axis=0) for group in zip(*(draws for _, draws in many), strict=True)]
            records.append(_record(many[0][0] | {"family": "all"}, draws, profile))
    return pd.DataFrame.from_records(records).reindex(columns=summary.COLUMNS).round({"estimate": 4, "low": 4, "high": 4})


def _gains(base, dense, sparse, objective: int | None, replicate: int | None, profile: Profile) -> np.ndarray:
    """The estimate, and then every resample of it: `(1 + resamples, ratios)`."""

    def part(entry: summary.Entry) -> np.ndarray:
        values = entry.values[:, [METRICS.index("judge"), METRICS.index("kl")]].reshape(*entry.shape, 2)
        values = values if objective is None else values[:, [objective]]
        return values if replicate is None else values[[replicate]]

    parts = np.stack([part(entry) for entry in (base, *dense, *sparse)], axis=-1)  # (…, 2, entries)
    statistics = profile.statistics
    weights = summary.resamples(parts.shape[:4], statistics.resamples, statistics.seed)
    flat = parts.reshape(weights.shape[1], -1)
    centre = flat.mean(0)
    means = np.concatenate([centre[None], centre + weights @ (flat - centre).astype(np.float32)]).reshape(-1, *parts.shape[4:])
    scores, drifts = means[:, 0], means[:, 1]
    split = 1 + len(dense)
    gains = np.empty((len(means), len(sparse)))
    for draw in range(len(means)):
        order = np.argsort(drifts[draw, :split])
        reached = np.interp(drifts[draw, split:], drifts[draw, order], scores[draw, order])
        gains[draw] = scores[draw, split:] - reached
    return gains


def _record(labels: dict, draws: list[np.ndarray], profile: Profile) -> dict:
    """draws: estimate and resamples, pooled and then of each replicate."""
    tail = (1 - profile.statistics.level) / 2
    ends = [(x[0], *np.quantile(x[1:], [tail, 1 - tail])) for x in draws]
    pooled, single = ends[0], ends[1:]
    by_replicate = {
        f"{name}_by_replicate": "|".join(f"{end[i]:.4f}" for end in single) for i, name in enumerate(("estimate", "low", "high"))
    }
    return labels | dict(zip(("estimate", "low", "high"), map(float, pooled), strict=True)) | by_replicate
