"""Result tables: NAME.parquet (rows), NAME.csv (summary) and NAME.json (provenance).

The three change together: they are written aside and moved into place under a lock. The provenance
holds the hash of each file, so that a table which was edited or damaged is refused.
"""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from filelock import FileLock

from benchmarks.analysis.estimates import POOLED
from benchmarks.analysis.intervals import METHOD
from benchmarks.runtime.files import (
    CACHE,
    file_lock,
    read_frame,
    read_json,
    remove_leftovers,
    sha256,
    write_atomically,
    write_frame,
    write_text,
)
from benchmarks.runtime.fingerprints import ROOT, drawing_code, input_states, row_code
from benchmarks.runtime.workers import available_cores
from benchmarks.spec.profile import Profile, profile_digest

RESULTS, FIGURES = ROOT / "results", ROOT / "figures"
DRAWN, LOCK = "drawn.json", "lock"
ENTRIES = {
    "sha256": dict, "profile_digest": str, "code_digest": str, "replicates": list,
    "git_commit": str, "hardware": dict, "packages": dict,
}  # of a provenance, with the type of each; none is empty  # fmt: skip
# of some: inputs where models are given, earlier_runs where KEEP=1 kept rows, statistics where
# rows are summarized
FURTHER_ENTRIES = {"inputs": dict, "earlier_runs": list, "statistics": dict}
RUN_ENTRIES = ("git_commit", "hardware", "wall_seconds")  # that tell how a run measured
STAGING_SUFFIX = ".written"  # of a folder with complete files that are still to be moved into place
TEXTS = ("value_model", "versus", "versus_value_model", "search", "matched")
NOT_LABELS = {
    "ratio", "beta", "replicate", "estimate", "low", "high", "n", "seeds", "replicates",
    "versus_ratio", "entropy", "chosen", "sd",
}  # columns of a summary that are results and not settings  # fmt: skip
PACKAGES = ("numpy", "pandas", "pyarrow", "torch", "transformers")
Summarize = Callable[[pd.DataFrame, Profile], pd.DataFrame]


def folder(profile: Profile) -> Path:
    """Return where the tables of a profile are."""
    return RESULTS / profile.name


def write_table(
    profile: Profile,
    name: str,
    rows: pd.DataFrame | None,
    summary: pd.DataFrame,
    replicates: range,
    seconds: float,
    further: dict,
    kept: Collection[int] = (),
) -> None:
    """Write a table with its summary and its provenance, to which `further` is added.

    Args:
        profile: What was measured.
        name: Name of the table.
        rows: None for a table that is a summary alone.
        summary: Estimates from the rows.
        replicates: Replicates of the table.
        seconds: Duration of this run.
        further: Entries of the provenance.
        kept: Replicates that earlier runs measured, whose rows the table had before.
    """
    earlier = _earlier_runs(profile, name, kept) if kept else []
    provenance = {
        **environment_info("benchmarks"),
        "profile": profile.name,
        "profile_digest": profile_digest(profile),
        "code_digest": row_code(profile),
        "replicates": list(replicates),
        "seeds": list(range(profile.evaluation.samples)),
        "wall_seconds": round(seconds, 1),
        "sha256": {},
        **further,
        **({"earlier_runs": earlier} if earlier else {}),
    }
    _write(profile, name, rows, summary, provenance)


def _earlier_runs(profile: Profile, name: str, kept: Collection[int]) -> list[dict]:
    """Return the runs that measured the replicates which a table keeps, the latest last."""
    provenance = read_entries(folder(profile) / f"{name}.json")
    earlier = provenance.get("earlier_runs", [])
    known = {replicate for run in earlier for replicate in run["replicates"]}
    latest = {entry: provenance[entry] for entry in RUN_ENTRIES if entry in provenance}
    latest["replicates"] = [each for each in provenance["replicates"] if each not in known]
    runs = [
        run | {"replicates": [each for each in run["replicates"] if each in kept]}
        for run in (*earlier, latest)
    ]
    return [run for run in runs if run["replicates"]]


def existing_rows(profile: Profile, name: str) -> pd.DataFrame | None:
    """Return the rows of a table, to add replicates to; None if there is no table.

    Of the table of models, which has no rows, the summary.

    Raises:
        ValueError: They were measured by other code, of other files or under other settings than
            today's.
    """
    if not has_table(profile, name):
        return None
    provenance = read_provenance(profile, name)
    stale = _staleness(profile, provenance)
    if not stale and provenance["code_digest"] != row_code(profile):
        stale = "measured by other code than today's"
    if stale:
        raise ValueError(f"{name} was {stale}, so KEEP=1 cannot keep it: use FRESH=1")
    rows = folder(profile) / f"{name}.parquet"
    return read_frame(rows) if rows.exists() else pd.read_csv(folder(profile) / f"{name}.csv")


