"""Does one threshold serve? Score and share of steered tokens against τ for every model and objective; β = 1. Small and large models (first
family) are steered by value models of their own size, by the profile's first loss.

The best τ of each model and objective, and the one τ that is best over all objectives and models under values of the same loss, are chosen
on the odd prompts and judged on the even ones, beside τ = 1 there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.model_kinds import ModelKind, value_kind
from benchmarks.spec.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "kl")
MEASURED = (*METRICS, "steered", "tokens")
SIZES = ("small", "large")


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
        """Every τ, and paired on the even prompts: τ = 1 against the τ that is best on the odd ones, of each model and objective, and against
        the one that is best over all of them (versus "best τ of each", "best τ of all"); and the latter against the former."""
        metrics = profile.available_metrics(METRICS)
        found = list(estimates.entries(rows, metrics).values())
        differences = []
        for loss in profile.losses:
            models = [
                estimates.select(found, family=family, value_model=value_model, method="sia")
                for family in profile.families
                for value_model in (
                    methods.VALUES[loss],
                    *(f"{methods.VALUES[loss]}-{size}" for size in SIZES),
                )
            ]
            models = [swept for swept in models if swept]
            scores = [scored(swept, metrics.index(profile.score)) for swept in models]
            best_of_all = np.mean(scores, axis=(0, 3)).argmax(0)  # (replicates,)
            for swept, of_model in zip(models, scores, strict=True):
                usual = estimates.the(swept, tau=methods.TAU)
                each, one = (
                    picked(swept, of_model.argmax(0)),
                    picked(swept, np.repeat(best_of_all[:, None], of_model.shape[2], axis=1)),
                )
                for versus, best in (("best τ of each", each), ("best τ of all", one)):
                    differences.append(
                        estimates.difference(
                            halved(usual, 0), best, versus=versus, chosen=best.labels["chosen"]
                        )
                    )
                differences.append(
                    estimates.difference(
                        one,
                        each,
                        versus="best τ of each, by the best of all",
                        chosen=one.labels["chosen"],
                    )
                )
        return estimates.summarize(
            [*found, *differences, *estimates.over_families(differences)],
            metrics,
            profile,
            ["chosen"],
        )

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Columns: objectives; top: score against τ; bottom: share of steered tokens. A line for each family and loss."""
        from benchmarks.figures import style

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
        axes[0, 0].set_ylabel(estimates.label(profile, profile.score))
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


def halved(entry: estimates.Entry, parity: int) -> estimates.Entry:
    """The entry on its even or odd prompts."""
    replicates, objectives, prompts, seeds = entry.shape
    shape = (replicates, objectives, len(range(parity, prompts, 2)), seeds)

    def cut(x: np.ndarray) -> np.ndarray:
        return x.reshape(*entry.shape, *x.shape[1:])[:, :, parity::2].reshape(
            np.prod(shape), *x.shape[1:]
        )

    return estimates.Entry(
        entry.labels, cut(entry.values), cut(entry.steered), cut(entry.tokens), shape
    )


def scored(swept: list[estimates.Entry], score: int) -> np.ndarray:
    """What each τ scores on the odd prompts: `(τ, replicates, objectives)`. score: the metric's number."""
    return np.stack(
        [
            e.values[:, score].reshape(e.shape).mean((2, 3))
            for e in (halved(entry, 1) for entry in swept)
        ]
    )


def picked(swept: list[estimates.Entry], best: np.ndarray) -> estimates.Entry:
    """On the even prompts, what the τ of these numbers give, `(replicates, objectives)`."""
    even = [halved(entry, 0) for entry in swept]

    def pick(name: str) -> np.ndarray:
        many = np.stack([getattr(e, name).reshape(*e.shape, -1) for e in even])
        cells = np.stack(
            [
                np.stack([many[best[r, o], r, o] for o in range(best.shape[1])])
                for r in range(best.shape[0])
            ]
        )
        return cells.reshape(len(getattr(even[0], name)), -1)

    taus = ";".join(
        ",".join(f"{swept[i].labels['tau']:g}" for i in replicate) for replicate in best
    )
    labels = even[0].labels | {"tau": None, "method": "sia", "chosen": taus}
    return estimates.Entry(
        labels, pick("values"), pick("steered")[:, 0], pick("tokens")[:, 0], even[0].shape
    )
