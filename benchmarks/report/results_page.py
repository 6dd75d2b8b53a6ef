"""`docs/results.md`: the verdict on every claim, a section for each figure, written by `make claims`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import pandas as pd

from benchmarks.analysis.claims import VERDICTS, criterion, interval_text
from benchmarks.figures.base import Figure

HEAD = """# Results of the lab

Written by `make claims` from the committed tables; not edited by hand. A verdict says whether the
whole interval meets the criterion (reproduced), none of it does (not reproduced), or neither
(undecided). ✓, ✗ and ? are the same for each replicate alone.
"""
TABLE = ["| condition | verdict | estimate [interval] | replicates |", "|---|---|---|---|"]


def results_page(
    verdicts: pd.DataFrame, figures: Mapping[str, Figure], pictures: Mapping[str, str]
) -> str:
    """Return the page in Markdown.

    Args:
        verdicts: As `claims.pooled_verdicts` returns them.
        figures: By name; each with claims gets a section.
        pictures: Path of a figure's picture from the page, by name; not every figure has one.
    """
    counts = verdicts["verdict"].value_counts()
    listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)
    parts = [HEAD, f"{len(verdicts)} verdicts: {listed}.\n"]
    for name, figure in figures.items():
        rows = verdicts[verdicts["figure"] == name]
        if rows.empty:
            continue
        parts.append(f"## {figure.title}\n")
        if name in pictures:
            parts.append(f"![{figure.title}]({pictures[name]})\n")
        parts += [_claim(claim) for _, claim in rows.groupby("claim", sort=False)]
    return "\n".join(parts)


def _claim(rows: pd.DataFrame) -> str:
    """Return one claim with its verdicts, a line for each condition."""
    first = rows.iloc[0]
    statement = textwrap.fill(f"**{first['statement']}**", 100)
    lines = [statement, f"({first['source']}; needs {criterion(first)})", "", *TABLE]
    for _, row in rows.iterrows():
        numbers = "" if row["verdict"] == "not measured" else interval_text(row, ".2f")
        cells = (row["condition"] or "–", row["verdict"], numbers, row["marks"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