def concatenate(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Concatenate tables by rows; text columns become categorical."""
    table = pd.concat(frames, ignore_index=True)
    for name, column in table.items():
        if not pd.api.types.is_numeric_dtype(column):  # as which bool counts
            table[name] = column.astype("str").astype("category").where(column.notna())
    return table


def rewrite_summary(profile: Profile, name: str, summarize: Summarize) -> None:
    """Summarize the rows of a table again; its provenance still tells how they were measured."""
    provenance = read_provenance(profile, name) | {"summarized_at_commit": git_commit()}
    _write(profile, name, None, summarized(profile, name, summarize), provenance)


def summarized(profile: Profile, name: str, summarize: Summarize) -> pd.DataFrame:
    """Return the summary of the rows of a table.

    Raises:
        ValueError: The rows lack a column or a method that the summary reads.
    """
    rows = read_frame(folder(profile) / f"{name}.parquet")
    try:
        return summarize(rows, profile)
    except LookupError as error:
        raise ValueError(
            f"{name}.parquet lacks what its summary reads ({error.args[0]}); if earlier code "
            "measured it, measure again with FRESH=1"
        ) from error


def _write(
    profile: Profile, name: str, rows: pd.DataFrame | None, summary: pd.DataFrame, provenance: dict
) -> None:
    """Write all files of a table aside, then move them; without `rows`, any there are stay."""
    target = folder(profile)

    def write(aside: Path) -> None:
        aside.mkdir()
        (aside / f"{name}.csv").write_text(summary.to_csv(index=False), encoding="utf-8")
        if rows is not None:
            write_frame(aside / f"{name}.parquet", rows)
        hashes = {path.name: sha256(path) for path in sorted(aside.iterdir())}
        entries = {
            "intervals": intervals(profile),
            "statistics": asdict(profile.statistics),
            "sha256": provenance["sha256"] | hashes,
        }
        (aside / f"{name}.json").write_text(_to_json(provenance | entries), encoding="utf-8")

    with _tables_lock(profile):
        _move_staged(target)
        write_atomically(target / f".{name}{STAGING_SUFFIX}", write)
        _move_staged(target)


def finish_interrupted_writes(profile: Profile) -> None:
    """Move files that a killed process had staged, and remove those it had not finished."""
    for path in (CACHE / profile.name, folder(profile), FIGURES / profile.name):
        remove_leftovers(path)
    if any(folder(profile).glob(f".*{STAGING_SUFFIX}")):
        with _tables_lock(profile):
            _move_staged(folder(profile))


def _move_staged(target: Path) -> None:
    for aside in sorted(target.glob(f".*{STAGING_SUFFIX}")):
        for path in sorted(aside.iterdir()):
            path.replace(target / path.name)
        shutil.rmtree(aside)


def read_provenance(profile: Profile, name: str) -> dict:
    """Return the provenance of a table whose files are those that it describes.

    Raises:
        FileNotFoundError: There is no table.
        ValueError: A file is missing or another one, or the provenance is damaged.
    """
    provenance = read_entries(folder(profile) / f"{name}.json")
    check_files(folder(profile), name, provenance)
    return provenance


def read_entries(path: Path) -> dict:
    """Return the entries of a provenance, whatever its files are.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An entry is missing, or is none of its kind.
    """
    provenance = read_json(path)
    present = {name for name, kind in ENTRIES.items() if isinstance(provenance.get(name), kind)}
    lacking = ENTRIES.keys() - {name for name in present if provenance[name]}
    lacking |= {
        name
        for name, kind in FURTHER_ENTRIES.items()
        if not isinstance(provenance.get(name, kind()), kind)
    }
    if lacking:
        raise ValueError(
            f"{path} does not say {', '.join(sorted(lacking))} (damaged?): restore it, or measure "
            "again with FRESH=1"
        )
    return provenance


def check_files(folder: Path, name: str, provenance: dict) -> None:
    """Raise ValueError if a file of the table is missing or not as its provenance describes it."""
    for file in changed_files(folder, provenance["sha256"]):
        raise ValueError(
            f"{folder / file} is missing or not the file that {name}.json describes: restore it, "
            "or measure again with FRESH=1"
        )


def changed_files(folder: Path, hashes: Mapping[str, str]) -> list[str]:
    """Return the files that are missing or have another hash."""
    paths = {file: folder / file for file in hashes}
    return [f for f, path in paths.items() if not path.is_file() or sha256(path) != hashes[f]]


def read_table(profile: Profile, name: str) -> tuple[pd.DataFrame, str]:
    """Return a summary, and why it is stale: how it was measured or summarized otherwise."""
    with _tables_lock(profile):  # else another run might be changing it
        provenance = read_provenance(profile, name)
        stale = _staleness(profile, provenance) or _summary_staleness(profile, provenance)
        return read_summary(folder(profile) / f"{name}.csv"), stale


def _staleness(profile: Profile, provenance: Mapping) -> str:
    """Return why rows are stale, as the end of "it was …"; empty if they are current."""
    if provenance["profile_digest"] != profile_digest(profile):
        return f"measured under other settings than profile {profile.name} has now"
    before, now = provenance.get("inputs", {}), input_states(profile)
    # what is not there now may be as it was
    changed = [name for name, state in before.items() if now.get(name, state) != state]
    if not changed:
        return ""
    return f"measured with other files of {', '.join(changed)} than the present ones"


def _summary_staleness(profile: Profile, provenance: Mapping) -> str:
    """Return why a summary is stale though its rows are current; empty if it is current, too."""
    now = asdict(profile.statistics)
    if provenance.get("statistics", now) == now:
        return ""
    return (
        f"summarized under other [statistics] than profile {profile.name} has now: "
        f"make summaries {profile.make_options} recomputes it"
    )


def record_drawing(profile: Profile, name: str, paths: Sequence[Path], table: str = "") -> None:
    """Record the table (default NAME.csv) and the code that files were drawn from."""
    with _tables_lock(profile):
        drawn = read_drawings(profile) | {
            name: {
                "table": sha256(folder(profile) / (table or f"{name}.csv")),
                "code": drawing_code(name),
                "files": {path.name: sha256(path) for path in paths},
            }
        }
        write_text(FIGURES / profile.name / DRAWN, _to_json(drawn))


def read_drawings(profile: Profile) -> dict:
    """Return what `record_drawing` recorded, by the name of the figure.

    Raises:
        ValueError: The file is damaged.
    """
    path = FIGURES / profile.name / DRAWN
    drawn = read_json(path) if path.exists() else {}
    damaged = sorted(name for name, entry in drawn.items() if not _is_drawing(entry))
    if damaged:
        raise ValueError(
            f"{path} does not say how {', '.join(damaged)} was drawn (damaged?): restore it, or "
            "delete it and draw anew"
        )
    return drawn


def _is_drawing(entry: object) -> bool:
    if not isinstance(entry, dict) or not {"table", "code"} <= entry.keys():
        return False
    return isinstance(entry.get("files"), dict)


def _tables_lock(profile: Profile) -> FileLock:
    return file_lock(CACHE / profile.name / LOCK)


def _to_json(entries: dict) -> str:
    return json.dumps(entries, indent=2, sort_keys=True) + "\n"


def intervals(profile: Profile) -> str:
    """Return a description of the intervals."""
    return f"{100 * profile.statistics.level:g}% {METHOD}, {profile.statistics.resamples} resamples"


def has_table(profile: Profile, name: str) -> bool:
    """Return whether there is such a table."""
    return (folder(profile) / f"{name}.json").exists()


def with_tables(profile: Profile, names: Iterable[str]) -> list[str]:
    """Return the names of those figures that have a table."""
    return [name for name in names if has_table(profile, name)]


def committed_summary(profile: Profile, name: str) -> pd.DataFrame | None:
    """Return the committed summary over all replicates, which a smaller run is compared with.

    Outside a clone that is the summary on disk, so this comes before anything is written. None
    where there is no summary, or one of fewer replicates.
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


def environment_info(module: str) -> dict[str, object]:
    """Return the command, commit, packages and hardware of this run of `python -m module`."""
    packages = {package: version(package) for package in PACKAGES}
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "packages": packages | {"python": platform.python_version()},
        "hardware": hardware(),
    }


