"""Why sparsity helps where it does: comparisons that change one thing at a time.

floor: candidates need some base probability on steered steps. inverted: steering where the base is
sure. early: value models that have seen few samples once. worlds: base models that went on to learn
other corpora (first family; "usual": more of the same), values learned from their samples. β = 1
unless said otherwise.
"""

from itertools import product
from pathlib import Path

import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import LOSSES, family_label
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.methods import label_of
from benchmarks.spec.model_kinds import BASE, ModelKind, value_kind
from benchmarks.spec.profile import LabProfile

METRICS = ("judge", "content", "fluency_errors", "kl")
VARIANT_COLOUR = "#8C564B"  # of what differs in one thing


class Mechanism(Figure):
    """Why sparse steering works where it does."""

    needs_lab = True
    measured = (*METRICS, "steered", "tokens")

    def cells(self, profile: LabProfile, replicate: int) -> FigureCells:
        """Return SIA and what it is compared with: gates, floors, values and worlds."""
        sweep, first, requests = profile.sweep, profile.families[0], []
        ratios = sweep.main_ratios
        for family in profile.families:
            requests.append(methods.base(replicate, family))
            for loss in methods.VALUES:
                requests += methods.curve(profile, replicate, family, loss, ratios)
                requests += methods.curve(
                    profile, replicate, family, loss, ratios, floor=sweep.floor
                )
                requests += [
                    methods.steered(replicate, family, loss, gate=gate, ratio=ratio)
                    for gate, ratio in product(("inverted-entropy", "random"), ratios)
                ]
        unit = (profile, replicate, first)
        for loss in methods.VALUES:
            for floor in (0.0, sweep.floor):
                requests += methods.curve(
                    *unit, loss, sweep.reduced_ratios[:1], beta=max(sweep.tuning), floor=floor
                )
            early = value_kind(loss, undertrained=True)
            requests += methods.curve(*unit, early, ratios)
        for world in profile.worlds:
            model = ModelKind("base", world=world.name)
            requests.append(methods.base(replicate, first, model))
            for loss in methods.VALUES:
                values = value_kind(loss, world=world.name)
                requests += [
                    methods.steered(replicate, first, values, gate=gate, ratio=ratio, model=model)
                    for gate, ratio in product(("entropy", "random"), sweep.reduced_ratios)
                ]
                requests.append(methods.dense(replicate, first, values, model=model))
        return FigureCells(requests)

    def summarize(self, rows: pd.DataFrame, profile: LabProfile) -> pd.DataFrame:
        """Estimate every cell, and paired differences within the same model, values, β and floor.

        SIA, and its mean over the claimed ratios, against dense; SIA against the inverted and the
        random gate; steered against base; and with a floor against without (versus "no-floor").
        """
        scores = estimates.method_scores(rows, METRICS)
        differences = []
        for one in scores:
            if one.labels["gate"] == "never":
                continue
            unit = {k: one.labels[k] for k in ("family", "model")}
            base = estimates.select_one(scores, **unit, gate="never")
            differences.append(estimates.difference(one, base, versus="base"))
            setting = unit | {k: one.labels[k] for k in ("value_model", "beta", "floor")}
            same = {k: one.labels[k] for k in ("method", "target_ratio")}
            alike = estimates.select(scores, **setting)
            if one.labels["method"] == "sia":
                gates = ("dense", "inverted-entropy", "random")
                differences += [
                    estimates.difference(one, other)
                    for other in estimates.select(alike, method=gates)
                    if other.labels["target_ratio"] in (same["target_ratio"], 1)
                ]
            if one.labels["method"] == "dense":
                sparse = estimates.select(alike, method="sia")
                differences += [
                    estimates.difference(mean, one)
                    for mean in methods.claimed_mean(sparse, profile)
                ]
            if one.labels["floor"]:
                without = estimates.select_one(scores, **(setting | same | {"floor": 0.0}))
                differences.append(estimates.difference(one, without, versus="no-floor"))
        return estimates.summarize(
            [*scores, *differences, *estimates.over_families(differences)], METRICS, profile
        )

    def plot(
        self, table: pd.DataFrame, profile: LabProfile, stale: bool, folder: Path
    ) -> list[Path]:
        """Draw differences that isolate one cause each, over all objectives: a panel for each."""
        table = estimates.pooled(table)
        table = table[(table["objective"] == "all") & table["beta"].eq(1)]
        figure, axes = style.plt.subplots(3, 2, figsize=(style.PAGE, 6.3))
        for axis, (title, curves) in zip(
            axes.flat, contrasts(table, profile).items(), strict=False
        ):
            for label, (colour, rows) in curves.items():
                looks = {n: look._replace(colour=colour) for n, look in style.LOSS_LOOKS.items()}
                rows = rows[rows["value_model"].isin(looks)]
                style.curves(rows, "target_ratio", "value_model", looks=looks).on(axis).plot()
                axis.plot([], [], color=colour, label=label)
            axis.margins(y=0.3)  # room for the legend
            axis.legend(frameon=False, fontsize=style.SMALL)
            axis.set(title=title, xlabel="share of tokens steered (target)", ylabel="")
        few = profile.sweep.reduced_ratios[0]
        for axis, versus in zip(axes[2], ("random", "dense"), strict=True):
            points = style.so.Plot(
                in_worlds(table, profile, versus), x="world", y="estimate", color="loss",
                marker="loss",
            )  # fmt: skip
            dodge, looks = style.so.Dodge(), style.LOSS_LOOKS
            (
                points.add(style.so.Range(), dodge, ymin="low", ymax="high", legend=False)
                .add(style.so.Dot(pointsize=4), dodge, legend=False)
                .scale(
                    color={name: look.colour for name, look in looks.items()},
                    marker={name: look.marker for name, look in looks.items()},
                )
                .label(x="world", y="", title=f"SIA at {few:.0%} − {versus}, by world")
                .on(axis)
                .plot()
            )
        for axis in axes.flat:
            axis.axhline(0, color=style.ZERO, linewidth=0.8)
        for axis in axes[:, 0]:
            axis.set_ylabel("difference (judge points)")
        handles = style.handles(style.LOSS_LOOKS, {n: LOSSES[n] for n in style.LOSS_LOOKS})
        caption = (
            "Paired differences, β = 1, all objectives; gates, floor and fluency: both families; "
            f"other panels: {family_label(profile.families[0])} only. "
            f"{style.sample_size_note(table, profile)}"
        )
        return style.finish(figure, handles, caption, folder, "mechanism", stale=stale)


