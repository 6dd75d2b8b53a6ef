"""Why sparsity helps where it does: what changes when one thing is changed at a time.

floor: candidates need some base probability on steered steps. inverted: steering where the base is sure. early: value models that have
seen few samples once. worlds: base models that went on to learn other corpora (first family; "usual": more of the same), values
learned from their samples. β = 1 unless said.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.model_kinds import ModelKind, value_kind
from benchmarks.spec.profile import LabProfile

METRICS = ("judge", "content", "fluency_errors", "kl")
MEASURED = (*METRICS, "steered", "tokens")


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

    def plot(self, table: pd.DataFrame, profile: LabProfile, stale: bool, folder: Path) -> list[Path]:
        """Differences that isolate one cause each, all objectives: a panel for each question."""
        from benchmarks.figures import style

        table = estimates.pooled(table)

        family, few, sweep = profile.families[0], profile.sweep.reduced_ratios, profile.sweep
        part = table[(table["objective"] == "all") & (table["versus"] != "")]
        judge, content = part[part["metric"] == "judge"], part[part["metric"] == "content"]
        figure, places = style.grid(3, 2, 3.8, 2.2)
        axes = places.reshape(2, 3)
        looks = {"value-token": {}, "value-mean": {"linestyle": "--", "markerfacecolor": "white"}}
        usual = (judge["model"] == "base") & (judge["family"] == "all")

        def against(axis, rows: pd.DataFrame, method: str, **look) -> None:
            for value_model, style_of in looks.items():
                style.curve(
                    axis,
                    method,
                    rows[rows["value_model"] == value_model],
                    "target_ratio",
                    **style_of | look,
                )
            axis.axhline(0, color="#999999", linewidth=0.8)
            axis.set_xlabel("share of tokens steered (target)")

        for method in ("inverted-entropy", "random"):
            against(
                axes[0, 0],
                judge[
                    usual
                    & (judge["method"] == "sia")
                    & (judge["versus"] == method)
                    & (judge["floor"] == 0)
                ],
                method,
            )
        axes[0, 0].set_title("entropy gate − another gate", loc="left")
        sparse = (judge["method"] == "sia") & (judge["versus"] == "dense") & usual
        against(axes[0, 1], judge[sparse & (judge["floor"] == 0)], "sia")
        against(axes[0, 1], judge[sparse & (judge["floor"] > 0)], "sia", color=style.CHANGED)
        axes[0, 1].set_title("SIA − dense: with a floor (brown)", loc="left")
        without = (
            (content["method"] == "sia")
            & (content["versus"] == "dense")
            & (content["model"] == "base")
            & (content["family"] == "all")
        )
        against(axes[0, 2], judge[sparse & (judge["floor"] == 0)], "sia")
        against(axes[0, 2], content[without & (content["floor"] == 0)], "sia", color=style.CHANGED)
        axes[0, 2].set_title("SIA − dense: without fluency (brown)", loc="left")

        first = judge[judge["family"] == family]
        early = first[
            first["value_model"].str.endswith("-early", na=False)
            & (first["method"] == "sia")
            & (first["versus"] == "dense")
        ]
        early = early.assign(value_model=early["value_model"].str.removesuffix("-early"))
        mine = first[
            (first["model"] == "base")
            & first["beta"].eq(1)
            & (first["method"] == "sia")
            & (first["versus"] == "dense")
            & (first["floor"] == 0)
        ]
        against(axes[1, 0], mine[mine["value_model"].isin(methods.VALUES.values())], "sia")
        against(axes[1, 0], early, "sia", color=style.CHANGED)
        axes[1, 0].set_title("SIA − dense: early values (brown)", loc="left")
        worlds = {f"@{world.name}": world.name.replace("-", "\n") for world in profile.worlds}
        for axis, method, versus in ((axes[1, 1], "sia", "random"), (axes[1, 2], "sia", "dense")):
            for k, value_model in enumerate(methods.VALUES.values()):
                for place, ending in enumerate(worlds):
                    found = first[
                        (first["model"] == f"base{ending}")
                        & (first["value_model"] == f"{value_model}{ending}")
                        & (first["versus"] == versus)
                    ]
                    found = found[
                        (found["method"] == method)
                        & (found["target_ratio"] == few[0])
                        & found["beta"].eq(1)
                        & (found["floor"] == 0)
                    ]
                    hollow = {"edgecolor": style.COLOURS["sia"], "fill": k == 0}
                    style.bars(
                        axis,
                        place + 0.4 * k - 0.2,
                        found.iloc[0],
                        style.COLOURS["sia"],
                        0.36,
                        **hollow,
                    )
            axis.set_xticks(range(len(worlds)), worlds.values(), fontsize=style.SMALL)
            axis.axhline(0, color="#999999", linewidth=0.8)
            axis.set_title(f"worlds: SIA {few[0]:.0%} − {versus}", loc="left")
        for axis in places[:, 0]:
            axis.set_ylabel("difference in score")
        names = [
            style.handle("sia", "per-token loss"),
            style.handle("sia", "paper's loss", **looks["value-mean"]),
        ]
        names += [
            style.handle("inverted-entropy", "− lowest entropies"),
            style.handle("random", "− random gate", marker="s"),
        ]
        names.append(style.handle("sia", "with what the title says", color=style.CHANGED))
        caption = (
            f"What changes when one thing changes, in judge points (without fluency: of content alone); β = 1, all "
            f"objectives, paired differences. First three: both families; floor: candidates need a "
            f"base probability of {sweep.floor} on steered steps. Others ({style.FAMILIES[family]}): early values have seen "
            f"{profile.training.undertrained_fraction:.0%} of the samples once; in other worlds base and values learn from other corpora. "
            f"{style.measured(table, profile)}"
        )
        return style.finish(figure, names, caption, folder, "mechanism", stale=stale)
