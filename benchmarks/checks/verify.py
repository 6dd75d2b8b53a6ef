"""Whether what is committed belongs together: `make verify`.

Of every profile under results/: each table is the file that its provenance describes and was measured under today's profile; its summary
follows from its rows; the verdicts follow from the summaries; each figure was drawn from the table that is
there, by the code that draws it, and is the file that was drawn.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import claims, tables
from benchmarks.figures.base import Figure
from benchmarks.report import render
from benchmarks.runtime.files import read_json
from benchmarks.runtime.fingerprints import drawing_code, row_code
from benchmarks.spec.profile import PROFILES, Profile, load_profile, profile_digest

KEYS = {"command", "git_commit", "packages", "hardware", "profile", "profile_digest", "code_digest", "replicates", "seeds", "wall_seconds",
        "intervals", "sha256"}  # fmt: skip
CHECKED = "check"  # the profile whose tables `make check` compares with: neither drawn nor judged
TOLERANCE = 1.5e-4  # numbers are written with four digits


def verify_all(figures: Mapping[str, Figure]) -> int:
    """Checks every profile that has results and a file of its own, says what was checked, and each fault in a line. Exit code: 0, or 2."""
    speed = (
        [("speed", _hashes(tables.RESULTS, "speed"))]
        if (tables.RESULTS / "speed.json").exists()
        else []
    )
    checked, faults, profiles = (
        len(speed),
        [f"{name}: {fault}" for name, many in speed for fault in many],
        [],
    )
    for folder in sorted(path for path in tables.RESULTS.iterdir() if path.is_dir()):
        if not (PROFILES / f"{folder.name}.toml").exists() or not list(folder.glob("*.json")):
            continue
        if folder.name == "architectures":
            found = [("cost", _hashes(folder, "cost"))]
        else:
            profiles.append(load_profile(folder.name))
            found = list(verify_profile(profiles[-1], figures))
        checked += len(found)
        faults += [f"{folder.name}/{name}: {fault}" for name, many in found for fault in many]
    for fault in faults:
        print(f"fault: {fault}")
    for text in _measured_by(profiles):
        print(text)
    restore = "; git restore results figures brings back what was committed" if faults else ""
    print(f"verify: {checked} parts checked, {len(faults)} faults{restore}")
    return 2 if faults else 0


def _measured_by(profiles: list[Profile]) -> Iterator[str]:
    """Which tables other code than today's has measured. No fault, for not every change of code changes numbers; `make check` tells."""
    for profile in profiles:
        other: dict[str, list[str]] = {}
        for path in sorted(tables.folder(profile).glob("*.json")):
            with suppress(ValueError):
                provenance = read_json(path)
                if provenance.get("code_digest") != row_code(profile):
                    other.setdefault(str(provenance.get("git_commit"))[:12], []).append(path.stem)
        for commit, names in other.items():
            yield f"{profile.name}: no fault, but measured by the code of commit {commit}, which has changed since: {', '.join(names)}"


def verify_profile(
    profile: Profile, figures: Mapping[str, Figure]
) -> Iterator[tuple[str, list[str]]]:
    """Each table of the profile, with what is wrong with it."""
    tables.tidy(profile)
    names = [path.stem for path in sorted(tables.folder(profile).glob("*.json"))]
    drawn = _drawn(profile)
    for name in names:
        faults = _hashes(tables.folder(profile), name)
        if not faults:
            faults = [*_provenance(profile, name), *_summary(profile, name, figures)]
            faults += (
                _drawing(profile, name, drawn)
                if name in figures and profile.name != CHECKED
                else []
            )
        yield name, faults
    written = {
        path.stem
        for kind in ("csv", "parquet")
        for path in tables.folder(profile).glob(f"*.{kind}")
    } - {"claims"}
    for name in sorted(written - set(names)):
        yield name, [f"{name}.json, which says where its numbers come from, is missing"]
    if names and profile.name != CHECKED:
        yield "claims", _verdicts(profile, figures)
        yield "report", _page(profile, figures, drawn)


def _hashes(folder: Path, name: str) -> list[str]:
    try:
        provenance = read_json(folder / f"{name}.json")
    except ValueError:
        return [f"{name}.json is no readable JSON"]
    if not isinstance(provenance.get("sha256"), dict) or not provenance["sha256"]:
        return [f"{name}.json names no files with their hashes"]
    return [
        f"{file} is missing or not the file that {name}.json describes"
        for file in tables.changed_files(folder, provenance["sha256"])
    ]


def _provenance(profile: Profile, name: str) -> list[str]:
    provenance = read_json(tables.folder(profile) / f"{name}.json")
    faults = [f"{name}.json does not say {key}" for key in sorted(KEYS - set(provenance))]
    if provenance.get("profile_digest") != profile_digest(profile):
        faults.append(f"it was measured under other settings than profile {profile.name} has now")
    if "+changes" in provenance.get("git_commit", ""):
        faults.append("it was measured by sources that were never committed")
    return faults


