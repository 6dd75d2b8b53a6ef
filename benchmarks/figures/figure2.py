"""Figure 2: alignment against the share of steered tokens, beside static baselines.

Settings: values by the paper's loss ("mean") or by the per-token loss ("token") at β = 1, and by
the paper's loss with every method at its own best β, chosen on validation prompts. Beside SIA stand
the junction gate and a Q-head, fitted to the same values. Of the baselines the figure shows those
of STATIC; table 1 has all of them and the vocabulary head, with their intervals. Dots are single
replicates of SIA and dense steering, drawn at the realised ratio of all replicates together.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd

from benchmarks.analysis import estimates, labels
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, CellRequest, FigureCells
from benchmarks.spec.methods import drawn_in
from benchmarks.spec.model_kinds import teacher_of
from benchmarks.spec.profile import Profile

STATIC = drawn_in("figure2")  # baselines; table 1 has the others
GAIN = 0.9  # share of what dense steering gains over the base, that a Q-head is held against
# the Q-head's curve: where the junction gate opens, and at every token
CURVES = {"junction-q-head": "q-head"}


class Figure2(Figure):
    """Figure 2: alignment against the share of steered tokens."""

    measured = (*methods.SCORES, "steered", "tokens")

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return every baseline, and SIA, the random gate and dense steering at β = 1 and tuned."""
        requests = []
        for family in profile.families:
            requests += methods.baselines(profile, replicate, family)
            for loss in profile.losses:
                unit, ratios = (profile, replicate, family, loss), methods.small_ratios(profile)
                requests += methods.curve(*unit)
                requests += random_gates(*unit, profile.sweep.ratios)
                requests += [*methods.divergence_gates(*unit, ratios), *methods.heads(*unit)]
            for loss in methods.tuned_losses(profile):
                unit = (profile, replicate, family, loss)
                requests += methods.curve(*unit, tuned=True)
                requests += methods.predictors_and_heads(*unit, tuned=True)
                requests += random_gates(*unit, profile.sweep.reduced_ratios, tuned=True)
        return FigureCells(requests)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate every method, and the paired differences to dense, random and baselines."""
        metrics = profile.available_metrics(methods.SCORES)
        scores = methods.measured_at(estimates.method_scores(rows, metrics), profile.sweep.beams)
        differences = []
        for family, (value_model, tuned) in product(profile.families, settings(profile)):
            of_family = estimates.select(scores, family=family)
            static = [
                (estimates.method_key(one.labels["method"], one.labels["search"]), one)
                for one in of_family
                if not teacher_of(one.labels["value_model"])
            ]
            setting = [
                one
                for one in estimates.select(of_family, tuned=tuned)
                if teacher_of(one.labels["value_model"]) == value_model
            ]
            dense = estimates.select_one(setting, method="dense")
            sparse = estimates.select(setting, method="sia")
            differences += methods.against_dense(sparse, dense, profile)
            base = estimates.select_one(of_family, method="base", search="")
            differences.append(estimates.difference(dense, base))
            gain = replace(dense, values=GAIN * dense.values + (1 - GAIN) * base.values)
            for one in estimates.select(setting, method=methods.PREDICTING):
                differences += [estimates.difference(one, other) for other in (dense, base)]
                differences.append(estimates.difference(one, gain, versus="dense-gain"))
            for sia in sparse:
                ratio = sia.labels["target_ratio"]
                random, predicted = (
                    estimates.select(setting, method=name, target_ratio=ratio)
                    for name in ("random", "junction")
                )
                differences += [estimates.difference(sia, other) for other in random]
                differences += [estimates.difference(one, sia) for one in predicted]
                rivals = static if ratio in profile.sweep.main_ratios else []
                differences += [
                    estimates.difference(sia, other, versus=name) for name, other in rivals
                ]
        return estimates.summarize(
            [*scores, *differences, *estimates.over_families(differences)], metrics, profile
        )

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw curves of each family and score, and SIA against dense steering, paired."""
        paths = []
        for metric in profile.available_metrics(("judge", "reward")):
            for family in profile.families:
                usual = (profile.score, profile.families[0])
                name = "-".join(["figure2", *(x for x in (metric, family) if x not in usual)])
                data = rows_to_plot(table, profile, metric, family)
                paths += draw(data, profile, stale, folder, name)
        return paths + draw_differences(table, profile, stale, folder)


def random_gates(
    profile: Profile,
    replicate: int,
    family: str,
    loss: str,
    ratios: Sequence[float],
    tuned: bool = False,
) -> list[CellRequest]:
    """Return steering by the random gate at these shares of the tokens."""
    return [
        methods.steered(replicate, family, loss, gate="random", ratio=ratio, tuned=tuned)
        for ratio in ratios
    ]


def settings(profile: Profile) -> dict[tuple[str, bool], str]:
    """Return the names of the settings that the profile measures, by value model and tuning."""
    values = [value for value in labels.LOSSES if value in methods.value_models(profile)]
    tuned_values = [methods.VALUES[loss] for loss in methods.tuned_losses(profile)]
    return {
        (value, tuned): labels.listed(
            labels.loss_label(profile, value), "best β" if tuned else "β = 1"
        )
        for value, tuned in (*((v, False) for v in values), *((v, True) for v in tuned_values))
    }


