"""One threshold for all: score and share of steered tokens against τ, by model and objective.

Small and large models (first family) are steered by value models of their own size, by the
profile's first loss; β = 1. The best τ of each model and objective, and the one τ that is best over
all objectives and models under values of the same loss, are chosen on the odd prompts and judged on
the even ones, beside τ = 1 there.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import family_label, listed, loss_label, metric_label
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.model_kinds import SIZES, ModelKind, value_kind
from benchmarks.spec.profile import Profile

EVEN, ODD = slice(0, None, 2), slice(1, None, 2)  # prompts


class Threshold(Figure):
    """One threshold for all models and objectives."""

    measured = (*methods.SCORES, "steered", "tokens")

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return SIA at every fixed threshold, for models of every size."""
        requests = []
        for family in profile.families:
            requests.append(methods.base(replicate, family))
            for loss in profile.losses:
                requests += [
                    methods.steered(replicate, family, loss, tau=tau)
                    for tau in profile.sweep.thresholds
                ]
                requests.append(methods.dense(replicate, family, loss))
        for size in profile.further_sizes:
            family, model = profile.families[0], ModelKind("base", size=size)
            values = value_kind(profile.losses[0], size)
            requests.append(methods.base(replicate, family, model))
            requests += [
                methods.steered(replicate, family, values, model=model, tau=tau)
                for tau in profile.sweep.thresholds
            ]
        return FigureCells(requests)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate every τ and, on even prompts, differences to the τ that are best on odd ones.

        τ = 1 against the best of each model and objective (versus "best-tau-of-each") and against
        the one that is best over all of them ("best-tau-of-all"); and the latter against the former
        ("best-tau-of-each-by-best-of-all"). `chosen` is the best τ that was taken.
        """
        metrics = profile.available_metrics(methods.SCORES)
        scores = estimates.method_scores(rows, metrics)
        differences = []
        for loss in profile.losses:
            value_models = [str(value_kind(loss, size)) for size in ("", *SIZES)]
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
        usual = methods.value_models(profile)
        level = estimates.pooled(table)
        level = level[
            (level["versus"] == "")
            & (level["metric"] == profile.score)
            & (level["objective"] != "all")
            & (level["method"] == "sia")
        ]
        looks = {value_model: style.LOSS_LOOKS[value_model] for value_model in usual}
        one_loss = "medium models" if profile.further_sizes else "SIA"
        labels = {value: loss_label(profile, value) or one_loss for value in usual}
        for size in profile.further_sizes:
            value_model = str(value_kind(profile.losses[0], size))
            looks[value_model] = style.Look(style.SIZES[size], "^")
            labels[value_model] = listed(f"{size} models", style.first_loss(profile))
        level = level[level["value_model"].isin(looks)]
        name = metric_label(profile, profile.score)
        shares = level.assign(estimate=level["ratio"], low=np.nan, high=np.nan)
        names = (name, "share steered")
        data = pd.concat([level, shares], keys=names, names=["quantity"]).reset_index("quantity")
        data["panel"] = data["family"].map(family_label) + "\n" + data["quantity"]
        rows = [f"{family_label(family)}\n{q}" for family in profile.families for q in names]
        data = style.ordered(data, panel=rows, objective=OBJECTIVES)
        figure = style.plt.figure(figsize=(style.PAGE, 1.25 * len(rows) + 1.2))
        plot = style.curves(data, "tau", "value_model", looks=looks, row="panel", col="objective")
        plot.share(y="row").label(x="threshold τ (nats)").on(figure).plot()
        style.name_facets(figure, rows, list(OBJECTIVES))
        scores = data[data["quantity"] == name].groupby(["panel", "objective", "value_model"])
        axes = dict(zip(product(rows, OBJECTIVES), figure.axes, strict=True))
        star = {"marker": "*", "markersize": 8, "markeredgecolor": "black"}
        for row in data.loc[scores["estimate"].idxmax()].itertuples():
            axes[row.panel, row.objective].plot(
                row.tau, row.estimate, color=looks[row.value_model].colour, zorder=5, **star
            )
        for axis in figure.axes:
            axis.axvline(methods.TAU, color=style.ZERO, linewidth=0.8, linestyle=":")
        handles = [
            *style.handles(looks, labels),
            style.handle("sia", "best τ", linestyle="none", **star),
            style.handle("base", "τ = 1, as reported", color=style.ZERO, linestyle=":"),
        ]
        sized = "Each model is steered by a value model of its own size. "
        sized = sized if profile.further_sizes else ""
        caption = (
            f"SIA with the same τ for every objective, β = 1. {sized}"
            f"{style.sample_size_note(level, profile)}"
        )
        return style.finish(
            figure, handles, caption, folder, "threshold", stale=stale, legend_columns=3
        )


def mean_scores(swept: list[estimates.MethodScores], score: int) -> np.ndarray:
    """Return the mean of metric number `score` on odd prompts: `(τ, replicates, objectives)`."""
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
        return np.stack([vars(one)[name] for one in even])[units, np.arange(len(units))]

    taus = np.array([one.labels["tau"] for one in swept])[best]
    return replace(
        even[0],
        labels=even[0].labels | {"tau": None, "method": "sia"},
        values=at_best("values"),
        steered_tokens=at_best("steered_tokens"),
        tokens=at_best("tokens"),
        chosen=even[0].chosen | {"chosen": taus},
    )
