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
from benchmarks.analysis.labels import metric_label
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
        """Columns: objectives; top: score against τ; bottom: share of steered tokens. A line for each family and loss."""
        from benchmarks.figures import style

        table = estimates.pooled(table)

        figure, axes = style.grid(2, len(OBJECTIVES), 2.7, 2.2, sharex=True)
        looks = {
            (f, v): {"linestyle": line, "markerfacecolor": "white" if v == "value-mean" else None}
            for f, line in zip(profile.families, ("-", "--"), strict=False)
            for v in methods.values(profile)
        }
        sized = {size: f"{methods.values(profile)[0]}-{size}" for size in sizes(profile)}
        looks |= {
            (profile.families[0], sized[size]): {"color": style.SIZES[size], "marker": "s"}
            for size in sized
        }
        level = table[
            (table["versus"] == "")
            & (table["metric"] == profile.score)
            & (table["objective"] != "all")
        ]
        for j, objective in enumerate(OBJECTIVES):
            part = level[level["objective"] == objective]
            for (family, value_model), look in looks.items():
                points = part[
                    (part["method"] == "sia")
                    & (part["family"] == family)
                    & (part["value_model"] == value_model)
                ]
                style.curve(axes[0, j], "sia", points, "tau", **look)
                axes[1, j].plot(points["tau"], points["ratio"], **style.line("sia") | look)
                best = points.loc[points["estimate"].idxmax()]
                colour = look.get("color", style.COLOURS["sia"])
                axes[0, j].plot(
                    best["tau"],
                    best["estimate"],
                    marker="*",
                    markersize=9,
                    color=colour,
                    markeredgecolor="black",
                    zorder=5,
                )
            for axis in axes[:, j]:
                axis.axvline(methods.TAU, color="#999999", linewidth=0.8, linestyle=":")
            axes[0, j].set_title(objective)
            axes[1, j].set_xlabel("threshold τ (nats)")
            axes[1, j].set_ylim(0, 1)
        axes[0, 0].set_ylabel(metric_label(profile, profile.score))
        axes[1, 0].set_ylabel("share of tokens steered")
        named = style.LOSSES | {
            value_model: f"{size} models" for size, value_model in sized.items()
        }
        handles = [
            style.handle("sia", f"{style.FAMILIES[f]}, {named[v]}", **look)
            for (f, v), look in looks.items()
        ]
        caption = (
            f"One threshold for all? SIA at β = 1 under the same τ for every objective. Stars: the best τ of each curve, over all its "
            f"prompts. Dotted: τ = 1, which is reported to serve everywhere. {style.measured(level, profile)}"
        )
        return style.finish(figure, handles, caption, folder, "threshold", stale=stale)


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
