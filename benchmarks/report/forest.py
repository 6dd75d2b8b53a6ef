"""The headline verdicts as one picture: a row for each claim, a column for each setting.

Scores are in standard deviations of base responses, so that both metrics fit one axis; ticks are
single replicates. What has another unit (ratios, shares, deviations) is written below, without its
interval, in the colours of the verdicts; what rests on too few prompts is a dash. What the interval
alone decides, and Holm's test leaves open, has an open marker or brackets.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis.claims import NOT_MEASURED, TOO_FEW, settings_of
from benchmarks.analysis.estimates import NUMBERS, TOLERANCE
from benchmarks.analysis.intervals import interval_kind
from benchmarks.figures import style
from benchmarks.spec.profile import Profile

NAME = "verdicts"
COLOURS = {
    "reproduced": "#009E73",
    "not reproduced": "#D55E00",
    "undecided": "#7F7F7F",
    TOO_FEW: "#BBBBBB",
}
MARKERS = ("o", "D")  # of the series: metrics
ROW, HEADER = 0.25, 1.85  # inches: height of a row, and of what is above and below all rows
CHARACTERS = 25  # of a row's title, in a line
LIMIT = 1.25  # standard deviations, beyond which a marker stands at the edge
LINEAR = 0.1  # standard deviations, up to which the axis is linear
TEXT = {"fontsize": 6, "ha": "center", "va": "center"}
METRICS = {"judge": "judge score", "reward": "evaluation reward"}


def draw(verdicts: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
    """Draw verdicts.png and verdicts.pdf; nothing where no headline is measured.

    Args:
        verdicts: As `claims.pooled_verdicts` returns them.
        profile: Names settings and metrics.
        stale: Whether any table was measured under other conditions than there are now.
        folder: Folder of the files.
    """
    rows = verdicts[(verdicts["headline"] > 0) & (verdicts["verdict"] != NOT_MEASURED)]
    if rows.empty:
        return []
    rows = rows.assign(row=numbered_titles(rows))
    of_scores = rows["sd"].notna()
    scores, others = (rows[chosen] for chosen in (of_scores, ~of_scores))
    counts = [frame["row"].nunique() for frame in (scores, others)]
    columns = [name for name in settings_of(profile) if name in set(rows["setting"])] or [""]
    figure, axes = style.plt.subplots(
        2, len(columns), sharex="row", sharey="row", squeeze=False,
        figsize=(style.COLUMN, ROW * sum(counts) + HEADER),
        height_ratios=[max(count, 0.1) for count in counts],
    )  # fmt: skip
    metrics = [name for name in METRICS if name in set(scores["metric"])]
    for above, below, setting in zip(*axes, columns, strict=True):
        above.set_title(settings_of(profile).get(setting, "").replace(", ", ",\n"), fontsize=6.5)
        shown = scores[scores["setting"] == setting]
        shown = shown.assign(series=shown["metric"])
        draw_scores(above, shown, list(scores["row"].unique()), metrics)
        # what has no setting stands in the first column, as in the tables
        places = [setting, ""] if setting == columns[0] else [setting]
        shown = others[others["setting"].isin(places)]
        write_numbers(below, shown, list(others["row"].unique()))
    axes[0, len(columns) // 2].set_xlabel("standard deviations of base responses", fontsize=6.5)
    handles = legend([METRICS[metric] for metric in metrics], rows)
    level, replicates = profile.statistics.level, int(rows["replicates"].max())
    notes = "; ticks: single replicates" * any(map(len, scores["alone"]))
    notes += "; †: dense loses to the base" * bool(scores["dense_loses"].any())
    notes += f"; axis linear to ±{LINEAR:g}" * (not scores.empty)
    sizes = sample_note(rows if scores.empty else scores)
    caption = (
        f"{interval_kind(level, replicates)}, verdicts by Holm at {1 - level:.0%}; dotted: margin "
        f"(0 or −{TOLERANCE:g}){notes}. {sizes}, profile {profile.name}."
    )
    return style.finish(figure, handles, caption, folder, NAME, stale=stale, legend_columns=3)


def sample_note(rows: pd.DataFrame) -> str:
    """Return the smallest and largest n of the rows, as "n = 400 to 1200"; of scores, prompts."""
    ends = (f"{n:.0f}" for n in (rows["n"].min(), rows["n"].max()))
    unit = " prompts" if rows["sd"].notna().all() else ""
    return f"n = {' to '.join(dict.fromkeys(ends))}{unit}"


def legend(series: Sequence[str], rows: pd.DataFrame) -> list:
    """Return a handle for each verdict of the rows, and for each series, by its marker."""
    verdicts = {*rows["verdict"], *rows["by_interval"]}
    handles = [
        style.entry(style.Look(colour, "s"), verdict, linestyle="none")
        for verdict, colour in COLOURS.items()
        if verdict in verdicts
    ]
    if rows["left_open"].any():
        look = style.Look("black", "s")
        white = {"linestyle": "none", "markerfacecolor": "white"}
        handles.append(style.entry(look, "by interval alone", **white))
    return handles + [
        style.entry(style.Look("black", marker), name, linestyle="none")
        for marker, name in zip(MARKERS, series, strict=False)
    ]


def numbered_titles(rows: pd.DataFrame) -> pd.Series:
    """Return the titles of claims, with the number of the question."""
    return rows["headline"].map("{:.0f} ".format) + rows["title"]


def draw_scores(axis, rows: pd.DataFrame, titles: list[str], series: list[str]) -> None:
    """Draw estimates with intervals and margins of one setting, the series one below another."""
    if not titles:
        axis.set_axis_off()
        return
    axis.axvline(0, color=style.ZERO, linewidth=0.6)
    for row in rows.itertuples():
        number = series.index(row.series)
        y = titles.index(row.row) + 0.36 * (number - (len(series) - 1) / 2)
        estimate, low, high = (getattr(row, name) / row.sd for name in NUMBERS)
        look = {"color": COLOURS[row.by_interval], "linewidth": 0.9}
        face = "white" if row.left_open else look["color"]
        axis.plot([low, high], [y, y], **look, zorder=3)
        singles = np.divide(row.alone, row.sd)
        axis.plot(singles, [y] * len(singles), "|", **look | {"markersize": 3, "mew": 0.5})
        place = np.clip(estimate, -LIMIT, LIMIT)
        axis.plot(place, y, MARKERS[number], markersize=2.2, markerfacecolor=face, zorder=4, **look)
        if row.dense_loses:
            axis.annotate("†", (place, y), (4, 0), textcoords="offset points", **TEXT)
        ends = [titles.index(row.row) - 0.45, titles.index(row.row) + 0.45]
        axis.plot([row.margin / row.sd] * 2, ends, ":", color="black", linewidth=0.7)
    axis.set(ylim=(len(titles) - 0.5, -0.5), xlim=(-LIMIT, LIMIT))
    axis.set_xscale("symlog", linthresh=LINEAR, linscale=0.8)  # shows the margin and the largest
    ticks = [-1, -LINEAR, 0, LINEAR, 1]
    axis.set_xticks(ticks, [f"{tick:g}".replace("0.", ".").replace("-", "−") for tick in ticks])
    axis.minorticks_off()
    label_rows(axis, titles)
    axis.tick_params(axis="x", labelsize=5.5)


def write_numbers(axis, rows: pd.DataFrame, titles: list[str]) -> None:
    """Write the estimates that are not scores as numbers, one below another within a row."""
    if not titles:
        axis.set_axis_off()
        return
    for title, of_row in rows.groupby("row", sort=False):
        places = (np.arange(len(of_row)) + 0.5) / len(of_row)
        for place, row in zip(places, of_row.itertuples(), strict=True):
            number = "–" if row.verdict == TOO_FEW else format_number(row.estimate, row.unit)
            text = f"({number})" if row.left_open else number
            text += ", time" * (row.metric == "seconds_ratio")
            y = titles.index(title) - 0.5 + place
            axis.text(0.5, y, text, color=COLOURS[row.by_interval], **TEXT)
    axis.set(ylim=(len(titles) - 0.5, -0.5), xlim=(0, 1), xticks=[])
    label_rows(axis, titles)
    axis.spines[["left", "bottom"]].set_visible(False)


def format_number(estimate: float, unit: str) -> str:
    """Return a number without its interval, in two digits or more."""
    number = f"{estimate:.0f}" if estimate >= 10 else f"{estimate:#.2g}" if estimate else "0"
    return f"{number}{'×' if unit == 'times' else ''}"


def label_rows(axis, titles: list[str]) -> None:
    """Write the titles beside the rows, and a band behind every second one."""
    axis.set_yticks(range(len(titles)), [textwrap.fill(title, CHARACTERS) for title in titles])
    axis.tick_params(axis="y", length=0, labelsize=5.5)
    for label in axis.get_yticklabels():
        label.set_linespacing(0.95)
    for place in range(0, len(titles), 2):
        axis.axhspan(place - 0.5, place + 0.5, color="#F3F3F3", zorder=0)
