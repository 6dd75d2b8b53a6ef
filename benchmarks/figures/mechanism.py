"""Why sparsity helps where it does: what changes when one thing is changed at a time.

floor: candidates need some base probability on steered steps. inverted: steering where the base is sure. early: value models that have
seen few samples once. worlds: base models that went on to learn other corpora (first family; "usual": more of the same), values
learned from their samples. β = 1 unless said.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import LOSSES, family_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.methods import label_of
from benchmarks.spec.model_kinds import ModelKind, value_kind
from benchmarks.spec.profile import LabProfile

METRICS = ("judge", "content", "fluency_errors", "kl")
MEASURED = (*METRICS, "steered", "tokens")
VARIANT_COLOUR = "#8C564B"  # of what differs in one thing
LINES = {"value-token": (), "value-mean": (4, 2)}  # dashes of each value model
MARKERS = {"value-token": "o", "value-mean": "s"}


class Mechanism(Figure):
    """Why sparse steering works where it does."""

    title = "Why sparse steering works where it does"
    needs_lab = True
    measured = MEASURED

    def cells(self, profile: LabProfile, replicate: int) -> FigureCells:
        sweep, first = profile.sweep, profile.families[0]
        strong = max(sweep.tuning)
        wanted = []
        for family in profile.families:
            wanted.append(methods.base(replicate, family))
            for loss in methods.VALUES:
                wanted += methods.curve(profile, replicate, family, loss, sweep.main_ratios)
                wanted += methods.curve(
                    profile, replicate, family, loss, sweep.main_ratios, floor=sweep.floor
                )
                wanted += [
                    methods.steered(replicate, family, loss, gate="inverted-entropy", ratio=r)
                    for r in sweep.main_ratios
                ]
                wanted += [
                    methods.steered(replicate, family, loss, gate="random", ratio=r)
                    for r in sweep.main_ratios
                ]
        for loss in methods.VALUES:
            for floor in (0.0, sweep.floor):
                wanted += methods.curve(
                    profile,
                    replicate,
                    first,
                    loss,
                    sweep.reduced_ratios[:1],
                    beta=strong,
                    floor=floor,
                )
            early = value_kind(loss, undertrained=True)
            wanted += methods.curve(profile, replicate, first, early, sweep.main_ratios)
        for world in profile.worlds:
            model = ModelKind("base", world=world.name)
            wanted.append(methods.base(replicate, first, model))
            for loss in methods.VALUES:
                values = value_kind(loss, world=world.name)
                wanted += [
                    methods.steered(replicate, first, values, gate=gate, ratio=ratio, model=model)
                    for gate in ("entropy", "random")
                    for ratio in sweep.reduced_ratios
                ]
                wanted.append(methods.dense(replicate, first, values, model=model))
        return FigureCells(wanted)

    def summarize(self, rows: pd.DataFrame, profile: LabProfile) -> pd.DataFrame:
        """Every cell, and paired within the same model, values, β and floor: SIA, and the mean of SIA over the claimed ratios, against dense;
        SIA against the inverted and the random gate; steered against base; and with a floor against without (versus "no floor")."""
        found = estimates.method_scores(rows, METRICS)
        differences = []
        for entry in found:
            labels = entry.labels
            if labels["gate"] == "never":
                continue
            setting = {k: labels[k] for k in ("family", "model", "value_model", "beta", "floor")}
            base = estimates.select_one(
                found, family=labels["family"], model=labels["model"], gate="never"
            )
            differences.append(estimates.difference(entry, base, versus="base"))
            if labels["method"] == "sia":
                others = estimates.select(
                    found,
                    **setting,
                    method=("inverted-entropy", "random"),
                    target_ratio=labels["target_ratio"],
                )
                differences += [
                    estimates.difference(entry, other)
                    for other in [estimates.select_one(found, **setting, method="dense"), *others]
                ]
            if labels["method"] == "dense":
                claimed = estimates.select(
                    found, **setting, method="sia", target_ratio=profile.sweep.main_ratios
                )
                if len(claimed) == len(profile.sweep.main_ratios):
                    differences.append(
                        estimates.difference(
                            estimates.mean_of(claimed, method="sia-claimed"), entry
                        )
                    )
            if labels["floor"]:
                without = estimates.select_one(
                    found,
                    **(setting | {"floor": 0.0}),
                    method=labels["method"],
                    target_ratio=labels["target_ratio"],
                )
                differences.append(estimates.difference(entry, without, versus="no-floor"))
        return estimates.summarize(
            [*found, *differences, *estimates.over_families(differences)], METRICS, profile
        )

    def plot(
        self, table: pd.DataFrame, profile: LabProfile, stale: bool, folder: Path
    ) -> list[Path]:
        """Draw differences that isolate one cause each, over all objectives: a panel for each."""
        from benchmarks.figures import style

        table = estimates.pooled(table)
        table = table[(table["objective"] == "all") & table["beta"].eq(1)]
        figure, axes = style.plt.subplots(3, 2, figsize=(style.PAGE, 6.3))
        panels = contrasts(table, profile)
        for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
            axis.axhline(0, color=style.ZERO, linewidth=0.8)
            for label, (colour, rows) in curves.items():
                rows = rows[rows["value_model"].isin(LINES)]
                looks = {
                    name: style.Look(colour, MARKERS[name], dash) for name, dash in LINES.items()
                }
                style.curves(rows, "target_ratio", "value_model", looks=looks).on(axis).plot()
                axis.plot([], [], color=colour, label=label)
            axis.margins(y=0.3)  # room for the legend
            axis.legend(frameon=False, fontsize=style.SMALL)
            axis.set(title=title, xlabel="share of tokens steered (target)", ylabel="")
        few = profile.sweep.reduced_ratios[0]
        for axis, versus in zip(axes[2], ("random", "dense"), strict=True):
            axis.axhline(0, color=style.ZERO, linewidth=0.8)
            rows = in_worlds(table, profile, versus)
            points = style.so.Plot(rows, x="world", y="estimate", color="loss", marker="loss")
            (
                points.add(
                    style.so.Range(), style.so.Dodge(), ymin="low", ymax="high", legend=False
                )
                .add(style.so.Dot(pointsize=4), style.so.Dodge(), legend=False)
                .scale(color=dict.fromkeys(LINES, style.COLOURS["sia"]), marker=MARKERS)
                .label(x="world", y="", title=f"SIA at {few:.0%} − {versus}, by world")
                .on(axis)
                .plot()
            )
        for axis in axes[:, 0]:
            axis.set_ylabel("difference (judge points)")
        handles = [
            style.handle(
                "sia", LOSSES[name], marker=MARKERS[name], linestyle=(0, dash) if dash else "-"
            )
            for name, dash in LINES.items()
        ]
        caption = (
            "Paired differences, β = 1, all objectives; gates, floor and fluency: both families, the "
            f"rest {family_label(profile.families[0])}. {style.sample_size_note(table, profile)}"
        )
        return style.finish(figure, handles, caption, folder, "mechanism", stale=stale)


def contrasts(
    table: pd.DataFrame, profile: LabProfile
) -> dict[str, dict[str, tuple[str, pd.DataFrame]]]:
    """Return, by the title of a panel, its curves: label, colour and rows."""
    from benchmarks.figures import style

    sia = table[(table["method"] == "sia") & (table["metric"] == "judge")]
    pooled = sia[(sia["family"] == "all") & (sia["model"] == "base")]
    gates = pooled[pooled["floor"] == 0]
    sparse = pooled[pooled["versus"] == "dense"]
    usual = sparse[sparse["floor"] == 0]
    content = table[
        (table["method"] == "sia")
        & (table["metric"] == "content")
        & (table["family"] == "all")
        & (table["model"] == "base")
        & (table["versus"] == "dense")
        & (table["floor"] == 0)
    ]
    first = sia[
        (sia["family"] == profile.families[0])
        & (sia["model"] == "base")
        & (sia["versus"] == "dense")
        & (sia["floor"] == 0)
    ]
    early = first[first["value_model"].str.endswith("-early")]
    early = early.assign(value_model=early["value_model"].str.removesuffix("-early"))
    blue, brown = style.COLOURS["sia"], VARIANT_COLOUR
    return {
        "entropy gate − another gate": {
            f"− {label_of(name)}": (style.COLOURS[name], gates[gates["versus"] == name])
            for name in ("inverted-entropy", "random")
        },
        "SIA − dense: floor on base probabilities": {
            "without floor": (blue, usual),
            f"floor {profile.sweep.floor:g}": (brown, sparse[sparse["floor"] > 0]),
        },
        "SIA − dense: fluency": {
            "judge score": (blue, usual),
            "judge score without fluency": (brown, content),
        },
        "SIA − dense: training of the values": {
            "full": (blue, first[first["value_model"].isin(LINES)]),
            f"{profile.training.undertrained_fraction:.0%} of the samples, once": (brown, early),
        },
    }


def in_worlds(table: pd.DataFrame, profile: LabProfile, versus: str) -> pd.DataFrame:
    """Return SIA at the smallest ratio against `versus`, by world (one word a line) and loss."""
    rows = table[
        (table["metric"] == "judge")
        & (table["family"] == profile.families[0])
        & (table["method"] == "sia")
        & (table["versus"] == versus)
        & (table["target_ratio"] == profile.sweep.reduced_ratios[0])
        & (table["floor"] == 0)
        & table["model"].str.startswith("base@")
    ]
    world = rows["model"].str.removeprefix("base@")
    loss = rows["value_model"].str.partition("@")[0]
    rows = rows.assign(world=world, loss=loss)[loss.isin(LINES)]
    order = [name.name for name in profile.worlds]
    rows = rows.sort_values("world", key=lambda column: column.map(order.index))
    return rows.assign(world=rows["world"].str.replace("-", "\n"))
