"""Figure 1: where to steer, that is gates at matched shares of steered tokens, β = 1.

Beside the paper's six gates stand the lowest entropies, and at small shares the junction gate and
its oracle.

figure1 shows the score under each gate, for both losses of the value model. Of the gates it draws
the intervals of the entropy and the random gate alone; the table has all. figure1-paired shows the
paired difference of these two.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates, labels
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import DIVERGENCE, DIVERGENCE_GATES, OBJECTIVES, FigureCells
from benchmarks.spec.profile import Profile

EVERYWHERE = ("entropy", "random")  # gates at every share of the tokens; others at some
GATES = (*style.GATES, *DIVERGENCE_GATES)
COLUMNS = (*OBJECTIVES, "all")


class Figure1(Figure):
    """Figure 1: where to steer."""

    measured = (*methods.SCORES, "steered", "tokens")

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return the base, dense steering, and every gate, most at the reduced ratios alone."""
        requests = []
        for family in profile.families:
            requests.append(methods.base(replicate, family))
            for loss in profile.losses:
                for gate in dict.fromkeys([*EVERYWHERE, *style.GATES]):
                    sweep, everywhere = profile.sweep, gate in EVERYWHERE
                    requests += [
                        methods.steered(replicate, family, loss, gate=gate, ratio=ratio)
                        for ratio in (sweep.ratios if everywhere else sweep.reduced_ratios)
                    ]
                unit = (profile, replicate, family, loss)
                requests += methods.divergence_gates(*unit, methods.small_ratios(profile))
                requests += methods.divergence_gates(
                    *unit, profile.sweep.reduced_ratios, (DIVERGENCE,)
                )
                requests.append(methods.dense(replicate, family, loss))
        return FigureCells(requests)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate every gate, and the paired difference of the entropy gate and each other one."""
        metrics = profile.available_metrics(methods.SCORES)
        scores = estimates.method_scores(rows, metrics)
        others = estimates.select(scores, method=GATES)
        setting = ("family", "value_model", "target_ratio")
        differences = [
            estimates.difference(entropy, other)
            for entropy in estimates.select(scores, method="sia")
            for other in others
            if all(entropy.labels[name] == other.labels[name] for name in setting)
        ]
        return estimates.summarize(
            [*scores, *differences, *estimates.over_families(differences)], metrics, profile
        )

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the score of every gate, and the paired difference of entropy and random gate."""
        table = estimates.pooled(table[table["metric"] == profile.score])
        table = style.ordered(table, objective=COLUMNS)
        return [
            *draw_gates(table[table["versus"] == ""], profile, stale, folder),
            *draw_differences(table[table["versus"] == "random"], profile, stale, folder),
        ]


def draw_gates(level: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
    """Draw figure1: rows are families and losses, columns objectives; curves end in dense."""
    measured = set(level["method"])
    gates = ["sia", *(gate for gate in GATES if gate in measured)]
    rows = {
        (family, value_model): labels.listed(
            labels.family_label(family), labels.loss_label(profile, value_model)
        )
        for family in profile.families
        for value_model in methods.losses_in_order(profile)
    }
    curves, static = [], []
    for (family, value_model), setting in rows.items():
        of_family = level[level["family"] == family].assign(setting=setting)
        static.append(of_family[of_family["method"] == "base"])
        of_loss = of_family[of_family["value_model"] == value_model]
        for gate in gates:
            points = of_loss[of_loss["method"].isin([gate, "dense"])].assign(method=gate)
            shown = ["low", "high"] if gate not in ("sia", "random") else []
            curves.append(points.assign(**dict.fromkeys(shown, np.nan)))
    figure = style.plt.figure(figsize=(style.PAGE, 1.3 * len(rows) + 1.1))
    (
        style.curves(
            pd.concat(curves, ignore_index=True),
            "ratio",
            static=pd.concat(static, ignore_index=True),
            row="setting",
            col="objective",
        )
        .share(y="row")
        .label(x="share of tokens steered")
        .on(figure)
        .plot()
    )
    style.name_facets(figure, list(rows.values()), list(map(labels.objective_label, COLUMNS)))
    figure.supylabel(labels.metric_label(profile, profile.score))
    caption = (
        "Gates at equal shares of steered tokens, β = 1; curves end in dense steering. "
        f"{style.sample_size_note(level, profile, 'Bands (entropy and random gate only)')}"
    )
    handles = [style.handle(method) for method in (*gates, "base")]
    return style.finish(figure, handles, caption, folder, "figure1", stale=stale, legend_columns=4)


def draw_differences(
    differences: pd.DataFrame, profile: Profile, stale: bool, folder: Path
) -> list[Path]:
    """Draw figure1-paired: the entropy gate minus the random one.

    Rows are losses, columns objectives, and lines families.
    """
    families = list(dict.fromkeys([*profile.families, estimates.pooled_family(profile)]))
    looks = dict(zip(families, style.FAMILY_LOOKS, strict=False))
    losses = methods.losses_in_order(profile)
    curves = differences[differences["family"].isin(families)]
    figure = style.plt.figure(figsize=(style.PAGE, 1.35 * len(losses) + 1.0))
    (
        style.curves(
            style.ordered(curves, value_model=losses),
            "target_ratio",
            "family",
            looks=looks,
            row="value_model",
            col="objective",
        )
        .label(x="target share steered")
        .on(figure)
        .plot()
    )
    for axis in figure.axes:
        axis.axhline(0, color=style.ZERO, linewidth=0.8)
    names = [labels.loss_label(profile, value_model) for value_model in losses]
    style.name_facets(figure, names, list(map(labels.objective_label, COLUMNS)))
    figure.supylabel(f"entropy − random gate\n({labels.metric_label(profile, profile.score)})")
    caption = (
        "Paired difference of the entropy gate and the random gate at the same share of steered "
        f"tokens, β = 1. {style.sample_size_note(differences, profile)}"
    )
    handles = style.handles(looks, {name: labels.family_label(name) for name in families})
    return style.finish(figure, handles, caption, folder, "figure1-paired", stale=stale)
