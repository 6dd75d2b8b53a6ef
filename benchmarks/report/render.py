"""`make report`: one self-contained page, figures/PROFILE/report.html: the verdicts, the junctions, every figure with its table.

The page is report.html with its places filled; it asks no network. What it was made from stands in it as hashes (`made_from`).
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape, unescape
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.analysis import claims, tables
from benchmarks.analysis.estimates import label
from benchmarks.figures import junctions, style
from benchmarks.figures.base import Figure
from benchmarks.runtime.files import read_frame, write_text
from benchmarks.spec.profile import Profile

TEMPLATE = Path(__file__).with_name("page.html.j2")
REPORT = "report.html"
COLOURS = 96  # of the pictures in the page, which keeps it small
ROWS = 150  # of a table in the page
LEFT_OUT = (
    "seeds",
    "estimate_by_replicate",
    "low_by_replicate",
    "high_by_replicate",
    "beta_by_replicate",
    "versus_ratio",
)
NUMBERS = ("estimate", "low", "high")


def write(profile: Profile, figures: Mapping[str, Figure]) -> Path:
    """Writes the page and returns its path. Errors: FileNotFoundError where there are no verdicts to begin with."""
    verdicts = tables.folder(profile) / "claims.csv"
    if not verdicts.exists():
        raise FileNotFoundError(
            f"{verdicts} is missing: make claims PROFILE={profile.name} writes it"
        )
    drawn = [
        name for name in figures if tables.has_table(profile, name) and figures[name].own_section
    ]
    viewer = tables.has_table(profile, "junctions")
    provenance = [
        tables.read_provenance(profile, name) for name in [*drawn, *(["junctions"] * viewer)]
    ]
    page, found = TEMPLATE.read_text(encoding="utf-8"), pd.read_csv(verdicts).fillna({"unit": ""})
    counts = found["verdict"].value_counts()
    parts = {
        "TITLE": f"Sparse Inference-time Alignment on the profile {escape(profile.name)}",
        "INTRODUCTION": _introduction(profile, provenance),
        "CONTENTS": "".join(
            f'<li><a href="#{name}">{name}</a></li>'
            for name in ("verdicts", *(["viewer"] * viewer), *drawn)
        ),
        "COUNTS": ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in claims.VERDICTS),
        "KINDS": "".join(
            f'<option value="{verdict}">{verdict}</option>'
            for verdict in claims.VERDICTS
            if verdict in counts
        ),
        "VERDICTS": _verdicts(found),
        "VIEWER": ""
        if viewer
        else f"<p>Not measured: <code>make junctions PROFILE={escape(profile.name)}</code>.</p>",
        "FIGURES": "\n".join(_figure(profile, figures[name]) for name in drawn),
        "FOOTER": f"Made by <code>make report PROFILE={escape(profile.name)}</code> from the tables with these SHA-256 sums: "
        f'<span id="made-from">{escape(json.dumps(made_from(profile, figures)))}</span>',
        "DATA": _json(view_data(profile) if viewer else None),
    }
    page = re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match[1]], page)
    path = tables.FIGURES / profile.name / REPORT
    write_text(path, page)
    return path


def made_from(profile: Profile, figures: Mapping[str, Figure]) -> dict[str, str]:
    """The first digits of the hash of every file that the page shows."""
    folder = tables.folder(profile)
    names = [name for name in figures if tables.has_table(profile, name)]
    files = [
        TEMPLATE,
        folder / "claims.csv",
        folder / "junctions.parquet",
        *(folder / f"{name}.csv" for name in names),
    ]
    files += [path for name in names for path in pictures_of(profile, name)]
    return {file.name: tables.sha256(file)[:16] for file in files if file.exists()}


def pictures_of(profile: Profile, name: str) -> list[Path]:
    """Those of a figure: NAME.png and any NAME-what.png."""
    files = tables.read_drawings(profile).get(name, {}).get("files", {})
    paths = [
        tables.FIGURES / profile.name / file
        for file in sorted(files, key=lambda file: Path(file).stem)
    ]
    return [path for path in paths if path.suffix == ".png" and path.exists()]


def read_made_from(page: str) -> dict[str, str]:
    """What a written page says that it was made from; empty if it says nothing, or is damaged there."""
    found = re.search(r'<span id="made-from">([^<]*)</span>', page)
    try:
        return json.loads(unescape(found[1])) if found else {}
    except ValueError:
        return {}


def _json(found: object) -> str:
    """As a script element can hold it."""
    return json.dumps(found, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )


def _introduction(profile: Profile, provenance: Sequence[Mapping]) -> str:
    """provenance: of every table."""
    counts = sorted({len(one["replicates"]) for one in provenance})
    many = f"{' or '.join(map(str, counts))} replicate{'s' if counts[-1] > 1 else ''} of {profile.replicates}"
    commits = ", ".join(
        f"<code>{escape(commit[:12])}</code>"
        for commit in sorted({one["git_commit"] for one in provenance})
    )
    evaluation, last = profile.evaluation, provenance[-1]
    return (
        f"<p>{escape(profile.description)}</p><p>{evaluation.prompts_per_objective} prompts of each of three objectives × {evaluation.samples} samples, {many}. "
        f'Intervals: {escape(tables.intervals(profile))}.</p><p class="soft">Measured at commit {commits} on '
        f"{last['hardware']['cores']} cores of {escape(last['hardware']['processor'])}; torch {escape(last['packages']['torch'])}, "
        f"transformers {escape(last['packages']['transformers'])}.</p>"
    )


def _verdicts(found: pd.DataFrame) -> str:
    bodies = []
    for (_, says, source), part in found.groupby(["claim", "says", "source"], sort=False):
        rows = [
            f'<tr class="claim"><th colspan="7" scope="rowgroup">{escape(says)} <span class="soft">{escape(source)}</span></th></tr>'
        ]
        rows += [_verdict(row) for _, row in part.iterrows()]
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    return "\n".join(bodies)


def _verdict(row: pd.Series) -> str:
    condition = escape(row["condition"]) if isinstance(row["condition"], str) else "–"
    kind = row["verdict"].replace(" ", "-")
    cells = [f"<td>{condition}</td>", f'<td class="verdict {kind}">{row["verdict"]}</td>']
    if row["verdict"] == "not measured":
        cells.append('<td colspan="5"></td>')
    else:
        estimate, low, high = (claims.told(row[name], row["unit"], ".3g") for name in claims.ENDS)
        numbers = (
            estimate,
            f"{low} to {high}",
            claims.needs(row),
            claims.marks(row),
            f"{row['n']:.0f}",
        )
        cells += [f'<td class="number">{text}</td>' for text in numbers]
    return f'<tr data-verdict="{row["verdict"]}">{"".join(cells)}</tr>'


def view_data(profile: Profile) -> dict:
    """What the viewer shows of the first replicate: methods, words, and by objective the prompts with every method's response."""
    rows = read_frame(tables.folder(profile) / "junctions.parquet")
    rows = rows[rows["replicate"] == rows["replicate"].min()].astype(
        dict.fromkeys(("objective", "asked", "word", *junctions.CELL[:2]), str)
    )
    words = {word: i for i, word in enumerate(sorted(set(rows["word"])))}
    rows = rows.assign(key=[_key(*cell) for cell in rows[junctions.CELL].itertuples(index=False)])
    named = rows.drop_duplicates("key")
    prompts: dict[str, list[dict]] = {}
    for (objective, _), of_prompt in rows.groupby(["objective", "prompt"]):
        one = {
            key: _response(part.sort_values(["step", "rank"]), words)
            for key, part in of_prompt.groupby("key")
        }
        prompts.setdefault(objective, []).append(
            {"asked": of_prompt["asked"].iloc[0].strip(), "responses": one}
        )
    return {
        "methods": {
            row.key: style.described(row.method, row.target_ratio, row.value_model)
            for row in named.itertuples()
        },
        "base": "base",
        "words": list(words),
        "spaced": profile.words,
        "highest": math.log(profile.decoding.candidates),
        "score": label(profile, profile.score),
        "prompts": prompts,
    }


