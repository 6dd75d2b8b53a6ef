"""Figure 1: where to steer. Six gates at matched ratios, both value losses at β = 1, and what the entropy gate gains over each other."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import metric_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.profile import Profile

GATES = ("entropy", "entropy-rise", "attention", "attention-rise", "position", "random")
METRICS = ("judge", "reward", "fluency_errors", "kl")
MEASURED = (*METRICS, "steered", "tokens")


class Figure1(Figure):
    """Figure 1: where to steer."""

    title = "Figure 1: where to steer"
    measured = MEASURED

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        wanted = []
        for family in profile.families:
            wanted.append(methods.base(replicate, family))
            for loss in profile.losses:
                wanted += [
                    methods.steered(replicate, family, loss, gate=g, ratio=r)
                    for g in GATES
                    for r in profile.sweep.ratios
                ]
                wanted.append(methods.dense(replicate, family, loss))
        return FigureCells(wanted)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Every gate, and paired the entropy gate against each other at the same target; family "all": the mean over both."""
        metrics = profile.available_metrics(METRICS)
        found = estimates.method_scores(rows, metrics)
        differences = []
        for entropy in estimates.select(found, method="sia"):
            same = {k: entropy.labels[k] for k in ("family", "value_model", "target_ratio")}
            others = estimates.select(
                found, method=tuple(g for g in GATES if g != "entropy"), **same
            )
            differences += [estimates.difference(entropy, other) for other in others]
        return estimates.summarize(
            [*found, *differences, *estimates.over_families(differences)], metrics, profile
        )

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Rows: families and losses, then differences of each loss; columns: objectives, and all."""
        from benchmarks.figures import style

        table = estimates.pooled(table)

        judged = table[table["metric"] == profile.score]
        columns = (*OBJECTIVES, "all")
        settings = [
            (family, value_model)
            for family in profile.families
            for value_model in methods.values(profile)
        ]
        figure, axes = style.grid(
            len(settings) + len(profile.losses), len(columns), 2.1, 1.9, sharex=True
        )
        names = ["sia" if gate == "entropy" else gate for gate in GATES]
        for j, objective in enumerate(columns):
            part = judged[(judged["objective"] == objective)]
            for i, (family, value_model) in enumerate(settings):
                level = part[(part["versus"] == "") & (part["family"] == family)]
                of_loss = level[level["value_model"] == value_model]
                dense = of_loss[of_loss["method"] == "dense"]
                style.horizontal(axes[i, j], "base", level[level["method"] == "base"].iloc[0])
                for method in names:
                    points = pd.concat([of_loss[of_loss["method"] == method], dense])
                    style.curve(axes[i, j], method, points, band=method in ("sia", "random"))
                named = f"{metric_label(profile, profile.score)}\n{style.FAMILIES[family]}, {style.LOSSES[value_model]}"
                axes[i, 0].set_ylabel(named, fontsize=9)
            for i, value_model in enumerate(methods.values(profile), start=len(settings)):
                random = part[(part["versus"] == "random") & (part["value_model"] == value_model)]
                axes[i, j].axhline(0, color="#999999", linewidth=0.8)
                for family, line in zip((*profile.families, "all"), ("--", ":", "-"), strict=False):
                    points = random[random["family"] == family]
                    style.curve(
                        axes[i, j],
                        "sia",
                        points,
                        "target_ratio",
                        linestyle=line,
                        label=style.FAMILIES[family],
                    )
                axes[i, 0].set_ylabel(f"entropy − random\n{style.LOSSES[value_model]}", fontsize=9)
            axes[0, j].set_title(objective if objective != "all" else "all objectives")
            axes[-1, j].set_xlabel("share of tokens steered")
        axes[len(settings), 0].legend(frameon=False, fontsize=style.SMALL, loc="best")
        for i in range(len(axes)):
            style.share_y(axes[i])
        caption = (
            f"Six gates at matched ratios, β = 1; x: realised share (differences: target). All curves end in dense steering at 1. The last "
            f"rows: paired difference of the entropy gate and the random one. Of gates, "
            f"bands of these two alone (the table has all). {style.measured(table, profile)}"
        )
        return style.finish(
            figure,
            [style.handle(m) for m in (*names, "base")],
            caption,
            folder,
            "figure1",
            stale=stale,
            legend_columns=7,
        )
