"""Look of the figures: a seaborn theme, a colour, marker and dash per method, saving of files.

The colours are after Okabe and Ito, and Tol, and suit readers with a colour vision deficiency.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import seaborn.objects as so
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.analysis.labels import FAMILIES as FAMILIES
from benchmarks.analysis.labels import LOSSES, plural
from benchmarks.runtime.files import write_atomically
from benchmarks.spec.methods import label_of
from benchmarks.spec.profile import Profile

matplotlib.use("Agg")

PAGE, COLUMN = 7.0, 3.4  # inches: widths of a page and of a column of a paper
CHARACTERS = 20  # of a caption, in an inch
DPI = 200
RC = {
    "font.sans-serif": ["DejaVu Sans"],  # which comes with matplotlib: the same everywhere
    "font.size": 8,
    "figure.labelsize": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "sia",
}
sns.set_theme(context="paper", style="ticks", rc=RC)
so.Plot.config.theme.update(plt.rcParams)
NEUTRAL, ZERO = "#4D4D4D", "#999999"  # of what is no method, and of lines at 0


class Look(NamedTuple):
    """Colour, marker and dashes of a method; no dashes: a solid line."""

    colour: str
    marker: str = "o"
    dashes: tuple[float, ...] = ()


GATES = {  # besides the entropy gate, which is SIA
    "entropy-rise": Look("#44AA99", "^"),
    "attention": Look("#AA4499", "v"),
    "attention-rise": Look("#B15928", "<"),
    "position": Look("#117733", ">"),
    "random": Look("#E69F00", "s"),
}
PALETTE = {
    **GATES,
    "sia": Look("#0072B2", "o"),
    "dense": Look("#000000", "D"),
    "base": Look("#7F7F7F", "o", (5, 2)),
    "instruct": Look("#009E73", "P", (1, 1)),
    "instruct-reward": Look("#CC79A7", "X", (3, 1, 1, 1)),
    "best-of-n": Look("#D55E00", "v", (6, 1, 1, 1, 1, 1)),
    "beams": Look("#56B4E9", "^", (8, 2)),
    "args": Look("#882255", "<", (2, 2)),
    "transfer-q": Look("#999933", ">", (4, 1, 1, 1)),
    "genarm": Look("#332288", "h", (6, 2, 1, 2)),
    "inverted-entropy": Look("#661100", "X"),
}
# lines of families, where one method is shown, and of both together
FAMILY_LOOKS = (Look("#56B4E9", "o"), Look("#CC79A7", "s"), Look("#0072B2", "D"))
COLOURS = {method: look.colour for method, look in PALETTE.items()}
MARKERS = {method: look.marker for method, look in PALETTE.items()}
DASHES = {method: (0, look.dashes) for method, look in PALETTE.items() if look.dashes}

SIZES = {
    "small": "#9ECAE1",
    "medium": "#4292C6",
    "large": "#08306B",
}  # of models, where SIA has several
CHANGED = "#8C564B"  # what is like the method beside it but for one thing
TEXT, SMALL = 8, 7  # points
BLUES, SIGNED = sns.light_palette("#2B7BBA", as_cmap=True), "RdBu"


def curves(
    data: pd.DataFrame,
    x: str,
    by: str = "method",
    *,
    looks: Mapping[str, Look] = PALETTE,
    static: pd.DataFrame | None = None,
    **facets: str,
) -> so.Plot:
    """Return a plot of estimates against `x` with intervals as bands, a line per level of `by`.

    Args:
        data: Columns `x`, `by`, estimate, low and high (missing: no band), and those of `facets`.
        looks: By level of `by`.
        static: Rows of what does not depend on `x`, drawn as lines across the panels of its facets.
        **facets: Columns of `data` by "row" and "col"; panels come in the order of the rows.
    """
    levels = list(dict.fromkeys([*data[by], *(static[by] if static is not None else ())]))
    dashes = {level: (0, looks[level].dashes) if looks[level].dashes else "-" for level in levels}
    order = {facet: list(dict.fromkeys(data[column])) for facet, column in facets.items()}
    plot = so.Plot(data, x=x, y="estimate", color=by, linestyle=by).facet(**facets, order=order)
    if static is not None:
        shared = {facet: column if column in static else None for facet, column in facets.items()}
        ends = pd.concat(
            [static.assign(**{x: end}) for end in (0.0, data[x].max())], ignore_index=True
        )
        variables = {"x": x, "y": "estimate", "color": by, "linestyle": by, **shared}
        plot = plot.add(so.Line(linewidth=1), data=ends, legend=False, **variables)
    return (
        plot.add(so.Band(alpha=0.15, edgewidth=0), ymin="low", ymax="high", legend=False)
        .add(so.Line(linewidth=1.2, pointsize=3.5, edgewidth=0), marker=by, legend=False)
        .scale(
            color={level: looks[level].colour for level in levels},
            marker={level: looks[level].marker for level in levels},
            linestyle=dashes,
        )
    )


def name_facets(figure: Figure, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Name the columns above the first row of panels, and the rows beside the first column."""
    for axis, (row, column) in zip(figure.axes, product(rows, columns), strict=True):
        axis.set_title(column if row == rows[0] else "")
        axis.set_ylabel(row.replace(", ", ",\n") if column == columns[0] else "")


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


