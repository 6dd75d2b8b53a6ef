"""Look of the figures: a seaborn theme, a colour, marker and dash per method, saving of files.

The colours are after Okabe and Ito, and Tol, and suit readers with a colour vision deficiency.
"""

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import seaborn.objects as so
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.analysis.intervals import interval_kind
from benchmarks.analysis.labels import loss_label, plural
from benchmarks.runtime.files import write_atomically
from benchmarks.spec.cells import OBJECTIVES
from benchmarks.spec.methods import METHODS, label_of, legend_of
from benchmarks.spec.model_kinds import value_kind
from benchmarks.spec.profile import Profile

matplotlib.use("Agg")

PAGE, COLUMN = 7.0, 3.4  # inches: widths of a page and of a column of a paper
CHARACTERS = 20  # of a caption, in an inch
DPI = 200
RC = {
    "figure.dpi": DPI,  # panels are arranged by the widths of text, which are rounded to pixels
    "font.sans-serif": ["DejaVu Sans"],  # which comes with matplotlib: the same everywhere
    "font.size": 8,
    "figure.labelsize": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,
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


GATES = {  # of figure 1, besides the entropy gate, which is SIA
    "entropy-rise": Look("#44AA99", "^"),
    "attention": Look("#AA4499", "v"),
    "attention-rise": Look("#B15928", "<"),
    "position": Look("#B5BD00", ">"),
    "random": Look("#E69F00", "s"),
    "inverted-entropy": Look("#661100", "X"),
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
    "junction": Look("#CC3311", "p"),
    "divergence": Look("#6A3D9A", "d", (4, 1)),
    "q-head": Look("#1B7837", "*"),
    "junction-q-head": Look("#1B7837", "p"),
    "vocabulary-value": Look("#8073AC", "*"),
}
SPARE_COLOURS = ("#DDCC77", "#88CCEE", "#A65628", "#66C2A5")  # of methods without a look above
PALETTE |= {
    method.name: Look(colour)
    for method, colour in zip(
        (one for one in METHODS if one.name not in PALETTE), SPARE_COLOURS, strict=False
    )
}
# lines of families, where one method is shown, and of both together
FAMILY_LOOKS = (Look("#56B4E9", "o"), Look("#CC79A7", "s"), Look("#0072B2", "D"))
COLOURS = {method: look.colour for method, look in PALETTE.items()}
PALE, DARK = "#9ECAE1", "#08306B"
SIZES = {"small": PALE, "medium": "#4292C6", "large": DARK}  # of value models
# lines of SIA by values of either loss
LOSS_LOOKS = {
    "value-token": Look(COLOURS["sia"], "o"),
    "value-mean": Look(COLOURS["sia"], "s", (4, 2)),
}
SMALL = 7  # points
SHADES = sns.color_palette("YlGnBu", as_cmap=True)  # of shares of steered tokens
BLUES = sns.light_palette("#2B7BBA", as_cmap=True)


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


def share_look(share: float) -> Look:
    """Return the look of SIA at a share of the tokens, from pale to dark; 1 is dense steering."""
    return Look(to_hex(SHADES(0.3 + 0.7 * share))) if share < 1 else PALETTE["dense"]


def name_facets(figure: Figure, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Name the columns above the first row of panels, and the rows beside the first column."""
    for axis, (row, column) in zip(figure.axes, product(rows, columns), strict=True):
        axis.set_title(column if row == rows[0] else "")
        axis.set_ylabel(row.replace(", ", ",\n") if column == columns[0] else "")


def ordered(rows: pd.DataFrame, **orders: Sequence) -> pd.DataFrame:
    """Return rows sorted, stably, by columns whose values come in the given orders."""
    places = {name: {value: i for i, value in enumerate(order)} for name, order in orders.items()}
    return rows.sort_values(
        list(orders),
        key=lambda column: column.map(places[column.name]),
        kind="stable",
        ignore_index=True,
    )


def handle(method: str, label: str = "", **properties) -> Line2D:
    """Return the legend entry of a method; `properties` override those of its look."""
    usual = {"marker": ""} if PALETTE[method].dashes else {}
    return entry(PALETTE[method], label or legend_of(method), **usual | properties)


def handles(looks: Mapping[str, Look], labels: Mapping[str, str] | None = None) -> list[Line2D]:
    """Return legend entries of lines, labelled by their names unless `labels` has others."""
    labels = labels or {name: name for name in looks}
    return [entry(looks[name], label) for name, label in labels.items()]


def entry(look: Look, label: str, **properties) -> Line2D:
    """Return a legend entry; `properties` override those of the look."""
    usual = {
        "color": look.colour,
        "linestyle": (0, look.dashes) if look.dashes else "-",
        "marker": look.marker,
        "markersize": 4,
        "linewidth": 1.3,
    }
    return Line2D([], [], label=label, **usual | properties)


def first_loss(profile: Profile) -> str:
    """Return the label of the loss of figures that show one of several alone."""
    return loss_label(profile, str(value_kind(profile.losses[0])))


def sample_size_note(summary: pd.DataFrame, profile: Profile, shown: str = "Bands") -> str:
    """Return the caption sentence that states the kind of interval and the sample size.

    Args:
        summary: Summary that the figure draws.
        profile: Profile that was measured.
        shown: What shows the intervals, a plural noun that begins the sentence.
    """
    rows = summary[summary["n"].notna()]
    largest = rows.loc[rows["n"].astype(int).idxmax()]
    fewer = rows[(rows["objective"] == largest["objective"]) & (rows["n"] < largest["n"])]
    exceptions = [
        f" ({label_of(method)}: n = {n:.0f})"
        for method, n in fewer[["method", "n"]].drop_duplicates().itertuples(index=False)
    ]
    return (
        f"{shown}: {interval_kind(profile.statistics.level, int(largest['replicates']))}; "
        f"{sample_size(largest)}{''.join(exceptions)}, profile {profile.name}."
    )


def sample_size(row: pd.Series) -> str:
    """Return the n of a row of a summary, its factors and the samples of each prompt."""
    n, replicates = int(row["n"]), int(row["replicates"])
    objectives = len(OBJECTIVES) if row["objective"] == "all" else 1
    count, others = divmod(n, replicates * objectives)  # others: objectives may differ
    prompts = f"{'about ' * bool(others)}{plural(count, 'prompt')}"
    factors = [plural(replicates, "replicate")]
    factors += [plural(objectives, "objective")] if objectives > 1 else []
    samples = plural(int(row["seeds"]), "sample")
    return f"n = {n} ({' × '.join([*factors, prompts])}), {samples} each"


def finish(
    figure: Figure,
    handles: Sequence[Line2D],
    caption: str,
    folder: Path,
    name: str,
    *,
    stale: bool,
    legend_columns: int = 8,
) -> list[Path]:
    """Put the legend on top and the caption below, and write NAME.png and NAME.pdf.

    Each file is written whole or not at all.

    Args:
        stale: Whether the table was measured under other conditions than today's, as the figure
            then says.
    """
    if stale:
        caption = f"STALE: measured under conditions that have changed since. {caption}"
        figure.text(0.5, 0.5, "STALE", color="#D00000", alpha=0.35, fontsize=70, rotation=30,
                    ha="center", va="center")  # fmt: skip
    width, height = figure.get_size_inches()
    text = textwrap.fill(caption, int(width * CHARACTERS))
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = max(1, min(legend_columns, len(handles), int(width / (0.45 + 0.06 * longest))))
    rows = -(-len(handles) // columns)
    bottom = (0.1 + 0.13 * (text.count("\n") + 1)) / height
    figure.set_layout_engine("constrained", rect=(0, bottom, 1, 1 - bottom))
    if handles:
        figure.legend(
            handles=list(handles),
            loc="outside upper center",
            ncol=-(-len(handles) // rows),
            frameon=False,
        )
    figure.text(0.01, 0.04 / height, text, ha="left", va="bottom", fontsize=7)
    figure.draw_without_rendering()  # arranges the panels, once for both files
    figure.set_layout_engine("none")
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
    image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(path, format="png", optimize=True, dpi=(DPI, DPI), pnginfo=texts)
