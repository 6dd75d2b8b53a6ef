"""One run: models at hand (trained, or fetched), cells measured, tables written."""

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import pandas as pd
import torch
from pandas import DataFrame

from benchmarks.analysis import tables
from benchmarks.analysis.acceptance import check_acceptance
from benchmarks.engine.sweep import Sweep
from benchmarks.runtime.files import CACHE, write_text
from benchmarks.runtime.workers import Workers, load_ray_workers
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import Hardware, Profile
from benchmarks.subjects import subject_class
from benchmarks.subjects.lab.quality import base_quality, model_quality
from benchmarks.subjects.lab.replicate import Replicate
from benchmarks.subjects.lab.train import build, pending_tasks


class MeasuredFigure(Protocol):
    """The part of a figure that a run needs (see `benchmarks.figures.base.Figure`)."""

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return what the figure needs of a replicate."""

    def collect(self, profile: Profile, replicates: Sequence[int], results: Sweep) -> DataFrame:
        """Return the rows of its table."""

    def summarize(self, rows: DataFrame, profile: Profile) -> DataFrame:
        """Return estimates from these rows."""


DETECTED = Hardware("", "", 0)
OnResult = Callable[[str, DataFrame, dict], None]


@dataclass(frozen=True)
class RunOptions:
    """Options of a run.

    Args:
        fresh: Measure again, whatever has been measured.
        keep: Keep the rows of replicates that the tables have, measured by the same code and
            profile, and measure only the others.
        quality: Also measure how good the lab's models are (models.csv).
        executor: "local" or "ray".
        hardware: Hardware of models of the Hub; what is empty or 0 is detected.
    """

    fresh: bool = False
    keep: bool = False
    quality: bool = False
    executor: str = "local"
    hardware: Hardware = DETECTED


def run_experiment(
    figures: Mapping[str, MeasuredFigure], profile: Profile, replicates: range, options: RunOptions
) -> None:
    """Train and measure what is missing for these figures, and write their tables."""
    start = time.monotonic()
    existing: dict[str, list[DataFrame]] = {}
    missing_replicates = list(replicates)
    if options.keep:
        names = ["models"] * options.quality + list(figures)
        existing, missing_replicates = _existing_rows(profile, names, replicates)
        if not missing_replicates:
            print(f"KEEP=1: the tables have all {len(replicates)} replicates, nothing to measure")
            return

    def write(name: str, rows: DataFrame, provenance: dict) -> None:
        before = existing.get(name, [])
        frames, kept = [*before, rows], [r for f in before for r in f["replicate"].unique()]
        seconds = time.monotonic() - start
        if name in figures:
            rows = tables.concatenate(frames)
            _write_figure(figures[name], profile, name, rows, seconds, provenance, kept)
        else:
            quality = pd.concat(frames, ignore_index=True)
            measured = range(quality["replicate"].nunique())
            tables.write_table(profile, name, None, quality, measured, seconds, provenance, kept)
            check_acceptance(quality, profile.accepted_ranges)

    measure_rows(figures, profile, missing_replicates, options, write)


def _write_figure(
    figure: MeasuredFigure,
    profile: Profile,
    name: str,
    rows: DataFrame,
    seconds: float,
    provenance: dict,
    kept: Collection[int],
) -> None:
    """Write rows and summary of a figure, and tell how they agree with the committed ones."""
    measured = range(rows["replicate"].nunique())
    summary = figure.summarize(rows, profile)
    committed = None
    if len(measured) < profile.replicates:
        committed = tables.committed_summary(profile, name)
    tables.write_table(profile, name, rows, summary, measured, seconds, provenance, kept)
    if committed is not None:
        print(f"{name}: {tables.agreement(summary, committed)}")


def measure_rows(
    figures: Mapping[str, MeasuredFigure],
    profile: Profile,
    replicates: Sequence[int],
    options: RunOptions,
    on_result: OnResult,
) -> None:
    """Train and measure what is missing, and hand over the rows of each figure.

    Args:
        on_result: Called with the name of each figure, its rows, and what their provenance says
            besides; with "models" as soon as their quality, if requested, is known.
    """
    needs_of = {
        name: FigureCells.union(figure.cells(profile, replicate) for replicate in replicates)
        for name, figure in figures.items()
    }
    needs = FigureCells.union(needs_of.values())
    gpus = load_ray_workers().gpus() if options.executor == "ray" else None
    subject = subject_class(profile)
    if not profile.trains_models:
        # these import `datasets`
        from benchmarks.engine.forecast import announce
        from benchmarks.subjects.hub.models import detect_hardware

        announce(profile, needs, detect_hardware(profile, options.hardware, gpus))
    profile_here, provenance = subject.prepare(profile, needs.requests, options.hardware, gpus)
    # there from the begin of a fresh run, once all it needs is there, until its end: older cells
    # do not count, and a killed run of the same figures and replicates goes on
    marker = CACHE / profile.name / "measuring-again"
    since = _begin_again(marker, [*figures], replicates) if options.fresh else 0.0
    models = [Replicate(profile, index) for index in replicates] if profile.trains_models else []
    # the quality of all models is reported; figures alone need what they request
    kinds = {kind for cell in needs.requests for kind in (cell.model, cell.scorer) if kind}
    requested = None if options.quality else kinds
    pending = [task for stage in pending_tasks(models, requested) for task in stage]
    with workers_for(profile_here, options.executor) as workers:
        sweep = Sweep(profile_here, workers, since)
        training = sum(task.estimated_seconds for task in pending)
        with workers.progress(training + sweep.estimated_seconds(needs)):

            def accept_bases() -> None:
                bases = base_quality(profile, replicates, workers)
                check_acceptance(bases, profile.accepted_ranges)

            build(models, workers, requested, accept_bases if profile.accepted_ranges else None)
            if options.quality:
                on_result("models", model_quality(profile, replicates, workers), provenance)
            sweep.measure(needs)
            # written as soon as their rows are there: no failure of another loses them
            failures: dict[str, Exception] = {}

            def collect(names: Iterable[str]) -> None:
                for name in names:
                    try:
                        rows = figures[name].collect(profile, replicates, sweep)
                        on_result(name, rows, provenance)
                    except (ValueError, ArithmeticError) as error:
                        failures[name] = error

            waiting = [
                name for name, need in needs_of.items()
                if need.traces or need.rollouts or need.views
            ]  # fmt: skip
            collect(name for name in figures if name not in waiting)
            sweep.measure_tokens(needs)
            collect(waiting)
    if failures:
        name, error = next(iter(failures.items()))
        others = "; all other tables are written" if len(figures) > len(failures) else ""
        raise ValueError(f"{name}: {error}{others}") from error
    if options.fresh:
        marker.unlink(missing_ok=True)


def _begin_again(marker: Path, figures: Sequence[str], replicates: Sequence[int]) -> float:
    """Return when the fresh run began that goes on, by its marker, else begin one."""
    run = json.dumps({"figures": sorted(figures), "replicates": list(replicates)})
    if not marker.exists() or marker.read_text(encoding="utf-8") != run:
        write_text(marker, run)
        return marker.stat().st_mtime
    since = marker.stat().st_mtime
    begin = datetime.fromtimestamp(since)
    print(f"FRESH=1 goes on with a run of {begin:%Y-%m-%d %H:%M}; without {marker} it begins anew")
    return since


def _existing_rows(
    profile: Profile, names: list[str], replicates: range
) -> tuple[dict[str, list[DataFrame]], list[int]]:
    """Return the rows that tables have already, and the replicates that some of them lack."""
    frames = {name: tables.existing_rows(profile, name) for name in names}
    frames = {name: frame for name, frame in frames.items() if frame is not None}
    complete = [set(frames[name]["replicate"]) if name in frames else set() for name in names]
    lacking = [r for r in replicates if any(r not in there for there in complete)]
    # an interrupted run may have added to some tables and not to others
    kept = {name: frame[~frame["replicate"].isin(lacking)] for name, frame in frames.items()}
    return {name: [frame] for name, frame in kept.items() if len(frame)}, lacking


def workers_for(profile: Profile, executor: str):
    """Return processes here or on a Ray cluster, on GPUs where the profile's models run there."""
    each = subject_class(profile).gpus_each(profile)
    if executor == "local":
        return Workers(torch.cuda.device_count() if profile.on_gpu else 0, each)
    return load_ray_workers().RayWorkers(each if profile.on_gpu else 0)
