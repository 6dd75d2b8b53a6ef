"""Figure 5: at which positions of a response the entropy gate opens, in base responses (where it would open) and in steered ones.

The profile's first loss, β = 1. A row of the table is a response; its junctions are the bits of numbers, of 64 positions each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import plural
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.profile import Profile

BITS = ("junctions_low", "junctions_high", "junctions_128", "junctions_192")  # of 64 positions each
POLICIES = {"base": "base responses", "sia": "steered responses"}


class Figure5(Figure):
    """Figure 5: positions of junctions."""

    title = "Figure 5: positions of junctions"
    reported = ("response_length", "intervention_ratio", "first_half_share")

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        loss = profile.losses[0]
        steered = [
            methods.steered(replicate, family, loss, ratio=r)
            for family in profile.families
            for r in profile.sweep.reduced_ratios
        ]
        return FigureCells(
            traces=[*(methods.base(replicate, family) for family in profile.families), *steered]
        )

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """One row per response and target ratio, of both policies; the base responses under the same threshold."""
        frames = []
        for replicate in replicates:
            for cell in [
                cell for cell in self.cells(profile, replicate).traces if cell.gate != "never"
            ]:
                for policy in (methods.base(replicate, cell.family), cell):
                    tokens = results.rows(results.resolve(policy), "trace")
                    junction = (
                        methods.gate_opens_at(tokens, results.resolve(cell))
                        if policy.gate == "never"
                        else tokens["steered"]
                    )
                    tokens = tokens.assign(junction=junction)
                    frames.append(_by_response(tokens, profile.decoding.max_new_tokens).assign(
                        replicate=replicate, family=cell.family, method=policy.method, target_ratio=cell.target_ratio,
                    ))  # fmt: skip
        return pd.concat(frames, ignore_index=True).astype(
            {"family": "category", "method": "category", "objective": "category"}
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Return how often each position is a junction, by family, objective, policy and target ratio.

        Shares are of all responses ("junction_share") and of those that reach the position
        ("junction_share_of_reached"). Once each: the mean length, the share of junctions in the first half of their
        response, and the share of tokens that are junctions.
        """
        records, limit = [], profile.decoding.max_new_tokens
        keys = ["family", "objective", "method", "target_ratio"]
        for key, part in rows.groupby(keys, observed=True):
            seeds, replicates = part["seed"].nunique(), part["replicate"].nunique()
            labels = dict(zip(keys, key, strict=True)) | {"seeds": seeds, "replicates": replicates}
            labels["n"] = len(part) // seeds
            bits = np.stack([_bit(part, position) for position in range(limit)], axis=1)
            length = part["tokens"].to_numpy()[:, None]
            counts, reached = bits.sum(0), (length > np.arange(limit)).sum(0)
            for position in range(limit):
                alive = reached[position]
                shares = {
                    "junction_share": counts[position] / len(part),
                    "junction_share_of_reached": counts[position] / alive if alive else None,
                }
                records += [
                    labels | {"metric": metric, "position": position, "estimate": share}
                    for metric, share in shares.items()
                ]
            means = {
                "first_half_share": bits[np.arange(limit) < length / 2].sum() / bits.sum(),
                "response_length": part["tokens"].mean(),
                "intervention_ratio": bits.sum() / part["tokens"].sum(),
            }
            records += [labels | {"metric": name, "estimate": mean} for name, mean in means.items()]
        return estimates.summary_frame(records, ["position"])

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Rows: families, objectives; columns: policies at each target ratio."""
        table = estimates.pooled(table)
        from matplotlib.colors import PowerNorm

        from benchmarks.figures import style

        columns = [
            (target, method) for target in profile.sweep.reduced_ratios for method in POLICIES
        ]
        figure, axes = style.grid(
            len(profile.sweep.reduced_ratios), len(POLICIES), 3.6, 2.5, sharey=True
        )
        axes = axes.reshape(1, -1)
        labels = [(family, objective) for family in profile.families for objective in OBJECTIVES]
        shares = table[table["metric"] == "junction_share"]
        highest = 100 * shares["estimate"].max()
        for axis, (target, method) in zip(axes[0], columns, strict=True):
            part = table[(table["target_ratio"] == target) & (table["method"] == method)]
            rows, lengths = [], []
            for family, objective in labels:
                of_row = part[(part["family"] == family) & (part["objective"] == objective)]
                rows.append(
                    100
                    * of_row[of_row["metric"] == "junction_share"]
                    .sort_values("position")["estimate"]
                    .to_numpy()
                )
                lengths.append(of_row[of_row["metric"] == "response_length"]["estimate"].iloc[0])
            drawn = axis.pcolormesh(
                np.array(rows), cmap=style.BLUES, norm=PowerNorm(0.5, 0, highest)
            )
            for i, length in enumerate(lengths):
                axis.plot(
                    [length, length],
                    [i + 0.04, i + 0.96],
                    color="#D00000",
                    linestyle=(0, (3, 1.5)),
                    linewidth=1.3,
                )
            axis.set_yticks(
                np.arange(len(labels)) + 0.5, [f"{style.FAMILIES[f]}, {o}" for f, o in labels]
            )
            axis.set_title(f"{POLICIES[method]}, {target:.0%}")
            axis.set_xlabel("position in the response (token)")
        axes[0, 0].invert_yaxis()  # which all share
        bar = figure.colorbar(drawn, cax=axes[0, -1].inset_axes((1.03, 0, 0.05, 1)))
        bar.set_label("responses with a junction here (%)")
        first = table.iloc[0]
        caption = (
            f"How often each position of a response is a junction, {style.first_loss(profile)}, β = 1. "
            f"Base responses: where the same gate would open. "
            f"Positions beyond the end of a response count as none. Colours: by the root of the share. Red, dashed: mean length of the "
            f"responses (at most {profile.decoding.max_new_tokens}). n = {first['n']} prompts × {first['seeds']} samples in each row, from "
            f"{plural(first['replicates'], 'replicate')} of profile {profile.name}; no intervals."
        )
        return style.finish(figure, [], caption, folder, "figure5", stale=stale)


def _by_response(tokens: pd.DataFrame, limit: int) -> pd.DataFrame:
    bits = tokens["junction"].to_numpy().astype(np.uint64) << (
        tokens["step"].to_numpy() % 64
    ).astype(np.uint64)
    part, names = tokens["step"].to_numpy() // 64, BITS[: -(-limit // 64)]
    tokens = tokens.assign(
        **{name: np.where(part == i, bits, 0) for i, name in enumerate(names)}, tokens=1
    )
    columns = [*names, "tokens"]
    return (
        tokens.groupby(["objective", "prompt", "seed"], observed=True, sort=True)[columns]
        .sum()
        .reset_index()
        .astype({"tokens": "int16"})
    )


def _bit(part: pd.DataFrame, position: int) -> np.ndarray:
    column = part[BITS[position // 64]].to_numpy().astype(np.uint64)
    return (column >> np.uint64(position % 64)) & np.uint64(1)
