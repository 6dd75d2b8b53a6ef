"""Result tables on disk: NAME.parquet (rows), NAME.csv (summary), NAME.json (provenance), which change together."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from benchmarks.analysis.bootstrap import METHOD
from benchmarks.analysis.estimates import POOLED
from benchmarks.runtime.files import (
    CACHE,
    locked,
    read_frame,
    read_json,
    remove_leftovers,
    write_atomically,
    write_frame,
    write_text,
)
from benchmarks.runtime.fingerprints import ROOT, drawing_code, row_code
from benchmarks.runtime.workers import available_cores
from benchmarks.spec.profile import Profile, profile_digest

RESULTS, FIGURES = ROOT / "results", ROOT / "figures"
DRAWN, LOCK = "drawn.json", "lock"
NEEDED = {
    "sha256",
    "profile_digest",
    "code_digest",
    "replicates",
    "git_commit",
    "hardware",
    "packages",
}  # of a provenance
STAGING_SUFFIX = ".written"  # ends the name of a folder with what is to be moved into place
TEXTS = ("value_model", "versus", "search", "matched")
NOT_LABELS = {
    "ratio", "beta", "replicate", "estimate", "low", "high", "n", "seeds", "replicates", "versus_ratio",
    "entropy", "chosen",
}  # columns of a summary that hold results and not settings  # fmt: skip
PACKAGES = ("numpy", "pandas", "pyarrow", "torch", "transformers")


def folder(profile: Profile) -> Path:
    return RESULTS / profile.name


def write_table(
    profile: Profile,
    name: str,
    rows: pd.DataFrame | None,
    summary: pd.DataFrame,
    replicates: range,
    seconds: float,
    further: dict,
) -> None:
    """Write a table with its summary and provenance; `further` is added to the latter."""
    provenance = {
        **circumstances("benchmarks"),
        "profile": profile.name,
        "profile_digest": profile_digest(profile),
        "code_digest": row_code(profile),
        "replicates": list(replicates),
        "seeds": list(range(profile.evaluation.samples)),
        "wall_seconds": round(seconds, 1),
        "sha256": {},
        **further,
    }
    _write(profile, name, rows, summary, provenance)


def kept_rows(profile: Profile, name: str) -> pd.DataFrame | None:
    """The rows of a table, to add replicates to (of models: its summary); None if there is no table.

    Errors: ValueError if they were measured by other code or under other settings than today's.
    """
    if not has_table(profile, name):
        return None
    provenance = read_provenance(profile, name)
    if (provenance["profile_digest"], provenance["code_digest"]) != (
        profile_digest(profile),
        row_code(profile),
    ):
        raise ValueError(
            f"{name} was measured by other code or settings than today's, so no replicate can be added: use FRESH=1"
        )
    rows = folder(profile) / f"{name}.parquet"
    return read_frame(rows) if rows.exists() else pd.read_csv(folder(profile) / f"{name}.csv")


def stack(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables one below the other; texts as categories, whatever they are in the single ones."""
    table = pd.concat(frames, ignore_index=True)
    table.attrs = {key: note for frame in frames for key, note in frame.attrs.items()}
    texts = [
        name
        for name in table
        if not pd.api.types.is_numeric_dtype(table[name]) and table[name].dtype != bool
    ]
    return table.assign(
        **{
            name: table[name].astype("str").astype("category").where(table[name].notna())
            for name in texts
        }
    )


def rewrite_summary(
    profile: Profile, name: str, summarize: Callable[[pd.DataFrame, Profile], pd.DataFrame]
) -> None:
    """Summarises the rows of a table again; its provenance keeps what was said of the measuring."""
    provenance = read_provenance(profile, name) | {"summarized_at_commit": git_commit()}
    _write(profile, name, None, summarized(profile, name, summarize), provenance)


def summarized(
    profile: Profile, name: str, summarize: Callable[[pd.DataFrame, Profile], pd.DataFrame]
) -> pd.DataFrame:
    """The summary of the rows of a table. Errors: ValueError where they lack a column or a cell that it reads."""
    rows = read_frame(folder(profile) / f"{name}.parquet")
    try:
        return summarize(rows, profile)
    except LookupError as error:
        raise ValueError(
            f"{name}.parquet lacks what its summary reads ({error.args[0]}); if earlier code measured it, measure again with FRESH=1"
        ) from error


