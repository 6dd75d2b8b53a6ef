"""Best-of-N with and without steering: of N responses the reward model chooses one.

First family and loss, β = 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import (
    family_label,
    listed,
    metric_label,
    objective_label,
    share_label,
)
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.model_kinds import INSTRUCT
from benchmarks.spec.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "positions")
MARKERS = {"base": "o", "instruct": "P"}
SIA_LOOKS = (("o", ()), ("s", (5, 2)), ("^", (1, 1)), ("D", (5, 1, 1, 1)))  # markers and dashes


class BestOfN(Figure):
    """Best-of-N with and without steering."""

    measured = (
        "judge",
        "reward",
        "fluency_errors",
        "steered",
        "tokens",
        "model_tokens",
        "value_tokens",
    )

    def why_unsupported(self, profile: Profile) -> str:
        """Return which models the profile lacks."""
        if profile.has("reward") and profile.has("instruct"):
            return ""
        return "best-of-n needs models.reward and models.instruct"

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return cells of up to N responses, which hold those of every smaller N.

        The base, which is cheapest, responds twice as often as the others.
        """
        unit, sweep = (replicate, profile.families[0]), profile.sweep
        sparse_and_dense = methods.curve(profile, *unit, profile.losses[0], sweep.reduced_ratios)
        others = [methods.base(*unit, INSTRUCT), *sparse_and_dense]
        base = methods.with_best_of(methods.base(*unit), sweep.responses)
        half = max(2, sweep.responses // 2)
        return FigureCells([base, *(methods.with_best_of(cell, half) for cell in others)])

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate every method at every N, and paired differences.

        Each steered method against the base at the same N, at twice as many responses and at equal
        cost; each against itself without a search; and SIA against dense. The cost is `positions`:
        tokens through all models, the reward model among them.
        """
        rows = rows.assign(positions=rows["model_tokens"] + rows["value_tokens"])
        metrics = profile.available_metrics(METRICS)
        scores = estimates.method_scores(rows, metrics)
        differences = []
        for one in scores:
            method, count = one.labels["method"], one.labels["best_of"]
            base = estimates.select(scores, method="base", family=one.labels["family"])
            others = []
            if method != "base":
                others = [(estimates.select_one(base, best_of=count), "base")]
                more = estimates.select(base, best_of=2 * count)
                others += [(other, "base-twice-as-many") for other in more]
                others += [
                    (other, "base-at-equal-cost") for other in at_equal_cost(one, base, metrics)
                ]
            if method == "sia":
                dense = estimates.select_one(scores, method="dense", best_of=count)
                others.append((dense, "dense"))
            if count > 1:
                alone = {k: one.labels[k] for k in ("method", "family", "target_ratio")}
                others.append((estimates.select_one(scores, best_of=1, **alone), "one-response"))
            differences += [
                estimates.difference(one, other, versus=versus) for other, versus in others
            ]
        return estimates.summarize([*scores, *differences], metrics, profile)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the score against N and against the token positions that N responses take."""
        columns = ("all", *OBJECTIVES)
        level = estimates.pooled(table)
        level = level[(level["versus"] == "") & level["objective"].isin(columns)]
        looks = {name: style.PALETTE[name]._replace(marker=m) for name, m in MARKERS.items()}
        looks |= {
            f"SIA at {share_label(ratio)}": style.Look(style.COLOURS["sia"], marker, dashes)
            for ratio, (marker, dashes) in zip(
                profile.sweep.reduced_ratios, cycle(SIA_LOOKS), strict=False
            )
        }
        looks["dense"] = style.PALETTE["dense"]
        shares = "SIA at " + level["target_ratio"].map(share_label)
        level = level.assign(line=level["method"].mask(level["method"] == "sia", shares))
        level = level[level["line"].isin(looks)]
        keys = ["line", "objective", "best_of"]
        positions = level[level["metric"] == "positions"].set_index(keys)["estimate"]
        scores = level[level["metric"] == profile.score].sort_values("best_of", kind="stable")
        scores = style.ordered(scores, objective=columns)
        panels = {
            "N responses": scores["best_of"].astype(float),
            "token positions, all models": positions[
                pd.MultiIndex.from_frame(scores[keys])
            ].to_numpy(),
        }
        data = pd.concat(
            [scores.assign(panel=panel, x=x) for panel, x in panels.items()], ignore_index=True
        )
        figure = style.plt.figure(figsize=(style.PAGE, 4.2))
        plot = style.curves(data, "x", "line", looks=looks, row="panel", col="objective")
        plot.share(x="row", y=True).on(figure).plot()
        style.name_facets(figure, list(panels), [objective_label(name) for name in columns])
        counts = sorted(data["best_of"].unique())
        for i, axis in enumerate(figure.axes):
            above = i < len(columns)
            axis.set_xscale("log", base=2 if above else 10)
            axis.set(xlabel=list(panels)[not above], ylabel="")
            axis.xaxis.label.set_visible(True)
            if above:
                axis.set_xticks(counts, [f"{count:g}" for count in counts])
        for axis in figure.axes[:: len(columns)]:
            axis.set_ylabel(metric_label(profile, profile.score))
        about = listed(family_label(profile.families[0]), style.first_loss(profile), "β = 1")
        caption = (
            f"Best of N by the reward model ({about}); positions of language, value and reward "
            f"models. {style.sample_size_note(level, profile)}"
        )
        return style.finish(figure, style.handles(looks), caption, folder, "best-of-n", stale=stale)


def at_equal_cost(
    one: estimates.MethodScores, curve: Sequence[estimates.MethodScores], metrics: Sequence[str]
) -> list[estimates.MethodScores]:
    """Return what a curve of several N gives at the mean positions of `one`, unit by unit.

    It mixes a share of one N and the rest of the next, so that both take as many positions in each
    replicate and objective. Empty where that lies beyond the ends of the curve.
    """
    place, (replicates, objectives, *_) = metrics.index("positions"), one.shape
    curve = sorted(curve, key=lambda point: point.values[:, place].mean())
    cost, *costs = (
        point.values[:, place].reshape(replicates, objectives, -1).mean(2)
        for point in (one, *curve)
    )
    shares = np.zeros((len(curve), replicates, objectives))
    for at in np.ndindex(replicates, objectives):
        known = [of_point[at] for of_point in costs]
        if not known[0] <= cost[at] <= known[-1]:
            return []
        low = int(np.searchsorted(known, cost[at], side="right")) - 1
        high = min(low + 1, len(curve) - 1)
        if high > low:
            shares[(high, *at)] = (cost[at] - known[low]) / (known[high] - known[low])
        shares[(low, *at)] += 1 - shares[(high, *at)]
    units = [point.values.reshape(replicates, objectives, -1, len(metrics)) for point in curve]
    mixed = sum(
        share[:, :, None, None] * values for share, values in zip(shares, units, strict=True)
    )
    labels = curve[0].labels | {"best_of": None}
    return [replace(curve[0], labels=labels, values=mixed.reshape(-1, len(metrics)))]
