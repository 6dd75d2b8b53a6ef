"""How figures look: one colour and marker or dash per method everywhere (after Okabe and Ito, and Tol: safe for the colour-blind)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.analysis.estimates import plural
from benchmarks.runtime.files import write_atomically
from benchmarks.spec.profile import Profile

matplotlib.use("Agg")

COLOURS = {
    "sia": "#0072B2",
    "dense": "#000000",
    "random": "#E69F00",
    "base": "#7F7F7F",
    "instruct": "#009E73",
    "instruct-reward": "#CC79A7",
    "best-of-n": "#D55E00",
    "beams": "#56B4E9",
    "args": "#882255",
    "transfer-q": "#999933",
    "genarm": "#332288",
    "entropy-rise": "#44AA99",
    "attention": "#AA4499",
    "attention-rise": "#B15928",
    "position": "#117733",
    "inverted-entropy": "#661100",
}
NAMES = {
    "sia": "SIA (entropy gate)",
    "dense": "dense (every token)",
    "random": "random gate",
    "base": "base",
    "instruct": "instruct (by the judge)",
    "instruct-reward": "instruct (by the reward)",
    "best-of-n": "best of N",
    "beams": "chunk beam search",
    "args": "ARGS",
    "transfer-q": "Transfer Q*",
    "genarm": "GenARM",
    "entropy-rise": "entropy rise",
    "attention": "attention",
    "attention-rise": "attention rise",
    "position": "first tokens",
    "inverted-entropy": "lowest entropies",
}
DASHES = {
    "base": (0, (5, 2)),
    "instruct": (0, (1, 1)),
    "instruct-reward": (0, (3, 1, 1, 1)),
    "best-of-n": (0, (6, 1, 1, 1, 1, 1)),
    "beams": (0, (8, 2)),
    "args": (0, (2, 2)),
    "transfer-q": (0, (4, 1, 1, 1)),
    "genarm": (0, (6, 2, 1, 2)),
}
MARKERS = {
    "sia": "o", "dense": "D", "random": "s", "base": "o", "instruct": "P", "instruct-reward": "X", "best-of-n": "v", "beams": "^",
    "args": "<", "transfer-q": ">", "genarm": "h", "entropy-rise": "^", "attention": "v", "attention-rise": "<", "position": ">",
    "inverted-entropy": "X",
}  # fmt: skip


class Names(dict):
    """What has no name of its own is called what it is."""

    def __missing__(self, key: str) -> str:
        return key


def described(
    method: str, target_ratio: float, value_model: str, best_of: int = 1, tuned: bool = False
) -> str:
    """A method in words: its share of the tokens, of how many responses the best is taken, its value model, whether β was chosen."""
    name = NAMES[method] if method.startswith("instruct") else NAMES[method].partition(" (")[0]
    share = f" at {target_ratio:.0%}" if 0 < target_ratio < 1 else ""
    search = f" + best of {best_of}" if best_of > 1 else ""
    loss = f", {LOSSES[value_model]}{', best β' if tuned else ''}" if value_model in LOSSES else ""
    return name + share + search + loss


FAMILIES = Names({"qwen3": "Qwen3", "llama": "Llama", "all": "both families"})
LOSSES = {"value-mean": "paper's loss", "value-token": "per-token loss"}
SIZES = {
    "small": "#9ECAE1",
    "medium": "#4292C6",
    "large": "#08306B",
}  # of models, where SIA has several
CHANGED = "#8C564B"  # what is like the method beside it but for one thing
NEUTRAL = "#4D4D4D"
TEXT, SMALL = 10.5, 8.5  # points; a figure is as wide as a page when it is printed at about 60%
RC = {
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.labelsize": TEXT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "pdf.fonttype": 42,
    "svg.hashsalt": "sia",
}
DPI = 150
BLUES, SIGNED = "Blues", "RdBu"


plt.rcParams.update(RC)


def grid(
    rows: int, columns: int, width: float = 1.9, height: float = 1.55, **options
) -> tuple[Figure, np.ndarray]:
    """Panels of this size in inches. options: of `plt.subplots`."""
    return plt.subplots(
        rows,
        columns,
        figsize=(width * columns + 0.7, height * rows + 1.2),
        squeeze=False,
        **options,
    )


def join(axes: np.ndarray) -> list[Axes]:
    """One panel in the place of these neighbours, in a list."""
    first, last, figure = axes[0].get_subplotspec(), axes[-1].get_subplotspec(), axes[0].figure
    for axis in axes:
        axis.remove()
    return [
        figure.add_subplot(
            first.get_gridspec()[first.rowspan.start, first.colspan.start : last.colspan.stop]
        )
    ]


def horizontal(axis: Axes, method: str, row) -> None:
    """A static method: a dashed line with its interval as a band. row: estimate, low, high."""
    axis.axhspan(row.low, row.high, color=COLOURS[method], alpha=0.10, linewidth=0)
    axis.axhline(row.estimate, color=COLOURS[method], linestyle=DASHES[method], linewidth=1.1)


def line(method: str) -> dict:
    """How a curve of this method looks."""
    return {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 3, "linewidth": 1.3}


def curve(
    axis: Axes, method: str, points: pd.DataFrame, x: str = "ratio", band: bool = True, **look
) -> None:
    """Estimate against `x`, with its interval as a band. points: x, estimate, low, high. look: what differs from the method's usual."""
    points = points.sort_values(x)
    look = line(method) | look
    if band:
        axis.fill_between(
            points[x].astype(float),
            points["low"],
            points["high"],
            color=look["color"],
            alpha=0.15,
            linewidth=0,
        )
    axis.plot(points[x].astype(float), points["estimate"], **look)