def _key(method: str, value_model: str, ratio: float) -> str:
    return " ".join(filter(None, (method, value_model, f"{ratio:g}" if 0 < ratio < 1 else "")))


def _response(part: pd.DataFrame, words: Mapping[str, int]) -> dict:
    tokens = []
    for _, step in part.groupby("step", sort=True):
        value = [None if np.isnan(x) else round(float(x), 2) for x in step["value"]]
        chances = [
            np.exp(step[name].astype(float)).round(4).tolist() for name in ("likelihood", "tilted")
        ]
        candidates = [
            list(one)
            for one in zip(
                step["word"].map(words).tolist(), chances[0], value, chances[1], strict=True
            )
        ]
        first = step.iloc[0]
        places = {name: int(np.argmax(step[name].to_numpy())) for name in ("chosen", "unsteered")}
        tokens.append(
            {
                "entropy": round(float(first["entropy"]), 3),
                "steered": bool(first["steered"]),
                **places,
                "candidates": candidates,
            }
        )
    return {"score": round(float(part["score"].iloc[0]), 2), "tokens": tokens}


def _figure(profile: Profile, figure: Figure) -> str:
    title = escape(figure.title)
    name, shown = figure.name, ""
    for picture in pictures_of(profile, name):
        data, caption = _picture(picture)
        image = f'<img loading="lazy" alt="{escape(title)}" src="data:image/png;base64,{data}">'
        shown += f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
    summary = tables.read_summary(tables.folder(profile) / f"{name}.csv")
    stale = tables.read_table(profile, name)[1]
    warning = (
        "<p><strong>Stale: measured under other settings than the profile has now.</strong></p>"
        if stale
        else ""
    )
    return (
        f'<section id="{name}"><h2>{title}</h2>{warning}{shown}<p><code>make {name} PROFILE={escape(profile.name)}</code> draws it from '
        f"<code>results/{escape(profile.name)}/{name}.csv</code>; with <code>FRESH=1</code> it is measured again.</p>"
        f"{_table(summary, profile, figure)}</section>"
    )