def _summary(profile: Profile, name: str, figures: Mapping[str, Figure]) -> list[str]:
    """The CSV against a summary made anew from the rows."""
    rows = tables.folder(profile) / f"{name}.parquet"
    if not rows.exists() or name not in figures:
        return []
    try:
        text = tables.summarized(profile, name, figures[name].summarize).to_csv(index=False)
    except ValueError as error:
        return [str(error)]
    found = pd.read_csv(tables.folder(profile) / f"{name}.csv")
    return _differences(
        pd.read_csv(io.StringIO(text)), found, f"{name}.csv", "its rows"
    ) or _reference(profile, name, found)


def _reference(profile: Profile, name: str, summary: pd.DataFrame) -> list[str]:
    """Beside a table of all replicates lies its summary as the reference, which smaller runs are held against."""
    replicates = read_json(tables.folder(profile) / f"{name}.json").get("replicates", [])
    if not len(replicates) == profile.replicates > 1:
        return []
    path = tables.folder(profile) / tables.REFERENCE / f"{name}.csv"
    if not path.exists():
        return [f"{tables.REFERENCE}/{name}.csv is missing"]
    return _differences(
        tables.over_all_objectives(summary),
        pd.read_csv(path),
        f"{tables.REFERENCE}/{name}.csv",
        f"{name}.csv",
    )


def _differences(made: pd.DataFrame, found: pd.DataFrame, what: str, source: str) -> list[str]:
    if list(made.columns) != list(found.columns) or len(made) != len(found):
        return [f"{what} has other rows or columns than follow from {source}"]
    for column in made:
        one, other = made[column], found[column]
        if pd.api.types.is_numeric_dtype(one) and pd.api.types.is_numeric_dtype(other):
            same = np.allclose(
                one.astype(float), other.astype(float), rtol=1e-6, atol=TOLERANCE, equal_nan=True
            )
        else:
            same = all(_alike(str(a), str(b)) for a, b in zip(one, other, strict=True))
        if not same:
            return [f"the column {column} of {what} does not follow from {source}"]
    return []


def _alike(one: str, other: str) -> bool:
    """Whether two texts say the same; numbers in them, one for each replicate, within TOLERANCE."""
    if one == other:
        return True
    try:
        parts = [[float(part) for part in text.split("|")] for text in (one, other)]
    except ValueError:
        return False
    return len(parts[0]) == len(parts[1]) and np.allclose(
        *parts, rtol=1e-6, atol=TOLERANCE, equal_nan=True
    )


def _drawing(profile: Profile, name: str, drawn: dict, table: str = "") -> list[str]:
    if not isinstance(drawn.get(name), dict) or not {"table", "files"} <= set(drawn[name]):
        return [f"no figure of {name} was drawn"]
    faults, path = [], tables.folder(profile) / (table or f"{name}.csv")
    if not path.exists() or drawn[name]["table"] != tables.sha256(path):
        faults.append(f"the figure of {name} was drawn from another table")
    if drawn[name].get("code") != drawing_code(name):
        faults.append(f"the figure of {name} was drawn by other code than there is now")
    changed = tables.changed_files(tables.FIGURES / profile.name, drawn[name]["files"])
    faults += [f"{file} is missing or not what was drawn" for file in changed]
    return faults


def _drawn(profile: Profile) -> dict:
    """What is written down of drawings; nothing where that cannot be read."""
    try:
        return tables.read_drawings(profile)
    except ValueError:
        return {}


def _page(profile: Profile, figures: Mapping[str, Figure], drawn: dict) -> list[str]:
    path = tables.FIGURES / profile.name / render.REPORT
    if not path.exists():
        return [f"{render.REPORT} is missing"]
    faults = _drawing(profile, "report", drawn, "claims.csv")
    said, now = (
        render.read_made_from(path.read_text(encoding="utf-8", errors="replace")),
        render.made_from(profile, figures),
    )
    changed = sorted(name for name in {*said, *now} if said.get(name) != now.get(name))
    return faults + (
        [f"{render.REPORT} was made from other files than there are now: {', '.join(changed)}"]
        if changed
        else []
    )


def _verdicts(profile: Profile, figures: Mapping[str, Figure]) -> list[str]:
    path = tables.folder(profile) / "claims.csv"
    if not path.exists():
        return ["claims.csv is missing"]
    folder = tables.folder(profile)
    there = [
        name for name in figures if tables.has_table(profile, name) and not _hashes(folder, name)
    ]
    if any(tables.NEEDED - set(read_json(folder / f"{name}.json")) for name in there):
        return []  # which is a fault of that table
    made = claims.verdicts(
        {name: tables.read_table(profile, name)[0] for name in there},
        claims.claims_for(
            profile, [name for name, figure in figures.items() if figure.why_unsupported(profile)]
        ),
    )
    made, found = pd.read_csv(io.StringIO(made.to_csv(index=False))), pd.read_csv(path)
    damaged = [
        name for name in figures if tables.has_table(profile, name) and name not in there
    ]  # whose faults are told elsewhere
    return _differences(
        made[~made["figure"].isin(damaged)],
        found[~found["figure"].isin(damaged)],
        "claims.csv",
        "the tables",
    )