def rows_to_plot(table: pd.DataFrame, profile: Profile, metric: str, family: str) -> pd.DataFrame:
    """Return the rows that one picture shows; `setting` is empty for static baselines.

    Rows of single replicates, which have no realised ratio, stand at that of all together.
    """
    level = table[
        (table["versus"] == "")
        & (table["objective"] != "all")
        & (table["metric"] == metric)
        & (table["family"] == family)
    ]
    places = zip(map(teacher_of, level["value_model"]), level["tuned"].eq(True), strict=True)
    level = level.assign(
        method=[*map(estimates.method_key, level["method"].replace(CURVES), level["search"])],
        setting=[settings(profile).get(place, "") for place in places],
    )
    drawn = (level["setting"] != "") & (level["method"] != "vocabulary-value")
    level = level[drawn | level["method"].isin(STATIC)]
    unit = ["method", "setting", "objective", "target_ratio"]
    return level.assign(ratio=level.groupby(unit)["ratio"].transform("first"))


def draw_differences(
    table: pd.DataFrame, profile: Profile, stale: bool, folder: Path
) -> list[Path]:
    """Draw figure2-paired: SIA − dense against the share; rows are scores, columns settings."""
    metrics, names = profile.available_metrics(estimates.SCORES), settings(profile)
    rows = estimates.differences_from_dense(table, profile, ["sia"])
    places = zip(rows["value_model"], rows["tuned"].eq(True), strict=True)
    rows = rows.assign(setting=[names[place] for place in places])
    rows = style.ordered(rows, metric=metrics, setting=names.values())
    pooled, single = (rows[(rows["replicate"] == "all") == whole] for whole in (True, False))
    figure = style.plt.figure(figsize=(style.PAGE, 1.35 * len(metrics) + 1.0))
    (
        style.curves(pooled, "target_ratio", row="metric", col="setting")
        .add(style.so.Dot(pointsize=2, alpha=0.6), data=single.reset_index(), x="target_ratio",
             y="estimate", color="method", linestyle=None, row="metric", col="setting",
             legend=False)
        .share(y="col")
        .label(x="target share steered")
        .on(figure)
        .plot()
    )  # fmt: skip
    for axis in figure.axes:
        axis.axhline(0, color=style.ZERO, linewidth=0.8)
        axis.axhline(-estimates.TOLERANCE, color=style.ZERO, linewidth=0.8, linestyle=":")
    drawn = list(dict.fromkeys(pooled["setting"]))
    style.name_facets(figure, [labels.metric_label(profile, one) for one in metrics], drawn)
    figure.supylabel("SIA − dense (SD of base responses)")
    dots = "Dots: single replicates. " if len(single) else ""
    caption = (
        "Paired difference of SIA and dense steering, "
        f"{labels.family_label(estimates.pooled_family(profile))}; dotted: "
        f"margin of reaching dense, −{estimates.TOLERANCE:g}. {dots}"
        f"{style.sample_size_note(pooled, profile)}"
    )
    return style.finish(figure, [], caption, folder, "figure2-paired", stale=stale)


def draw(data: pd.DataFrame, profile: Profile, stale: bool, folder: Path, name: str) -> list[Path]:
    """Draw one picture from the rows that `rows_to_plot` returns."""
    pooled, single = (data[(data["replicate"] == "all") == whole] for whole in (True, False))
    swept = style.ordered(pooled[pooled["setting"] != ""], setting=settings(profile).values())
    dense = swept[swept["method"] == "dense"]
    gates = [name for name in ("random", "sia", "junction") if name in set(swept["method"])]
    right_ends = [
        dense[dense["setting"].isin(swept.loc[swept["method"] == gate, "setting"])].assign(
            method=gate
        )
        for gate in gates
    ]
    lines = pd.concat([swept[swept["method"] != "dense"], *right_ends, dense], ignore_index=True)
    drawn = list(dict.fromkeys(swept["setting"]))
    figure = style.plt.figure(figsize=(style.PAGE, 1.3 * len(drawn) + 1.1))
    static = pooled[pooled["setting"] == ""].drop(columns="setting")
    dots = single[single["method"].isin(["sia", "dense"])].reset_index()
    (
        style.curves(lines, "ratio", static=static, row="setting", col="objective")
        .add(style.so.Dot(pointsize=2, alpha=0.6), data=dots, x="ratio", y="estimate",
             color="method", linestyle=None, row="setting", col="objective", legend=False)
        .share(y="col")
        .limit(x=(0, 1.03))
        .label(x="share of tokens steered")
        .on(figure)
        .plot()
    )  # fmt: skip
    style.name_facets(figure, drawn, list(OBJECTIVES))
    metric, family = data["metric"].iloc[0], data["family"].iloc[0]
    figure.supylabel(labels.metric_label(profile, metric))
    methods_drawn = set(data["method"])
    shown = ("sia", "random", "dense", "junction", "q-head")
    handles = [style.handle(method) for method in shown if method in methods_drawn]
    handles += [
        style.handle(method, labels.method_name(profile, method))
        for method in STATIC
        if method in methods_drawn
    ]
    if len(dots):
        handles.append(
            style.handle("sia", "one replicate", linestyle="none", marker="o", markersize=2)
        )
    head = "Q-head: where the junction gate opens, and at every token. "
    head = head if "q-head" in methods_drawn else ""
    searched = f"Best of N: N = {profile.sweep.beams}. " if "best-of-n" in methods_drawn else ""
    caption = (
        f"{labels.family_label(family)}: curves end in dense steering. {head}{searched}Intervals "
        "of the baselines: table 1. "
        f"{style.sample_size_note(data, profile)}"
    )
    return style.finish(figure, handles, caption, folder, name, stale=stale, legend_columns=4)
