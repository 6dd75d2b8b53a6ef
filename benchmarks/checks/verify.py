"""Check that the tables, verdicts and drawings of a profile are consistent; change nothing.

The lab's committed models are compared with their digests, whatever the profile. A file is damaged
if it differs from the one that its provenance describes. A file made from other tables than the
present ones is outdated, as claims and report are after a run of a single figure: it can be
recreated without measuring.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from benchmarks.analysis import claims, tables
from benchmarks.checks import assets
from benchmarks.figures.base import Figure
from benchmarks.report import editions, forest, render
from benchmarks.runtime.fingerprints import drawing_code
from benchmarks.spec.profile import Profile

TOLERANCE = {"rtol": 1e-6, "atol": 1.5e-4}  # summaries are written with four digits


def run(profile: Profile, figures: Mapping[str, Figure]) -> int:
    """Print what is damaged and what is outdated; return 1 if anything is damaged, else 0."""
    folder = tables.folder(profile)
    damaged = [*damage(folder), *assets.damage(assets.ASSETS)]
    for text in damaged:
        print(f"damaged: {text}")
    outdated = [] if damaged else list(outdated_files(profile, figures))
    for text in outdated:
        print(f"outdated: {text}")
    state = f"{len(damaged)} damaged" if damaged else "all whole"
    count = sum(1 for _ in folder.glob("*.json"))
    print(f"verify: {count} tables of profile {profile.name}, {state}; {len(outdated)} outdated")
    return 1 if damaged else 0


def damage(folder: Path) -> Iterator[str]:
    """Yield a sentence for each file in a folder that is not what its provenance describes."""
    for path in sorted(folder.glob("*.json")):
        try:
            hashes = tables.read_entries(path)["sha256"]
        except ValueError as error:
            yield str(error)
            continue
        for file in tables.changed_files(folder, hashes):
            yield f"{path.with_name(file)} is missing or not the file that {path.name} describes"


def outdated_files(profile: Profile, figures: Mapping[str, Figure]) -> Iterator[str]:
    """Yield a sentence for each outdated file, with how to recreate it where rows are kept."""
    names = tables.with_tables(profile, figures)
    summaries = {}
    for name in names:
        summaries[name], stale = tables.read_table(profile, name)
        if stale:
            yield f"{name}.csv was {stale}"
        path = tables.folder(profile) / f"{name}.csv"
        if not follows(tables.summarized(profile, name, figures[name].summarize), path):
            yield f"{path.name} does not follow from its rows: {_make('summaries', profile)}"
    verdicts = claims.judge(profile, figures, summaries)
    path = tables.folder(profile) / "claims.csv"
    if not follows(verdicts, path):
        yield f"{path.name} does not follow from the tables: {_make('claims', profile)}"
    yield from outdated_drawings(profile, figures)


def outdated_drawings(profile: Profile, figures: Mapping[str, Figure]) -> Iterator[str]:
    """Yield a sentence for each outdated drawing, and for an outdated report."""
    try:
        drawn = tables.read_drawings(profile)
    except ValueError as error:
        yield str(error)
        return
    targets = {name: name for name in tables.with_tables(profile, figures)}
    targets |= {forest.NAME: "claims"}
    first = editions.FIRST_EDITION.get(profile.name)
    if first and (tables.RESULTS / first / "claims.csv").exists():
        targets |= {editions.NAME: "claims"}
    for name, target in targets.items():
        remedy = _make(target, profile)
        if name not in drawn:
            yield f"{name} is not drawn: {remedy}"
            continue
        drawing = drawn[name]
        if tables.changed_files(tables.folder(profile), {f"{target}.csv": drawing["table"]}):
            yield f"{name} is drawn from another table: {remedy}"
        elif drawing["code"] != drawing_code(name):
            yield f"{name} is drawn by other code: {remedy}"
        for file in tables.changed_files(tables.FIGURES / profile.name, drawing["files"]):
            yield f"{file} is missing or not what was drawn: {remedy}"
    page = tables.FIGURES / profile.name / render.REPORT
    text = page.read_text(encoding="utf-8", errors="replace") if page.exists() else ""
    report = drawn.get("report", {"code": None, "files": {}})
    shown = render.read_made_from(text), report["code"]
    if shown != (render.made_from(profile, figures), drawing_code("report")):
        yield f"{page.name} does not show the present files: {_make('figures', profile)}"
    elif tables.changed_files(page.parent, report["files"]):
        yield f"{page.name} is not what was drawn: {_make('figures', profile)}"


def follows(table: pd.DataFrame, path: Path) -> bool:
    """Return whether a file holds this table, but for the last digit."""
    if not path.exists():
        return False
    written = _read_whole(io.StringIO(table.to_csv(index=False)))
    try:
        pd.testing.assert_frame_equal(written, _read_whole(path), check_dtype=False, **TOLERANCE)
    except (AssertionError, ValueError):  # other numbers, or no table at all
        return False
    return True


def _make(target: str, profile: Profile) -> str:
    return f"make {target} {profile.make_options} recreates it"


def _read_whole(source: Path | io.StringIO) -> pd.DataFrame:
    """Read a CSV file whose column types follow from all of its rows, not from pieces of them."""
    return pd.read_csv(source, low_memory=False)
