"""Does one threshold serve? Score and share of steered tokens against τ for every model and objective; β = 1. Small and large models (first
family) are steered by value models of their own size, by the profile's first loss.

The best τ of each model and objective, and the one τ that is best over all objectives and models under values of the same loss, are chosen
on the odd prompts and judged on the even ones, beside τ = 1 there.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import LOSSES, family_label, metric_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.model_kinds import ModelKind, value_kind
from benchmarks.spec.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "kl")
MEASURED = (*METRICS, "steered", "tokens")
SIZES = ("small", "large")
EVEN, ODD = slice(0, None, 2), slice(1, None, 2)  # prompts


class Threshold(Figure):
    """One threshold for all models and objectives."""

    title = "One threshold for all models and objectives"
    measured = MEASURED

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        wanted = []
        for family in profile.families:
            wanted.append(methods.base(replicate, family))
            for loss in profile.losses:
                wanted += [
                    methods.steered(replicate, family, loss, tau=tau)
                    for tau in profile.sweep.thresholds
                ]
                wanted.append(methods.dense(replicate, family, loss))
        for size in sizes(profile):
            family, model = profile.families[0], ModelKind("base", size=size)
            values = value_kind(profile.losses[0], size)
            wanted.append(methods.base(replicate, family, model))
            wanted += [
                methods.steered(replicate, family, values, model=model, tau=tau)
                for tau in profile.sweep.thresholds
            ]
        return FigureCells(wanted)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Return every τ and, on the even prompts, differences to the τ that are best on the odd ones.

        τ = 1 against the best of each model and objective (versus "best-tau-of-each") and against the one that is best
        over all of them ("best-tau-of-all"); and the latter against the former ("best-tau-of-each-by-best-of-all").
        `chosen` is the best τ that was taken.
        """
        metrics = profile.available_metrics(METRICS)
        scores = estimates.method_scores(rows, metrics)
        differences = []
        for loss in profile.losses:
            value_models = [methods.VALUES[loss], *(f"{methods.VALUES[loss]}-{s}" for s in SIZES)]
            models = [
                estimates.select(scores, family=family, value_model=value_model, method="sia")
                for family in profile.families
                for value_model in value_models
            ]
            models = [swept for swept in models if swept]
            by_tau = [mean_scores(swept, metrics.index(profile.score)) for swept in models]
            best_of_all = np.mean(by_tau, axis=(0, 3)).argmax(0)  # (replicates,)
            for swept, of_model in zip(models, by_tau, strict=True):
                usual = estimates.select_one(swept, tau=methods.TAU).restrict(EVEN)
                each = select_tau(swept, of_model.argmax(0))
                one = select_tau(swept, np.repeat(best_of_all[:, None], of_model.shape[2], axis=1))
                for left, right, versus, taus in (
                    (usual, each, "best-tau-of-each", each),
                    (usual, one, "best-tau-of-all", one),
                    (one, each, "best-tau-of-each-by-best-of-all", one),
                ):
                    difference = estimates.difference(left, right, versus=versus)
                    differences.append(replace(difference, chosen=taus.chosen))
        together = [*scores, *differences, *estimates.over_families(differences)]
        return estimates.summarize(together, metrics, profile, ["chosen"])

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the score and the share of steered tokens against τ, by family and objective."""
        from benchmarks.figures import style

        usual = methods.values(profile)
        level = estimates.pooled(table)
        level = level[
            (level["versus"] == "")
            & (level["metric"] == profile.score)
            & (level["objective"] != "all")
            & (level["method"] == "sia")
        ]
        looks = dict(
            zip(
                usual,
                (
                    style.Look(style.COLOURS["sia"], "o"),
                    style.Look(style.COLOURS["sia"], "s", (4, 2)),
                ),
                strict=False,
            )
        )
        labels = {value_model: LOSSES[value_model] for value_model in usual}
        for size in sizes(profile):
            looks[f"{usual[0]}-{size}"] = style.Look(style.SIZES[size], "^")
            labels[f"{usual[0]}-{size}"] = f"{size} models, {LOSSES[usual[0]]}"
        level = level[level["value_model"].isin(looks)]
        name = metric_label(profile, profile.score)
        data = pd.concat(
            [
                level.assign(quantity=name),
                level.assign(
                    quantity="share steered", estimate=level["ratio"], low=np.nan, high=np.nan
                ),
            ],
            ignore_index=True,
        )
        data["panel"] = data["family"].map(family_label) + "\n" + data["quantity"]
        rows = [
            f"{family_label(family)}\n{q}"
            for family in profile.families
            for q in (name, "share steered")
        ]
        places = {label: place for place, label in enumerate([*rows, *OBJECTIVES])}
        data = data.sort_values(
            ["panel", "objective"], key=lambda column: column.map(places), ignore_index=True
        )
        figure = style.plt.figure(figsize=(style.PAGE, 1.25 * len(rows) + 1.2))
        style.curves(data, "tau", "value_model", looks=looks, row="panel", col="objective").share(
            y="row"
        ).label(x="threshold τ (nats)").on(figure).plot()
        style.name_facets(figure, rows, list(OBJECTIVES))
        scores = data[data["quantity"] == name].groupby(["panel", "objective", "value_model"])
        for row in data.loc[scores["estimate"].idxmax()].itertuples():
            axis = figure.axes[
                places[row.panel] * len(OBJECTIVES) + places[row.objective] - len(rows)
            ]
            axis.plot(
                row.tau,
                row.estimate,
                "*",
                markersize=8,
                color=looks[row.value_model].colour,
                markeredgecolor="black",
                zorder=5,
            )
        for axis in figure.axes:
            axis.axvline(methods.TAU, color=style.ZERO, linewidth=0.8, linestyle=":")
        handles = [
            *style.handles(looks, labels),
            style.handle(
                "sia", "best τ", marker="*", linestyle="none", markersize=8, markeredgecolor="black"
            ),
            style.handle("base", "τ = 1, as reported", color=style.ZERO, linestyle=":"),
        ]
        caption = f"SIA under the same τ for every objective, β = 1. {style.sample_size_note(level, profile)}"
        return style.finish(
            figure, handles, caption, folder, "threshold", stale=stale, legend_columns=3
        )


def sizes(profile: Profile) -> list[str]:
    """The further sizes of models that the profile has."""
    return [
        size
        for size in SIZES
        if profile.has(f"base-{size}") and profile.has(f"{methods.values(profile)[0]}-{size}")
    ]


def mean_scores(swept: list[estimates.MethodScores], score: int) -> np.ndarray:
    """Return the mean of metric number `score` on the odd prompts: `(τ, replicates, objectives)`."""
    odd = [one.restrict(ODD) for one in swept]
    return np.stack([one.values[:, score].reshape(one.shape).mean((2, 3)) for one in odd])


def select_tau(swept: list[estimates.MethodScores], best: np.ndarray) -> estimates.MethodScores:
    """Return the scores on the even prompts under the τ with these numbers.

    Args:
        swept: The scores of each τ.
        best: Numbers of τ, `(replicates, objectives)`.
    """
    even = [one.restrict(EVEN) for one in swept]
    shape = even[0].shape
    units = np.repeat(best.ravel(), shape[2] * shape[3])  # the τ of each unit

    def at_best(name: str) -> np.ndarray:
        return np.stack([getattr(one, name) for one in even])[units, np.arange(len(units))]

    taus = np.array([one.labels["tau"] for one in swept])[best]
    return replace(
        even[0],
        labels=even[0].labels | {"tau": None, "method": "sia"},
        values=at_best("values"),
        steered=at_best("steered"),
        tokens=at_best("tokens"),
        chosen=even[0].chosen | {"chosen": taus},
    )
