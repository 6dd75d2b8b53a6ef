"""How figures look: one colour per method everywhere (Okabe and Ito's palette, safe for colour-blind readers)."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.store import write_atomically

COLOURS = {
    "sia": "#0072B2",
    "random": "#E69F00",
    "base": "#7F7F7F",
    "instruct": "#009E73",
    "instruct-reward": "#CC79A7",
    "best-of-n": "#D55E00",
}
NAMES = {
    "sia": "SIA (entropy gate)",
    "random": "random gate",
    "base": "base",
    "instruct": "instruct (judge's favourites)",
    "instruct-reward": "instruct (reward model's favourites)",
    "best-of-n": "best of {best_of}",
}
DASHES = {"base": (0, (5, 2)), "instruct": (0, (1, 1)), "instruct-reward": (0, (3, 1, 1, 1)), "best-of-n": (0, (6, 1, 1, 1, 1, 1))}
MARKERS = {"sia": "o", "random": "s"}
FAMILIES = {"qwen3": "Qwen3", "llama": "Llama"}
RC = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,
    "svg.hashsalt": "sia",
}


plt.rcParams.update(RC)


def grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Small panels that share the x axis."""
    return plt.subplots(rows, columns, figsize=(1.9 * columns + 0.6, 1.55 * rows + 1.0), sharex=True, squeeze=False)


def horizontal(axis: Axes, method: str, estimate: float, low: float, high: float) -> None:
    """A static method: a dashed line with its interval as a band."""
    axis.axhspan(low, high, color=COLOURS[method], alpha=0.12, linewidth=0)
    axis.axhline(estimate, color=COLOURS[method], linestyle=DASHES[method], linewidth=1.1)


def curve(axis: Axes, method: str, points: pd.DataFrame) -> None:
    """Estimate against realised ratio, with its interval as a band. points: ratio, estimate, low, high."""
    axis.fill_between(points["ratio"], points["low"], points["high"], color=COLOURS[method], alpha=0.18, linewidth=0)
    axis.plot(points["ratio"], points["estimate"], color=COLOURS[method], marker=MARKERS[method], markersize=3, linewidth=1.3)


def share_y(axes: np.ndarray) -> None:
    """The same y range for these panels."""
    ends = [axis.get_ylim() for axis in axes.flat]
    for axis in axes.flat:
        axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def finish(figure: Figure, methods: list[str], caption: str, paths: list[Path], *, stale: bool, **names: object) -> None:
    """Legend on top, caption below, and one file per path, each written whole or not at all.

    stale: the table was measured under other settings than today's; the figure says so in red. names: fill the NAMES.
    """
    if stale:
        figure.text(0.5, 0.5, "STALE", color="#D00000", alpha=0.35, fontsize=90, rotation=30, ha="center", va="center")
        caption = f"STALE: measured under other settings than the profile has now. {caption}"
    lines = [
        Line2D([], [], color=COLOURS[m], linestyle=DASHES.get(m, "-"), marker=MARKERS.get(m), markersize=4, linewidth=1.5) for m in methods
    ]
    width, height = figure.get_size_inches()
    text = textwrap.fill(caption, int(width * 17))
    lines_of_text = text.count("\n") + 1
    bottom, top = (0.12 + 0.13 * lines_of_text) / height, 1 - 0.3 / height
    figure.tight_layout(rect=(0, bottom, 1, top), h_pad=0.6, w_pad=0.4)
    figure.legend(lines, [NAMES[m].format(**names) for m in methods], loc="upper center", ncol=len(methods), frameon=False)
    figure.text(0.01, 0.05 / height, text, ha="left", va="bottom", fontsize=7.5)
    for path in paths:
        metadata = {"CreationDate": None} if path.suffix == ".pdf" else {}
        write_atomically(path, lambda made, metadata=metadata: figure.savefig(made, dpi=200, metadata=metadata))
    plt.close(figure)