def contrasts(
    table: pd.DataFrame, profile: LabProfile
) -> dict[str, dict[str, tuple[str, pd.DataFrame]]]:
    """Return, by the title of a panel, its curves: label, colour and rows."""
    sia = table[(table["method"] == "sia") & (table["model"] == str(BASE))]
    keys = ["metric", "family", "versus", "floor"]

    def rows_of(*values: object) -> pd.DataFrame:
        return sia[sia[keys].eq(list(values)).all(axis=1)]

    usual = rows_of("judge", "all", "dense", 0.0)
    first = rows_of("judge", profile.families[0], "dense", 0.0)
    full_training = {
        str(value_kind(loss, undertrained=True)): str(value_kind(loss)) for loss in methods.VALUES
    }
    early = first.assign(value_model=first["value_model"].map(full_training)).dropna(
        subset="value_model"
    )
    blue, brown = style.COLOURS["sia"], VARIANT_COLOUR
    return {
        "entropy gate − another gate": {
            f"− {label_of(name)}": (style.COLOURS[name], rows_of("judge", "all", name, 0.0))
            for name in ("inverted-entropy", "random")
        },
        "SIA − dense: floor on base probabilities": {
            "without floor": (blue, usual),
            f"floor {profile.sweep.floor:g}": (
                brown,
                rows_of("judge", "all", "dense", profile.sweep.floor),
            ),
        },
        "SIA − dense: fluency": {
            "judge score": (blue, usual),
            "judge score without fluency": (brown, rows_of("content", "all", "dense", 0.0)),
        },
        "SIA − dense: training of the values": {
            "full": (blue, first),
            f"{profile.training.undertrained_fraction:.0%} of the samples, once": (brown, early),
        },
    }


def in_worlds(table: pd.DataFrame, profile: LabProfile, versus: str) -> pd.DataFrame:
    """Return SIA at the smallest ratio against `versus`, by world (one word a line) and loss."""
    worlds = {str(ModelKind("base", world=world.name)): world.name for world in profile.worlds}
    losses = {
        str(value_kind(loss, world=world)): str(value_kind(loss))
        for loss, world in product(methods.VALUES, worlds.values())
    }
    rows = table[
        (table["metric"] == "judge")
        & (table["family"] == profile.families[0])
        & (table["method"] == "sia")
        & (table["versus"] == versus)
        & (table["target_ratio"] == profile.sweep.reduced_ratios[0])
        & (table["floor"] == 0)
        & table["model"].isin(worlds)
    ]
    rows = rows.assign(world=rows["model"].map(worlds), loss=rows["value_model"].map(losses))
    rows = style.ordered(rows, world=worlds.values())
    return rows.assign(world=rows["world"].str.replace("-", "\n"))