def handle(method: str, label: str = "", **properties) -> Line2D:
    """Return the legend entry of a method; `properties` override those of its look."""
    look = PALETTE[method]
    usual = {
        "color": look.colour,
        "linestyle": (0, look.dashes) if look.dashes else "-",
        "marker": "" if look.dashes else look.marker,
        "markersize": 4,
        "linewidth": 1.3,
    }
    return Line2D([], [], label=label or label_of(method), **usual | properties)


def handles(looks: Mapping[str, Look], labels: Mapping[str, str]) -> list[Line2D]:
    """Return legend entries of lines: a label for each of these looks."""
    return [
        Line2D([], [], label=label, color=looks[name].colour, marker=looks[name].marker,
               linestyle=(0, looks[name].dashes) if looks[name].dashes else "-", markersize=4)
        for name, label in labels.items()
    ]  # fmt: skip


def point(method: str, name: str = "") -> Line2D:
    """Return the legend entry of a method where methods are points."""
    return handle(method, name, linestyle="none", marker=MARKERS[method], markersize=5)


def first_loss(profile: Profile) -> str:
    """The loss of the figures that show one alone."""
    return LOSSES[f"value-{profile.losses[0]}"]


def sample_size_note(summary: pd.DataFrame, profile: Profile, shown: str = "Bands") -> str:
    """Return the sentence of a caption that says what the intervals are and how many was measured.

    Args:
        shown: How the figure shows intervals.
    """
    first = summary[summary["n"].notna()].iloc[0]
    return (
        f"{shown}: {profile.statistics.level:.0%} bootstrap intervals over replicates and prompts; "
        f"n = {summary['n'].max():.0f} prompts × {plural(int(first['seeds']), 'sample')}, "
        f"{plural(int(first['replicates']), 'replicate')}, profile {profile.name}."
    )


measured = sample_size_note


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
    """Put the legend on top and the caption below, and write NAME.png and NAME.pdf.

    Each file is written whole or not at all.

    Args:
        stale: Whether the table was measured under other settings than today's; the figure says so.
    """
    if stale:
        caption = f"STALE: measured under other settings than the profile has now. {caption}"
        figure.text(0.5, 0.5, "STALE", color="#D00000", alpha=0.35, fontsize=70, rotation=30,
                    ha="center", va="center")  # fmt: skip
    width, height = figure.get_size_inches()
    text = textwrap.fill(caption, int(width * CHARACTERS))
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = max(1, min(legend_columns, len(handles), int(width / (0.45 + 0.06 * longest))))
    bottom = (0.1 + 0.13 * (text.count("\n") + 1)) / height
    figure.set_layout_engine("constrained", rect=(0, bottom, 1, 1 - bottom))
    if handles:
        figure.legend(
            handles=list(handles), loc="outside upper center", ncol=columns, frameon=False
        )
    figure.text(0.01, 0.04 / height, text, ha="left", va="bottom", fontsize=7)
    png, pdf = (folder / f"{name}.{suffix}" for suffix in ("png", "pdf"))
    write_atomically(png, lambda path: save_png(figure, path, caption))
    write_atomically(pdf, lambda path: figure.savefig(path, metadata={"CreationDate": None}))
    plt.close(figure)
    return [png, pdf]


def save_png(figure: Figure, path: Path, caption: str) -> None:
    """Save with a palette of 256 colours, a third of the size; the caption goes into the file."""
    buffer, texts = BytesIO(), PngInfo()
    figure.savefig(buffer, dpi=DPI, format="png")
    texts.add_itxt("Description", caption)
    image = Image.open(buffer).convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    image.save(path, format="png", optimize=True, dpi=(DPI, DPI), pnginfo=texts)
