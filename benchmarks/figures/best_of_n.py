"""Best-of-N with and without steering: of N responses the reward model chooses one. First family and loss, β = 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import family_label, metric_label, objective_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.model_kinds import INSTRUCT
from benchmarks.spec.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "positions")
MEASURED = (
    "judge",
    "reward",
    "fluency_errors",
    "steered",
    "tokens",
    "model_tokens",
    "value_tokens",
)


class BestOfN(Figure):
    """Best-of-N with and without steering."""

    title = "Best-of-N with and without steering"
    measured = MEASURED

    def why_unsupported(self, profile: Profile) -> str:
        """Return which models the profile lacks."""
        if profile.has("reward") and profile.has("instruct"):
            return ""
        return "best-of-n needs models.reward and models.instruct"

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Each of these tries up to N responses, which hold those of every smaller N."""
        family, sweep = profile.families[0], profile.sweep
        base = methods.base(replicate, family)
        loss = profile.losses[0]
        steered = [
            methods.steered(replicate, family, loss, ratio=r) for r in sweep.reduced_ratios
        ] + [methods.dense(replicate, family, loss)]
        return FigureCells(
            [
                methods.searched(cell, sweep.responses)
                for cell in (base, methods.base(replicate, family, INSTRUCT), *steered)
            ]
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Every method at every N, and paired: each steered one against the base at the same N, at twice as many responses and at equal
        cost, against itself without a search, and SIA against dense. positions: of tokens through all models, the reward model's reading
        among them; of these is the cost."""
        rows = rows.assign(positions=rows["model_tokens"] + rows["value_tokens"])
        metrics = profile.available_metrics(METRICS)
        found = estimates.method_scores(rows, metrics)
        differences = []
        for entry in found:
            same = {k: entry.labels[k] for k in ("family", "best_of")}
            if entry.labels["method"] != "base":
                differences.append(
                    estimates.difference(entry, estimates.select_one(found, method="base", **same))
                )
                more = estimates.select(
                    found, method="base", family=same["family"], best_of=2 * same["best_of"]
                )
                differences += [
                    estimates.difference(entry, other, versus="base-twice-as-many")
                    for other in more
                ]
                curve = estimates.select(found, method="base", family=same["family"])
                differences += [
                    estimates.difference(entry, other, versus="base-at-equal-cost")
                    for other in at_cost(entry, curve, metrics)
                ]
            if entry.labels["method"] == "sia":
                differences.append(
                    estimates.difference(entry, estimates.select_one(found, method="dense", **same))
                )
            if entry.labels["best_of"] > 1:
                alone = {k: entry.labels[k] for k in ("method", "family", "target_ratio")}
                differences.append(
                    estimates.difference(
                        entry,
                        estimates.select_one(found, best_of=1, **alone),
                        versus="one-response",
                    )
                )
        return estimates.summarize([*found, *differences], metrics, profile)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the score against N and against the token positions that N responses take."""
        from benchmarks.figures import style

        columns = ("all", *OBJECTIVES)
        level = estimates.pooled(table)
        level = level[(level["versus"] == "") & level["objective"].isin(columns)]
        looks = {
            "base": style.Look(style.COLOURS["base"], "o", (5, 2)),
            "instruct": style.Look(style.COLOURS["instruct"], "P", (1, 1)),
        }
        looks |= {
            f"SIA at {ratio:.0%}": style.Look(style.COLOURS["sia"], marker, dashes)
            for ratio, marker, dashes in zip(
                profile.sweep.reduced_ratios, "os^", ((), (5, 2), (1, 1)), strict=False
            )
        }
        looks["dense"] = style.PALETTE["dense"]
        names = level["method"].where(
            level["method"] != "sia", "SIA at " + level["target_ratio"].map("{:.0%}".format)
        )
        level = level.assign(line=names)
        level = level[level["line"].isin(looks)]
        keys = ["line", "objective", "best_of"]
        positions = level[level["metric"] == "positions"].set_index(keys)["estimate"]
        scores = level[level["metric"] == profile.score].sort_values(
            ["objective", "best_of"],
            key=lambda column: column.map(columns.index) if column.name == "objective" else column,
        )
        cost = pd.Series(scores.set_index(keys).index.map(positions), index=scores.index)
        panels = {
            "N responses": scores["best_of"].astype(float),
            "token positions, all models": cost,
        }
        data = pd.concat([scores.assign(panel=panel, x=x) for panel, x in panels.items()])
        figure = style.plt.figure(figsize=(style.PAGE, 4.2))
        style.curves(
            data.reset_index(), "x", "line", looks=looks, row="panel", col="objective"
        ).share(x="row", y=True).on(figure).plot()
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
        caption = (
            f"Best of N by the reward model ({family_label(profile.families[0])}, "
            f"{style.first_loss(profile)}, β = 1); positions of "
            f"language, value and reward models. {style.sample_size_note(level, profile)}"
        )
        handles = style.handles(looks, {name: name for name in looks})
        return style.finish(figure, handles, caption, folder, "best-of-n", stale=stale)


def at_cost(
    entry: estimates.MethodScores, curve: Sequence[estimates.MethodScores], metrics: Sequence[str]
) -> list[estimates.MethodScores]:
    """What this curve of several N gives at the mean positions of `entry`, unit by unit: a share of one N and the rest of the next, so
    that both take as many positions in each replicate and objective. None where that lies beyond the ends of the curve."""
    place, replicates, objectives = metrics.index("positions"), *entry.shape[:2]
    curve = sorted(curve, key=lambda one: one.values[:, place].mean())
    cost, *at = (
        one.values[:, place].reshape(replicates, objectives, -1).mean(2) for one in (entry, *curve)
    )
    shares = np.zeros((len(curve), replicates, objectives))
    for r, o in np.ndindex(replicates, objectives):
        costs = [one[r, o] for one in at]
        low = int(np.searchsorted(costs, cost[r, o], side="right")) - 1
        if low < 0 or cost[r, o] > costs[-1]:
            return []
        high = min(low + 1, len(curve) - 1)
        shares[high, r, o] = (
            (cost[r, o] - costs[low]) / (costs[high] - costs[low]) if high > low else 0.0
        )
        shares[low, r, o] += 1 - shares[high, r, o]
    units = [one.values.reshape(replicates, objectives, -1, len(metrics)) for one in curve]
    mixed = sum(
        share[:, :, None, None] * values for share, values in zip(shares, units, strict=True)
    )
    return [
        replace(
            curve[0],
            labels=curve[0].labels | {"best_of": None},
            values=mixed.reshape(-1, len(metrics)),
        )
    ]
