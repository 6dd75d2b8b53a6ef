"""One run: models at hand (trained, or fetched), cells measured, tables written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import pandas as pd
import torch

from benchmarks.analysis import tables
from benchmarks.engine.sweep import Results
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.runtime.files import CACHE
from benchmarks.runtime.workers import Workers
from benchmarks.spec.profile import Hardware, Profile
from benchmarks.subjects import subject_class
from benchmarks.subjects.lab.quality import model_quality
from benchmarks.subjects.lab.replicate import Replicate
from benchmarks.subjects.lab.train import build, missing


@dataclass(frozen=True)
class How:
    """fresh: measure again, whatever has been measured. keep: rows of replicates that the tables have already, measured by the same code
    and profile, stay as they are, and only the others are measured. quality: also report how good the lab's models are, in models.csv.
    executor: local or ray. device, dtype, batch_size: for models of the Hub; empty, 0: what there is."""

    fresh: bool = False
    keep: bool = False
    quality: bool = False
    executor: str = "local"
    device: str = ""
    dtype: str = ""
    batch_size: int = 0


def measure(figures: Mapping[str, Figure], profile: Profile, replicates: range, how: How) -> None:
    """Trains what is missing, measures what is missing for these figures, writes their tables."""
    start = time.monotonic()
    # begun by FRESH=1 and there until its end: cells older than this do not count, and a killed run goes on
    begun = CACHE / profile.name / "measuring-again"
    if how.fresh and not begun.exists():
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
    since = begun.stat().st_mtime if how.fresh else 0.0
    kept, new = (
        _kept_rows(profile, ["models"] * how.quality + list(figures), replicates)
        if how.keep
        else ({}, list(replicates))
    )

    def write(name: str, rows: pd.DataFrame, provenance: dict) -> None:
        rows = (
            tables.stack([*kept.get(name, []), rows])
            if name in figures
            else pd.concat([*kept.get(name, []), rows], ignore_index=True)
        )
        measured, seconds = range(rows["replicate"].nunique()), time.monotonic() - start
        if name not in figures:
            tables.write_table(profile, name, None, rows, measured, seconds, provenance)
            return
        summary = figures[name].summarize(rows, profile)
        tables.write_table(profile, name, rows, summary, measured, seconds, provenance)
        where = tables.folder(profile).relative_to(tables.ROOT)
        print(f"{name}: {len(rows):,} rows in {where}/{name}.parquet, summary in {name}.csv")
        reference = (
            tables.read_reference(profile, name) if len(measured) < profile.replicates else None
        )
        if reference is not None and "low" in reference:
            print(f"{name}: {tables.agreement(summary, reference)}")

    find_rows(figures, profile, new, how, write, since)
    if how.fresh:
        begun.unlink(missing_ok=True)


def find_rows(
    figures: Mapping[str, Figure],
    profile: Profile,
    replicates: Sequence[int],
    how: How,
    keep: Callable[[str, pd.DataFrame, dict], None],
    since: float = 0.0,
) -> None:
    """Calls `keep` with the name and the rows of each figure (and of "models", where their quality is asked for, as soon as it is there),
    and with what their provenance says besides. since: cells that are older are measured again."""
    needs = [
        figure.cells(profile, replicate) for figure in figures.values() for replicate in replicates
    ]
    wanted = methods.Wanted(
        *([cell for need in needs for cell in need[i]] for i in range(len(methods.Wanted._fields)))
    )
    subject, gpus = subject_class(profile), cluster().gpus() if how.executor == "ray" else None
    requested = (cell for cells in wanted for cell in cells)
    hardware = Hardware(how.device, how.dtype, how.batch_size)
    settled, provenance = subject.prepare(profile, requested, hardware, gpus)
    models = [Replicate(profile, index) for index in replicates] if profile.trains_models else []
    with workers_for(settled, how.executor) as workers:
        results = Results(settled, workers, since)
        training = sum(task.work for stage in missing(models) for task in stage) if models else 0.0
        with workers.progress(training + results.work(*wanted)):
            if models:
                build(models, workers)
            if how.quality:
                keep("models", model_quality(profile, replicates, workers), provenance)
            results.measure(*wanted)
            made = {
                name: figure.collect(profile, replicates, results)
                for name, figure in figures.items()
            }
        for name, rows in made.items():
            keep(name, rows, provenance)


def _kept_rows(
    profile: Profile, names: list[str], replicates: range
) -> tuple[dict[str, list[pd.DataFrame]], list[int]]:
    """The rows that tables have already, and the replicates that some of them lack."""
    frames = {name: tables.kept_rows(profile, name) for name in names}
    there = {
        name: set() if frame is None else set(frame["replicate"]) for name, frame in frames.items()
    }
    new = [r for r in replicates if any(r not in there[name] for name in names)]
    # a run that was interrupted may have added to some tables and not to others
    kept = {
        name: frame[~frame["replicate"].isin(new)]
        for name, frame in frames.items()
        if frame is not None
    }
    return {name: [frame] for name, frame in kept.items() if len(frame)}, new


def workers_for(profile: Profile, executor: str):
    """Processes on this machine, or on a Ray cluster; on GPUs where the profile's models run there."""
    if executor == "local":
        return Workers(torch.cuda.device_count() if profile.on_gpu else 0)
    return cluster().RayWorkers(profile.on_gpu)


def cluster() -> ModuleType:
    """`benchmarks.runtime.ray_workers`. Errors: ValueError where Ray is not installed."""
    try:
        from benchmarks.runtime import ray_workers
    except ImportError as error:
        raise ValueError(
            f"EXECUTOR=ray needs Ray, which is not installed ({error}): pip install -e '.[ray]'"
        ) from error
    return ray_workers
