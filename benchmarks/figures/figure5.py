"""Figure 5: positions of a response at which the entropy gate opens.

Base responses (where it would open) and steered ones, by the profile's first loss, β = 1. A row of
the table is a response; its junctions are the bits of numbers, of 64 positions each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm

from benchmarks.analysis import estimates, labels
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.profile import Profile

BITS = ("junctions_low", "junctions_high", "junctions_128", "junctions_192")  # of 64 positions each
POLICIES = {"base": "base responses", "sia": "steered responses"}


REACHED = 0.05  # share of the responses below which a position is not shown


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
        """Draw heatmaps: rows families and objectives; a panel for each policy and target ratio."""
        table = estimates.pooled(table)
        grids = {
            (target, method): shares(
                table[(table["target_ratio"] == target) & (table["method"] == method)], profile
            )
            for target in profile.sweep.reduced_ratios
            for method in POLICIES
        }
        height = 0.16 * len(next(iter(grids.values()))) + 0.5
        figure = style.plt.figure(
            figsize=(style.PAGE, height * len(profile.sweep.reduced_ratios) + 0.8)
        )
        axes = figure.subplots(
            len(profile.sweep.reduced_ratios),
            len(POLICIES),
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        highest = 100 * max(grid.max(axis=None) for grid in grids.values())
        for axis, ((target, method), grid) in zip(np.ravel(axes), grids.items(), strict=True):
            style.sns.heatmap(
                100 * grid, ax=axis, cmap="Blues", norm=PowerNorm(0.5, 0, highest), cbar=False,
                xticklabels=10,
            )  # fmt: skip
            axis.tick_params(left=False, labelrotation=0)
            axis.set_facecolor("#DDDDDD")
            axis.set(xlabel="", ylabel="", title=f"{POLICIES[method]}, {target:.0%} of the tokens")
        for axis in axes[-1]:
            axis.set_xlabel("position in the response (token)")
        bar = figure.colorbar(axis.collections[0], ax=axes, fraction=0.03, pad=0.01)
        bar.set_label("junction there (% of the responses\nthat reach the position)")
        bar.outline.set_visible(False)
        first = table.iloc[0]
        caption = (
            f"Junctions by position, {labels.LOSSES[methods.values(profile)[0]]}, β = 1. Base responses: where "
            f"the same gate would open. Grey: fewer than {REACHED:.0%} of the responses get there. "
            f"No intervals; n = {first['n']:.0f} prompts × {first['seeds']:.0f} samples a row, "
            f"{labels.plural(int(first['replicates']), 'replicate')}, profile {profile.name}."
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


def shares(part: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return the share of responses with a junction at each position, of those that reach it.

    Rows: families and objectives; columns: positions. NaN where fewer than REACHED get there.
    """
    part = part.assign(row=part["family"].map(labels.family_label) + ", " + part["objective"])
    grids = part.pivot_table(
        index=["metric", "row"], columns="position", values="estimate", dropna=False
    )
    of_all, of_reached = grids.loc["junction_share"], grids.loc["junction_share_of_reached"]
    reached = (of_all / of_reached.where(of_reached > 0)).ffill(axis=1)
    shown = of_reached.where(reached >= REACHED).dropna(axis=1, how="all")
    rows = [f"{labels.family_label(f)}, {o}" for f in profile.families for o in OBJECTIVES]
    return shown.loc[rows].rename(columns=int)