def _write(
    profile: Profile, name: str, rows: pd.DataFrame | None, summary: pd.DataFrame, provenance: dict
) -> None:
    """Table, summary and provenance change together: all are written aside, and then moved. rows: None leaves any as they are."""
    where = folder(profile)

    def write(aside: Path) -> None:
        aside.mkdir()
        (aside / f"{name}.csv").write_text(summary.to_csv(index=False), encoding="utf-8")
        if rows is not None:
            write_frame(aside / f"{name}.parquet", rows)
        hashes = provenance["sha256"] | {
            file.name: sha256(file) for file in sorted(aside.glob(f"{name}.*"))
        }
        said = provenance | {"intervals": intervals(profile), "sha256": hashes}
        (aside / f"{name}.json").write_text(
            json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )

    with locked(CACHE / profile.name / LOCK):
        _finish(where)
        write_atomically(where / f".{name}{STAGING_SUFFIX}", write)
        _finish(where)


def tidy(profile: Profile) -> None:
    """Moves what a killed process had written aside and not yet moved, and removes what it had not finished writing."""
    for where in (CACHE / profile.name, folder(profile), FIGURES / profile.name):
        remove_leftovers(where)
    if list(folder(profile).glob(f".*{STAGING_SUFFIX}")):
        with locked(CACHE / profile.name / LOCK):
            _finish(folder(profile))


def _finish(where: Path) -> None:
    for aside in sorted(where.glob(f".*{STAGING_SUFFIX}")):
        for file in [file for file in sorted(aside.rglob("*")) if file.is_file()]:
            target = where / file.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
        shutil.rmtree(aside)


def read_provenance(profile: Profile, name: str) -> dict:
    """Errors: FileNotFoundError if there is no table; ValueError if a file differs from what its provenance says, or that is damaged."""
    where = folder(profile)
    provenance = read_json(where / f"{name}.json")
    lacking = sorted(NEEDED - set(provenance))
    if lacking:
        raise ValueError(
            f"{where / name}.json does not say {', '.join(lacking)} (damaged?): restore it, or measure again with FRESH=1"
        )
    check_files(where, name, provenance)
    return provenance


def check_files(where: Path, name: str, provenance: dict) -> None:
    """Errors: ValueError if a file of the table differs from what its provenance says."""
    for file in changed_files(where, provenance["sha256"]):
        raise ValueError(
            f"{where / file} is missing or not the file that {name}.json describes: restore it, or measure again with FRESH=1"
        )


def changed_files(where: Path, hashes: Mapping[str, str]) -> list[str]:
    """Those that are missing or have another hash."""
    return [
        file
        for file, expected in hashes.items()
        if not (where / file).exists() or sha256(where / file) != expected
    ]


def read_table(profile: Profile, name: str) -> tuple[pd.DataFrame, bool]:
    """The summary, and whether it is stale: measured under another profile than today's. Errors: as `read_provenance`."""
    with locked(CACHE / profile.name / LOCK):  # else another run might be changing it
        stale = read_provenance(profile, name)["profile_digest"] != profile_digest(profile)
        return read_summary(folder(profile) / f"{name}.csv"), stale


def record_drawing(profile: Profile, name: str, made: Sequence[Path], table: str = "") -> None:
    """Writes down which table these files were drawn from (NAME.csv, or `table`), and by what code: DRAWN in the figures' folder."""
    with locked(CACHE / profile.name / LOCK):
        drawn = read_drawings(profile)
        from_table, files = (
            sha256(folder(profile) / (table or f"{name}.csv")),
            {file.name: sha256(file) for file in made},
        )
        drawn[name] = {"table": from_table, "code": drawing_code(name), "files": files}
        write_text(
            FIGURES / profile.name / DRAWN, json.dumps(drawn, indent=2, sort_keys=True) + "\n"
        )


