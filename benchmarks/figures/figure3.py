"""Figure 3: weak to strong. Value models of three sizes steer language models of three sizes; a smaller one a larger one above all.

Values by the profile's first loss (the lab's: per token), β = 1, first family. The usual size is called medium.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import metric_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.model_kinds import ModelKind, value_kind
from benchmarks.spec.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "kl")
MEASURED = (*METRICS, "steered", "tokens")
KINDS = {"small": "small", "medium": "", "large": "large"}  # size here → size of a ModelKind
SIZES = {size: f"-{kind}" if kind else "" for size, kind in KINDS.items()}  # → end of labels


def weaker(profile: Profile) -> list[tuple[str, str]]:
    """Return the pairs (size of value model, of language model) whose value model is smaller."""
    kind = methods.values(profile)[0]
    return [
        (value, model)
        for value, model in product(SIZES, SIZES)
        if profile.size(f"{kind}{SIZES[value]}") < profile.size(f"base{SIZES[model]}")
    ]


class Figure3(Figure):
    """Figure 3: weak to strong."""

    title = "Figure 3: weak to strong"
    measured = MEASURED

    def why_unsupported(self, profile: Profile) -> str:
        """Return which sizes of models the profile lacks."""
        kinds = ("base", f"value-{profile.losses[0]}")
        needed = [f"{kind}-{size}" for kind in kinds for size in ("small", "large")]
        if all(map(profile.has, needed)):
            return ""
        return f"figure3 needs three sizes of models ({', '.join(needed)}), as w2s-qwen3 has"

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        wanted, family = [], profile.families[0]
        for model in (ModelKind("base", size=size) for size in KINDS.values()):
            wanted.append(methods.base(replicate, family, model))
            for size in KINDS.values():
                values = value_kind(profile.losses[0], size)
                wanted += methods.curve(
                    profile, replicate, family, values, profile.sweep.main_ratios, model=model
                )
        return FigureCells(wanted)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Every pair of sizes, and paired: its gain over the base model; SIA, and the mean of SIA over the claimed ratios, against dense.

        Method "weak-to-strong": the mean over the pairs whose value model is the smaller one.
        """
        metrics = profile.available_metrics(METRICS)
        found = estimates.method_scores(rows, metrics)
        differences, gains, shortfalls = [], {}, []
        for value in SIZES:
            for model in SIZES:
                pair = {
                    "model": f"base{SIZES[model]}",
                    "value_model": f"{methods.values(profile)[0]}{SIZES[value]}",
                }
                base = estimates.select_one(found, model=pair["model"], gate="never")
                dense = estimates.select_one(found, **pair, method="dense")
                sparse = estimates.select(found, **pair, method="sia")
                differences += [
                    estimates.difference(e, base, versus="base") for e in [*sparse, dense]
                ]
                differences += [estimates.difference(e, dense) for e in sparse]
                claimed = estimates.mean_of(
                    [e for e in sparse if e.labels["target_ratio"] in profile.sweep.main_ratios],
                    method="sia-claimed",
                )
                differences.append(estimates.difference(claimed, dense))
                if (value, model) in weaker(profile):
                    gains.setdefault("sia-claimed", []).append(
                        estimates.difference(claimed, base, versus="base")
                    )
                    gains.setdefault("dense", []).append(
                        estimates.difference(dense, base, versus="base")
                    )
                    shortfalls.append(differences[-1])
        names = {"model": "", "value_model": "", "search": ""}
        pooled = [
            estimates.mean_of(many, **names, method=f"weak-to-strong {method}", versus="base")
            for method, many in gains.items()
        ]
        pooled.append(
            estimates.mean_of(
                shortfalls, **names, method="weak-to-strong sia-claimed", versus="dense"
            )
        )
        return estimates.summarize([*found, *differences, *pooled], metrics, profile)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Top: score against ratio for each size of language model, a line for each size of value model. Bottom: gain over the base."""
        from benchmarks.figures import style

        table = estimates.pooled(table)

        part = table[(table["metric"] == profile.score) & (table["objective"] == "all")]
        level, gains = part[part["versus"] == ""], part[part["versus"] == "base"]
        value_model = methods.values(profile)[0]
        figure, axes = style.grid(2, 3, 2.7, 2.3)
        ratios = (*profile.sweep.main_ratios, 1.0)
        for j, (name, suffix) in enumerate(SIZES.items()):
            of_model = level[level["model"] == f"base{suffix}"]
            style.horizontal(axes[0, j], "base", of_model[of_model["gate"] == "never"].iloc[0])
            for value, ending in reversed(SIZES.items()):  # the thick ones on top
                points = of_model[of_model["value_model"] == f"{value_model}{ending}"]
                weak = (value, name) in weaker(profile)
                style.curve(
                    axes[0, j],
                    "sia",
                    points,
                    color=style.SIZES[value],
                    linewidth=1.8 if weak else 1.0,
                    linestyle="-" if weak else "--",
                )
            axes[0, j].set_title(f"{name} language model")
            axes[0, j].set_xlabel("share of tokens steered")
            rows = [
                [
                    gains[
                        (gains["model"] == f"base{suffix}")
                        & (gains["value_model"] == f"{value_model}{e}")
                        & (gains["target_ratio"] == r)
                    ]
                    for r in ratios
                ]
                for e in SIZES.values()
            ]
            grid = np.array([[cell["estimate"].iloc[0] for cell in row] for row in rows])
            style.heatmap(
                axes[1, j], grid, [f"{r:.0%}" for r in ratios], list(SIZES), span=_span(gains)
            )
            axes[1, j].set_xlabel("share of tokens steered (target)")
        axes[0, 0].set_ylabel(metric_label(profile, profile.score))
        axes[1, 0].set_ylabel("value model")
        style.share_y(axes[0])
        looks = {
            value: "-" if any(value == smaller for smaller, _ in weaker(profile)) else "--"
            for value in style.SIZES
        }
        handles = [
            style.handle("sia", f"{v} value model", color=style.SIZES[v], linestyle=look)
            for v, look in looks.items()
        ]
        handles.append(style.handle("base"))
        caption = (
            f"Weak to strong: SIA with a value model of one size and a language model of another ({style.LOSSES[value_model]}, β = 1, "
            f"{style.FAMILIES[profile.families[0]]}, all objectives; at 1: dense). Thick, solid: the value model is the smaller one. "
            f"Bottom: paired gain in {metric_label(profile, profile.score)} over the same base model (its intervals "
            f"stand in the table). {style.measured(level, profile)}"
        )
        return style.finish(figure, handles, caption, folder, "figure3", stale=stale)


def _span(gains: pd.DataFrame) -> tuple[float, float]:
    shown = gains[gains["method"].isin(["sia", "dense"])]["estimate"]
    return min(0.0, shown.min()), shown.max()
