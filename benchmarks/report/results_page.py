"""Verdicts for readers: docs/results.md has them all, a table in the README the headline ones.

`make claims` writes both.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping

import pandas as pd

from benchmarks.analysis.claims import (
    MARKS,
    VERDICTS,
    claims_for,
    criterion,
    interval_text,
    is_decided,
    read_document,
    source_text,
)
from benchmarks.figures.base import Figure
from benchmarks.report.render import pictures_of
from benchmarks.runtime.files import write_text
from benchmarks.runtime.fingerprints import ROOT
from benchmarks.spec.profile import Profile

RESULTS_PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
BEGIN, END = "<!-- headline: written by make claims -->", "<!-- end of headline -->"

HEAD = """# Results of the lab

Written by `make claims` from the committed tables; not edited by hand. A verdict says whether the
whole interval meets the criterion (reproduced), none of it does (not reproduced), or neither
(undecided). ✓, ✗ and ? are the same for each replicate alone, – is too few prompts for one
([method](method.md#intervals-and-verdicts)).
"""
TABLE = ["| condition | verdict | estimate [interval] | replicates |", "|---|---|---|---|"]


def write(profile: Profile, verdicts: pd.DataFrame, figures: Mapping[str, Figure]) -> None:
    """Write docs/results.md and the table of the README."""
    write_text(RESULTS_PAGE, results_page(profile, verdicts, figures))
    write_text(README, with_headline(README.read_text(encoding="utf-8"), profile, verdicts))


def results_page(profile: Profile, verdicts: pd.DataFrame, figures: Mapping[str, Figure]) -> str:
    """Return the page in Markdown, with a section for each figure that has claims.

    Args:
        profile: Whose pictures are shown, one of each figure.
        verdicts: As `claims.pooled_verdicts` returns them.
        figures: By name.
    """
    counts = verdicts["verdict"].value_counts()
    listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)
    parts = [HEAD, f"{len(verdicts)} verdicts: {listed}.\n"]
    for name, rows in verdicts.groupby(pd.Categorical(verdicts["figure"], [*figures])):
        title = figures[name].title
        parts.append(f"## {title}\n")
        for path in pictures_of(profile, name)[:1]:
            parts.append(f"![{title}]({os.path.relpath(path, RESULTS_PAGE.parent)})\n")
        parts += [claim_markdown(claim) for _, claim in rows.groupby("claim", sort=False)]
    return "\n".join(parts)


def with_headline(readme: str, profile: Profile, verdicts: pd.DataFrame) -> str:
    """Return the README with its table of headline verdicts written anew."""
    block = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    return block.sub(lambda _: headline_table(profile, verdicts), readme)


def headline_table(profile: Profile, verdicts: pd.DataFrame) -> str:
    """Return the verdicts that claims.toml names as headlines, a line for each claim."""
    headline = read_document()["headline"]
    conditions = {(claim.name, claim.variant): claim.condition for claim in claims_for(profile)}
    by_key = verdicts.set_index(["claim", "condition"])
    columns = headline["columns"]
    rows = [["claim", *columns], ["---"] * (1 + len(columns))]
    for name, (statement, *shown) in headline["rows"].items():
        keys = [(name, conditions[name, variant]) if variant != "-" else None for variant in shown]
        cells = [_cell(by_key.loc[key]) if key else "" for key in keys]
        rows.append([statement, *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(row: pd.Series) -> str:
    """Return a verdict with its estimate and interval."""
    return f"{MARKS[row['verdict']]} {interval_text(row, '.2f')}".replace("-", "−")


def claim_markdown(rows: pd.DataFrame) -> str:
    """Return one claim with its verdicts, a line for each condition."""
    first = rows.iloc[0]
    statement = textwrap.fill(f"**{first['statement']}**", 100)
    lines = [statement, f"({source_text(first)}; needs {criterion(first)})", "", *TABLE]
    for _, row in rows.iterrows():
        numbers = interval_text(row, ".2f") if is_decided(row) else ""
        cells = (row["condition"] or "–", row["verdict"], numbers, row["marks"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])