def bars(axis: Axes, place: float, row, colour: str, width: float = 0.8, **look) -> None:
    """One bar with its interval. row: estimate, low, high."""
    axis.bar(place, row.estimate, width, color=colour, **look)
    axis.plot(
        [place, place], [row.low, row.high], color="#222222", linewidth=0.9, solid_capstyle="butt"
    )


def share_y(axes: np.ndarray) -> None:
    """The same y range for these panels."""
    ends = [axis.get_ylim() for axis in axes.flat]
    for axis in axes.flat:
        axis.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def heatmap(
    axis: Axes,
    values: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    *,
    signed: bool = False,
    digits: int = 2,
    span=None,
) -> None:
    """Numbers in coloured cells, `(rows, columns)`, first row at the bottom. signed: colours diverge from 0. span: lowest, highest."""
    low, high = span or (np.nanmin(values), np.nanmax(values))
    if signed:
        high = max(abs(low), abs(high), 1e-9)
        low = -high
    axis.pcolormesh(
        values,
        cmap=SIGNED if signed else BLUES,
        vmin=low,
        vmax=high,
        edgecolors="white",
        linewidth=0.5,
    )
    for (i, j), value in np.ndenumerate(values):
        strong = abs(value) > 0.6 * high if signed else value > low + 0.6 * (high - low)
        text = "" if np.isnan(value) else f"{value:.{digits}f}"
        axis.text(
            j + 0.5,
            i + 0.5,
            text,
            ha="center",
            va="center",
            fontsize=SMALL,
            color="white" if strong else "black",
        )
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axis.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def handle(method: str, name: str = "", **look) -> Line2D:
    """What the legend shows of a method."""
    usual = {
        "color": COLOURS[method],
        "linestyle": DASHES.get(method, "-"),
        "marker": None if method in DASHES else MARKERS[method],
    }
    return Line2D(
        [], [], label=name or NAMES[method], **({"markersize": 4, "linewidth": 1.5} | usual | look)
    )


def point(method: str, name: str = "") -> Line2D:
    """The same where methods are points."""
    return handle(method, name, linestyle="none", marker=MARKERS[method], markersize=5)


def first_loss(profile: Profile) -> str:
    """The loss of the figures that show one alone."""
    return LOSSES[f"value-{profile.losses[0]}"]


def measured(summary: pd.DataFrame, profile: Profile) -> str:
    """How many were measured, and what the intervals are, for captions."""
    first = summary[summary["n"].notna()].iloc[0]
    n, replicates, samples = int(summary["n"].max()), int(first["replicates"]), int(first["seeds"])
    each = (
        int(summary[summary["objective"] != "all"]["n"].max())
        if (summary["objective"] != "all").any()
        else n
    )
    shown = f"{n} prompts ({each} of each objective)" if each < n else f"{n} prompts"
    return (
        f"Intervals: {profile.statistics.level:.0%} bootstrap over replicates and prompts; n = {shown} × "
        f"{plural(samples, 'sample')} per point, {together(replicates)} of profile {profile.name}."
    )


def together(replicates: int) -> str:
    """Over how many replicates n is counted."""
    return "1 replicate" if replicates == 1 else f"all {replicates} replicates together,"


def finish(
    figure: Figure,
    handles: Sequence[Line2D],
    caption: str,
    folder: Path,
    name: str,
    *,
    stale: bool,
    legend_columns: int = 6,
) -> list[Path]:
    """Legend on top, caption below, NAME.png and NAME.pdf, each written whole or not at all. Returns their paths.

    stale: the table was measured under other settings than today's; the figure says so in red.
    """
    if stale:
        figure.text(
            0.5,
            0.5,
            "STALE",
            color="#D00000",
            alpha=0.35,
            fontsize=90,
            rotation=30,
            ha="center",
            va="center",
        )
        caption = f"STALE: measured under other settings than the profile has now. {caption}"
    width, height = figure.get_size_inches()
    text = textwrap.fill(caption, int(width * 13.6))
    column = 0.65 + 0.075 * max(
        (len(handle.get_label()) for handle in handles), default=0
    )  # inches, about
    columns = max(1, min(legend_columns, len(handles), int(width / column)))
    legend_rows = -(-len(handles) // columns)
    bottom, top = (
        (0.16 + 0.165 * (text.count("\n") + 1)) / height,
        1 - (0.12 + 0.235 * legend_rows) / height,
    )
    figure.tight_layout(rect=(0, bottom, 1, top), h_pad=0.7, w_pad=0.6)
    if handles:
        figure.legend(
            handles=list(handles),
            loc="upper center",
            ncol=columns,
            frameon=False,
            columnspacing=1.2,
            handlelength=2.4,
        )
    figure.text(0.01, 0.05 / height, text, ha="left", va="bottom", fontsize=9)
    png, pdf = (folder / f"{name}.{suffix}" for suffix in ("png", "pdf"))
    write_atomically(png, lambda made: save_png(figure, made, caption))
    write_atomically(pdf, lambda made: figure.savefig(made, metadata={"CreationDate": None}))
    plt.close(figure)
    return [png, pdf]


def save_png(figure: Figure, path: Path, caption: str) -> None:
    """With a palette of 256 colours, which takes a third of the space of all that there are; the caption goes along."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    said = PngInfo()
    said.add_itxt("Description", caption)
    image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(path, format="png", optimize=True, dpi=(DPI, DPI), pnginfo=said)
