"""Figure 5: at which positions of a response the entropy gate opens, in base responses (where it would open) and in steered ones.

Per-token values, β = 1. A row of the table is a response; its junctions are the bits of two numbers, the lower 64 positions first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks import plan
from benchmarks.cells import OBJECTIVES
from benchmarks.profile import Profile

POLICIES = {"base": "base responses", "sia": "steered responses"}


def cells(profile: Profile, replicate: int) -> plan.Wanted:
    steered = [plan.steered(replicate, family, ratio=r) for family in profile.families for r in profile.sweep.few]
    return plan.Wanted(traces=[*(plan.base(replicate, family) for family in profile.families), *steered])


def collect(profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
    """One row per response and target ratio, of both policies; the base responses under the same threshold."""
    frames = []
    for replicate in replicates:
        for cell in [cell for cell in cells(profile, replicate).traces if cell.gate != "never"]:
            thresholds = dict(zip(OBJECTIVES, results.settled(cell).thresholds, strict=True))
            for policy in (plan.base(replicate, cell.family), cell):
                tokens = results.rows(results.settled(policy), "trace")
                opens = tokens["entropy"] >= tokens["objective"].map(thresholds).astype(np.float32)
                tokens = tokens.assign(junction=opens if policy.gate == "never" else tokens["steered"])
                frames.append(_by_response(tokens).assign(
                    replicate=replicate, family=cell.family, method=policy.method, target_ratio=cell.target_ratio,
                ))  # fmt: skip
    return pd.concat(frames, ignore_index=True).astype({"family": "category", "method": "category", "objective": "category"})


def _by_response(tokens: pd.DataFrame) -> pd.DataFrame:
    bits = tokens["junction"].to_numpy().astype(np.uint64) << (tokens["step"].to_numpy() % 64).astype(np.uint64)
    late = tokens["step"].to_numpy() >= 64
    tokens = tokens.assign(junctions_low=np.where(late, 0, bits), junctions_high=np.where(late, bits, 0), tokens=1)
    columns = ["junctions_low", "junctions_high", "tokens"]
    return (
        tokens.groupby(["objective", "prompt", "seed"], observed=True, sort=True)[columns].sum().reset_index().astype({"tokens": "int16"})
    )


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Per family, objective, policy, target ratio and position: the share of responses in which it is a junction (metric "junction", of
    all responses; "junction given reached", of those so long), and once each the mean length with its interval (metric "length"),
    and how much of the junctions lie in the first half of their response ("in the first half")."""
    records = []
    limit = profile.decoding.max_new_tokens
    for (family, objective, method, target), part in rows.groupby(["family", "objective", "method", "target_ratio"], observed=True):
        bits = np.stack([_bit(part, position) for position in range(limit)], axis=1)
        reached = part["tokens"].to_numpy()[:, None] > np.arange(limit)
        labels = {"family": family, "objective": objective, "method": method, "target_ratio": target, "n": len(part)}
        labels |= {"replicates": part["replicate"].nunique(), "seeds": part["seed"].nunique()}
        labels["n"] //= labels["seeds"]
        for position in range(limit):
            share, alive = bits[:, position].mean(), reached[:, position].sum()
            records.append(labels | {"metric": "junction", "position": position, "estimate": share})
            given = bits[:, position].sum() / alive if alive else None
            records.append(labels | {"metric": "junction given reached", "position": position, "estimate": given})
        first = bits[np.arange(limit) < part["tokens"].to_numpy()[:, None] / 2].sum() / bits.sum()
        records.append(labels | {"metric": "in the first half", "estimate": first})
        records.append(labels | {"metric": "length", "estimate": part["tokens"].mean()})
        records.append(labels | {"metric": "ratio", "estimate": bits.sum() / part["tokens"].sum()})
    return pd.DataFrame.from_records(records).round({"estimate": 4})


def _bit(part: pd.DataFrame, position: int) -> np.ndarray:
    column = part["junctions_low" if position < 64 else "junctions_high"].to_numpy().astype(np.uint64)
    return (column >> np.uint64(position % 64)) & np.uint64(1)