def _picture(path: Path) -> tuple[str, str]:
    """A figure in fewer colours, as base64, and its caption."""
    with Image.open(path) as image:
        caption = image.info.get("Description", "")
        small, out = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE), io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode(), caption


def _table(summary: pd.DataFrame, profile: Profile, figure: Figure) -> str:
    """The rows that count: of the score where there is one (or those that the figure names), over all objectives where it is so measured, and over all
    families where there is more than differences; and the columns that say something."""
    part, said = summary, []
    reported = (profile.score,) if figure.reported is None else figure.reported
    shown = (
        [metric for metric in reported if (part["metric"] == metric).any()]
        if "metric" in part
        else []
    )
    if shown:
        part = part[part["metric"].isin(shown)]
        said.append(", ".join(shown))
    for column, value in (("objective", "all"), ("family", "all")):
        levels = part[part["versus"] == ""] if column == "family" and "versus" in part else part
        if column in part and (levels[column] == value).any():
            part = part[part[column] == value]
            said.append(f"over all {'objectives' if column == 'objective' else 'families'}")
    part = _relevant_first(part, profile)
    whole, part = len(part), part.head(ROWS)
    said += [f"the first {ROWS} of {whole} such"] if whole > ROWS else []
    part = part[
        [
            column
            for column in part
            if column not in LEFT_OUT and part[column].replace("", np.nan).notna().any()
        ]
    ]
    head = "".join(f'<th scope="col">{escape(column.replace("_", " "))}</th>' for column in part)
    rows = (
        "".join(_cell(column, value) for column, value in zip(part, row, strict=True))
        for row in part.itertuples(index=False)
    )
    body = "".join(f"<tr>{cells}</tr>" for cells in rows)
    return (
        f"<details><summary>Table: {len(part)} of {len(summary)} rows{' (' + '; '.join(said) + ')' if said else ''}</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table of {figure.name}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _relevant_first(part: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Estimates before differences, and of each the first family's, which most pictures show, before those of all and of others."""
    order = {
        family: number
        for number, family in enumerate((profile.families[0], "all", *profile.families[1:]))
    }
    keys = pd.DataFrame(index=part.index)
    if "versus" in part:
        keys["difference"] = part["versus"] != ""
    if "family" in part:
        keys["family"] = part["family"].map(order).fillna(len(order))
    return (
        part.loc[keys.sort_values(list(keys), kind="stable").index] if len(keys.columns) else part
    )


def _cell(column: str, value: object) -> str:
    if value is None or value is pd.NA or value != value:
        return "<td></td>"
    if isinstance(value, float):
        return (
            f'<td class="number">{value:.3g}</td>'
            if column in NUMBERS or not value.is_integer()
            else f'<td class="number">{value:.0f}</td>'
        )
    return (
        f'<td class="number">{value}</td>'
        if isinstance(value, int) and not isinstance(value, bool)
        else f"<td>{escape(str(value))}</td>"
    )