def read_drawings(profile: Profile) -> dict:
    """What is written down of drawings, by the name of the table: hash of the table, digest of the code, hashes of the files.

    Errors: ValueError where it is damaged.
    """
    path = FIGURES / profile.name / DRAWN
    return read_json(path) if path.exists() else {}


def intervals(profile: Profile) -> str:
    """What the intervals are, in words."""
    return f"{profile.statistics.level:.0%} {METHOD}, {profile.statistics.resamples} resamples"


def has_table(profile: Profile, name: str) -> bool:
    return (folder(profile) / f"{name}.json").exists()


def committed_summary(profile: Profile, name: str) -> pd.DataFrame | None:
    """Return the committed summary over all replicates, which a smaller run is compared with.

    Outside a clone that is the summary on disk, so this comes before anything is written. None where there is no
    summary, or one of fewer replicates.
    """
    path = folder(profile) / f"{name}.csv"
    try:
        text = _git("show", f"HEAD:./{path.name}", cwd=path.parent)
    except (OSError, subprocess.CalledProcessError):
        if not path.exists():
            return None
        text = path.read_text(encoding="utf-8")
    summary = read_summary(io.StringIO(text))
    measured = summary["replicates"].max() if "replicate" in summary else 0
    return summary if measured == profile.replicates else None


def read_summary(source: Path | io.StringIO) -> pd.DataFrame:
    """Return a summary as it was written; a text that does not apply is the empty string."""
    as_text = dict.fromkeys((*TEXTS, "replicate"), str)
    frame = pd.read_csv(source, keep_default_na=False, na_values=[""], dtype=as_text)
    texts = [column for column in TEXTS if column in frame]
    return frame.assign(**{column: frame[column].fillna("") for column in texts})


def circumstances(module: str) -> dict[str, object]:
    """Under which this run of `python -m module` measures."""
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "packages": {package: version(package) for package in PACKAGES}
        | {"python": platform.python_version()},
        "hardware": hardware(),
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_commit() -> str:
    """The commit, with "+changes" where sources differ from it; "unknown" outside a clone or without git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + (
            "+changes" if _git("status", "--porcelain", "-uno", "--", "sia", "benchmarks") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str, cwd: Path = ROOT) -> str:
    command = ["git", "-C", cwd, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def hardware() -> dict[str, object]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": available_cores(),
        "memory_gib": round(memory),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def agreement(summary: pd.DataFrame, committed: pd.DataFrame) -> str:
    """Return in one sentence how the numbers of a smaller run lie against the committed ones."""
    labels = [name for name in summary.columns if name in committed and name not in NOT_LABELS]
    alone = _keyed(committed[committed["replicate"] == "0"], labels)
    pooled = _keyed(committed[committed["replicate"] == POOLED], labels)
    several = (summary["replicate"] == "0").any()
    first = _keyed(summary[summary["replicate"] == ("0" if several else POOLED)], labels)
    first = first.merge(alone, on="key", suffixes=("", "_committed"))
    ours = _keyed(summary[summary["replicate"] == POOLED], labels)
    ours = ours[ours["key"].isin(first["key"])].merge(pooled, on="key", suffixes=("", "_committed"))
    if first.empty:
        return "its estimates have no single replicates to compare"
    gaps = (first["estimate"] - first["estimate_committed"]).abs()
    inside = ours["estimate"].between(ours["low_committed"], ours["high_committed"]).mean()
    return (
        f"of {len(first)} estimates, {(gaps == 0).mean():.0%} are those of the committed first "
        f"replicate to the last digit (largest difference {gaps.max():.4f}), and {inside:.0%} lie "
        f"inside the committed intervals over {committed['replicates'].max():.0f} replicates"
    )


def _keyed(summary: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Add one text that identifies each row, whether it was read from a file or not."""
    if "tuned" in summary and "beta" in summary:  # a tuned β is a result, any other a setting
        tuned = summary["tuned"].astype("boolean").fillna(False)
        summary = summary.assign(fixed_beta=summary["beta"].where(~tuned))
        labels = [*labels, "fixed_beta"]
    rows = summary[labels].astype(object).fillna("").itertuples(index=False)
    return summary.assign(key=["|".join(map(str, row)) for row in rows])
