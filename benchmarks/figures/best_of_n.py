"""Best-of-N with and without steering: of N responses the reward model chooses one. First family and loss, β = 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import metric_label
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
        """Top: score against N; bottom: against the token positions that it took. Columns: all objectives, and each."""
        from benchmarks.figures import style

        table = estimates.pooled(table)

        columns = ("all", *OBJECTIVES)
        level = table[table["versus"] == ""]
        lines = [("base", 0.0, {}), ("instruct", 0.0, {})]
        lines += [
            ("sia", ratio, {"linestyle": line})
            for ratio, line in zip(profile.sweep.reduced_ratios, ("-", "--", ":"), strict=False)
        ]
        lines.append(("dense", 1.0, {}))
        figure, axes = style.grid(2, len(columns), 2.1, 2.0)
        for j, objective in enumerate(columns):
            part = level[level["objective"] == objective]
            for method, ratio, look in lines:
                of_line = part[(part["method"] == method) & (part["target_ratio"] == ratio)]
                points = of_line[of_line["metric"] == profile.score]
                positions = of_line[of_line["metric"] == "positions"].set_index("best_of")[
                    "estimate"
                ]
                look = {"linestyle": style.DASHES.get(method, "-")} | look
                style.curve(axes[0, j], method, points, "best_of", **look)
                style.curve(
                    axes[1, j],
                    method,
                    points.assign(cost=points["best_of"].map(positions)),
                    "cost",
                    **look,
                )
            counts = sorted(part["best_of"].unique())
            axes[0, j].set_xscale("log", base=2)
            axes[0, j].set_xticks(counts, [f"{n:g}" for n in counts])
            axes[1, j].set_xscale("log")
            axes[0, j].set_xlabel("N responses")
            axes[1, j].set_xlabel("token positions, all models")
            axes[0, j].set_title("all objectives" if objective == "all" else objective)
            style.share_y(axes[:, j])
        for axis in axes[:, 0]:
            axis.set_ylabel(metric_label(profile, profile.score))
        handles = [
            style.handle(m, f"SIA {r:.0%}" if m == "sia" else "", marker=style.MARKERS[m], **look)
            for m, r, look in lines
        ]
        caption = (
            f"Best-of-N by the reward model, over responses of the base, of the instruct model, and of the base steered at some share of its "
            f"tokens ({style.FAMILIES[profile.families[0]]}, {style.first_loss(profile)}, β = 1). "
            f"Positions: tokens through language, value and reward "
            f"model; prompts are shared by the N responses. {style.measured(level, profile)}"
        )
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
