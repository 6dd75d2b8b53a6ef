"""Figure 5: positions of a response at which the entropy gate opens.

Base responses (where it would open) and steered ones, by the profile's first loss, β = 1. A row of
the table is a response; its junctions are the bits of numbers, of 64 positions each.
"""

from collections.abc import Sequence
from itertools import product
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm

from benchmarks.analysis import estimates, labels
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.profile import Profile

BITS = 64  # positions of a number
FIRST_NUMBERS = ("junctions_low", "junctions_high")  # the next are called by their first position
POLICIES = {"base": "base responses", "sia": "steered responses"}
MEAN = style.COLOURS["best-of-n"]  # colour of the mean length
REACHED = 0.05  # share of the responses below which a position is not shown


class Figure5(Figure):
    """Figure 5: positions of junctions."""

    reported = ("response_length", "intervention_ratio", "first_half_share")

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return traces of the base, and of SIA at the reduced ratios."""
        base = [methods.base(replicate, family) for family in profile.families]
        sparse = [
            methods.steered(replicate, family, profile.losses[0], ratio=ratio)
            for family, ratio in product(profile.families, profile.sweep.reduced_ratios)
        ]
        return FigureCells(traces=[*base, *sparse])

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """Return a row per response and target ratio of both policies, under the same threshold."""
        requests = [
            request
            for replicate in replicates
            for request in self.cells(profile, replicate).traces
            if request.gate != "never"
        ]
        frames = [
            by_response(tokens, profile.decoding.max_new_tokens).assign(
                replicate=request.replicate,
                family=request.family,
                method=method,
                target_ratio=request.target_ratio,
            )
            for request in requests
            for method, tokens in methods.traces_with_junctions(results, request)
        ]
        return pd.concat(frames, ignore_index=True).astype(
            dict.fromkeys(("family", "method", "objective"), "category")
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Return how often each position is a junction, by family, objective, policy and ratio.

        Shares are of all responses ("junction_share") and of those that reach the position
        ("junction_share_of_reached"). Once each: the mean length, the share of junctions in the
        first half of their response, and the share of tokens that are junctions. The share in the
        first half also over all families and objectives, with an interval.
        """
        records, halves, positions = [], [], np.arange(profile.decoding.max_new_tokens)
        keys = ["family", "objective", "method", "target_ratio"]
        for key, group in rows.groupby(keys, observed=True):
            seeds, replicates = group["seed"].nunique(), group["replicate"].nunique()
            setting = dict(zip(keys, key, strict=True)) | {"seeds": seeds, "replicates": replicates}
            setting["n"] = len(group) // seeds
            junctions = np.stack([junctions_at(group, at) for at in positions], axis=1)
            length = group["tokens"].to_numpy()[:, None]
            counts, reached = junctions.sum(0), (length > positions).sum(0)
            for at, count, alive in zip(positions, counts, reached, strict=True):
                shares = {
                    "junction_share": count / len(group),
                    "junction_share_of_reached": count / alive if alive else None,
                }
                records += [
                    setting | {"metric": metric, "position": at, "estimate": share}
                    for metric, share in shares.items()
                ]
            # the middle token of an odd length counts half
            in_first_half = (junctions * np.clip(length / 2 - positions, 0, 1)).sum(1)
            halves.append(group.assign(first=in_first_half, junctions=junctions.sum(1)))
            means = {
                "first_half_share": in_first_half.sum() / (junctions.sum() or np.nan),
                "response_length": group["tokens"].mean(),
                "intervention_ratio": junctions.sum() / group["tokens"].sum(),
            }
            records += [
                setting | {"metric": name, "estimate": mean} for name, mean in means.items()
            ]
        keys = ["method", "target_ratio"]
        for key, group in pd.concat(halves, ignore_index=True).groupby(keys, observed=True):
            records += first_half_rows(group, dict(zip(keys, key, strict=True)), profile)
        return estimates.summary_frame(records, ["position"])

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw heatmaps: rows families and objectives; a panel for each policy and target ratio."""
        table, ratios = estimates.pooled(table), profile.sweep.reduced_ratios
        table = with_row_names(table)
        of_panel = {
            (target, method): table[(table["target_ratio"] == target) & (table["method"] == method)]
            for target, method in product(ratios, POLICIES)
        }
        grids = {place: shares(rows, profile) for place, rows in of_panel.items()}
        height = 0.16 * len(next(iter(grids.values()))) + 0.5
        figure, axes = style.plt.subplots(
            len(ratios), len(POLICIES), sharex=True, sharey=True, squeeze=False,
            figsize=(style.PAGE, height * len(ratios) + 0.8),
        )  # fmt: skip
        highest = 100 * max(grid.max(axis=None) for grid in grids.values())
        for axis, ((target, method), grid) in zip(np.ravel(axes), grids.items(), strict=True):
            style.sns.heatmap(
                100 * grid, ax=axis, cmap="Blues", norm=PowerNorm(0.5, 0, highest), cbar=False,
                xticklabels=10 if grid.shape[1] <= 80 else 50 * ceil(grid.shape[1] / 400),
            )  # fmt: skip
            rows = np.arange(len(grid))
            lengths = mean_lengths(of_panel[target, method], grid.index)
            axis.vlines(lengths, rows, rows + 1, color=MEAN)
            axis.tick_params(left=False, labelrotation=0)
            axis.set_facecolor("#DDDDDD")
            title = f"{POLICIES[method]}, {labels.share_label(target)} of the tokens"
            axis.set(xlabel="", ylabel="", title=title)
        for axis in axes[-1]:
            axis.set_xlabel("position in the response (token)")
        bar = figure.colorbar(axis.collections[0], ax=axes, fraction=0.03, pad=0.01)
        bar.set_label("junction there (% of the responses\nthat reach the position)")
        bar.outline.set_visible(False)
        first = table.iloc[0]
        caption = (
            f"{labels.listed('Junctions by position', style.first_loss(profile), 'β = 1')}. Base: "
            f"where the gate would open. Orange: mean length. Grey: under {REACHED:.0%} are this "
            f"long. No intervals; each row: {style.sample_size(first)}, profile {profile.name}."
        )
        return style.finish(figure, [], caption, folder, "figure5", stale=stale)


def mean_lengths(table: pd.DataFrame, rows: Sequence[str]) -> list[float]:
    """Return the mean length of the responses of each row of a heatmap, in tokens."""
    lengths = table[table["metric"] == "response_length"].set_index("row")["estimate"]
    return [float(lengths[row]) for row in rows]


def first_half_rows(responses: pd.DataFrame, labels: dict, profile: Profile) -> list[dict]:
    """Return the share of junctions in the first half of responses, of all families together.

    Args:
        responses: With columns `first` and `junctions`, counts of each response.
        labels: Labels of the rows.
        profile: Says how to resample.
    """
    prompts = int(responses["prompt"].max()) + 1
    index, shape = estimates.unit_indices(responses, "prompt", prompts)
    sums, counts = np.zeros((2, np.prod(shape), 1))
    np.add.at(sums[:, 0], index, responses["first"].to_numpy(float))
    np.add.at(counts[:, 0], index, responses["junctions"].to_numpy(float))
    labels = labels | {
        "family": estimates.pooled_family(profile),
        "objective": "all",
        "metric": "first_half_share",
        "n": int(np.prod(shape)),
        "seeds": responses["seed"].nunique(),
        "replicates": shape[0],
    }
    draws = estimates.ratio_draws(sums, counts, shape, profile)[:, :, 0]
    return estimates.estimate_rows(labels, draws, profile)


def by_response(tokens: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Return a row per response, with its length and its junctions as bits of numbers."""
    word, bit = np.divmod(tokens["step"].to_numpy().astype(np.uint64), np.uint64(BITS))
    bits = tokens["junction"].to_numpy().astype(np.uint64) << bit
    words = {_number_of(at): np.where(word == at // BITS, bits, 0) for at in range(0, limit, BITS)}
    tokens = tokens.assign(**words, tokens=1)
    responses = tokens.groupby(["objective", "prompt", "seed"], observed=True)
    return responses[[*words, "tokens"]].sum().reset_index().astype({"tokens": "int16"})


def junctions_at(responses: pd.DataFrame, position: int) -> np.ndarray:
    """Return 1 for each response with a junction at a position, else 0."""
    words = responses[_number_of(position)].to_numpy().astype(np.uint64)
    return (words >> np.uint64(position % BITS)) & np.uint64(1)


def _number_of(position: int) -> str:
    """Return the column whose bits have a position."""
    index = position // BITS
    return FIRST_NUMBERS[index] if index < 2 else f"junctions_{index * BITS}"


def with_row_names(table: pd.DataFrame) -> pd.DataFrame:
    """Add the column `row`: the row of a heatmap, by family and objective."""
    families = table["family"].map(labels.family_label)
    return table.assign(row=families + ", " + table["objective"])


def shares(table: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return the share of responses with a junction at each position, of those that reach it.

    Rows: families and objectives; columns: positions. NaN where fewer than REACHED get there.
    """
    grids = table.pivot_table(
        index=["metric", "row"], columns="position", values="estimate", dropna=False
    )
    of_all, of_reached = grids.loc["junction_share"], grids.loc["junction_share_of_reached"]
    # known at junctions; before the first one every response is taken to go on
    reached = (of_all / of_reached.where(of_reached > 0)).ffill(axis=1).fillna(1)
    shown = of_reached.where(reached >= REACHED).dropna(axis=1, how="all")
    rows = [f"{labels.family_label(f)}, {o}" for f, o in product(profile.families, OBJECTIVES)]
    return shown.loc[rows].rename(columns=int)