def git_commit() -> str:
    """Return the commit, with "+changes" where sources differ; "unknown" outside a clone."""
    try:
        changes = _git("status", "--porcelain", "-unormal", "--", "sia", "benchmarks")
        return _git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str, cwd: Path = ROOT) -> str:
    command = ["git", "-C", cwd, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def hardware() -> dict[str, object]:
    """Return processor, cores that this process may use, and memory."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": [*names, platform.machine()][0],
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def agreement(summary: pd.DataFrame, committed: pd.DataFrame) -> str:
    """Describe in one sentence how the estimates of a smaller run agree with the committed ones."""
    labels = [name for name in summary.columns if name in committed and name not in NOT_LABELS]
    alone = _keyed(committed[committed["replicate"] == "0"], labels)
    pooled = _keyed(committed[committed["replicate"] == POOLED], labels)
    several = (summary["replicate"] == "0").any()
    first = _keyed(summary[summary["replicate"] == ("0" if several else POOLED)], labels)
    first = first.merge(alone, on="key", suffixes=("", "_committed"))
    ours = _keyed(summary[summary["replicate"] == POOLED], labels)
    ours = ours[ours["key"].isin(first["key"])].merge(pooled, on="key", suffixes=("", "_committed"))
    if first.empty:
        return "the committed table has no single replicates to compare with"
    gaps = (first["estimate"] - first["estimate_committed"]).abs()
    inside = ours["estimate"].between(ours["low_committed"], ours["high_committed"]).mean()
    return (
        f"of {len(first)} estimates, {(gaps == 0).mean():.0%} equal those of the committed first "
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
