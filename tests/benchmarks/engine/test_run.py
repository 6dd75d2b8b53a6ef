"""The order of a run: tables are written as soon as their rows are there."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pandas as pd
import pytest

from benchmarks.analysis import tables
from benchmarks.engine import run
from benchmarks.spec.cells import CellRequest, FigureCells
from benchmarks.spec.profile import load_profile

REQUEST = CellRequest(0, "qwen3")


def figure(needs, error=None):
    def collect(profile, replicates, results):
        if error:
            raise error
        return needs

    return SimpleNamespace(cells=lambda profile, replicate: needs, collect=collect)


@pytest.fixture
def events(monkeypatch, tmp_path):
    """Return the steps of a run in order; training and measuring are skipped."""
    done = []

    class Sweep:
        def __init__(self, *_):
            pass

        def estimated_seconds(self, needs):
            return 0.0

        def measure(self, needs):
            done.append("rows measured")

        def measure_tokens(self, needs):
            done.append("tokens measured")

    workers = nullcontext(SimpleNamespace(progress=lambda total: nullcontext()))
    replacements = {
        "Sweep": Sweep,
        "workers_for": lambda *_: workers,
        "pending_tasks": lambda *_: [],
        "build": lambda *_: None,
        "CACHE": tmp_path,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(run, name, replacement)
    return done


def test_tables_are_written_as_soon_as_their_rows_are_there(events, tmp_path):
    """And whatever becomes of other tables."""
    figures = {
        "views": figure(FigureCells(views=[REQUEST])),
        "broken": figure(FigureCells([REQUEST]), ValueError("no such cell")),
        "rows": figure(FigureCells([REQUEST])),
        "traces": figure(FigureCells(traces=[REQUEST])),
    }
    options = run.RunOptions(fresh=True)
    with pytest.raises(ValueError, match="broken: no such cell; all other tables are written"):
        run.measure_rows(
            figures, load_profile("smoke"), range(1), options, lambda name, *_: events.append(name)
        )
    assert events == ["rows measured", "rows", "tokens measured", "views", "traces"]


def test_a_summary_that_fails_leaves_the_other_tables(events, tmp_path):
    figures = {name: figure(FigureCells([REQUEST])) for name in ("first", "second")}

    def write(name, *_):
        if name == "first":
            raise ValueError("no pairs")
        events.append(name)

    message = "first: no pairs; all other tables are written"
    with pytest.raises(ValueError, match=message):
        run.measure_rows(figures, load_profile("smoke"), range(1), run.RunOptions(), write)
    assert events == ["rows measured", "second", "tokens measured"]


def test_a_table_tells_all_runs_that_measured_what_it_keeps(project, monkeypatch):
    profile, runs = load_profile("smoke"), []

    def measure_rows(figures, profile, replicates, options, write):
        for name in ("a", "models"):
            write(name, pd.DataFrame({"replicate": replicates, "replicates": 1}), {})

    monkeypatch.setattr(run, "measure_rows", measure_rows)
    monkeypatch.setattr(run, "check_acceptance", lambda *_: None)
    figures = {"a": SimpleNamespace(summarize=lambda rows, profile: rows)}
    for count, keep in ((1, False), (3, True), (4, True)):
        monkeypatch.setattr(tables, "git_commit", lambda count=count: f"commit {count}")
        monkeypatch.setattr(tables, "hardware", lambda count=count: {"cores": count})
        options = run.RunOptions(keep=keep, quality=True)
        run.run_experiment(figures, profile, range(count), options)
        for name in ("a", "models"):
            provenance = tables.read_provenance(profile, name)
            assert provenance["git_commit"] == f"commit {count}"
            earlier = provenance.get("earlier_runs", [])
            assert all(one.pop("wall_seconds") >= 0 for one in earlier)
            assert earlier == runs
        entries = {name: provenance[name] for name in ("git_commit", "hardware")}
        before = [replicate for one in runs for replicate in one["replicates"]]
        new = [replicate for replicate in range(count) if replicate not in before]
        runs = [*runs, entries | {"replicates": new}]
    assert [one["replicates"] for one in runs] == [[0], [1, 2], [3]]
    path = tables.folder(profile) / "a.json"
    path.write_text(path.read_text().replace('"earlier_runs": [', '"earlier_runs": 0, "x": ['))
    with pytest.raises(ValueError, match=r"a\.json does not say earlier_runs \(damaged\?\)"):
        tables.read_provenance(profile, "a")


@pytest.mark.parametrize(
    ("name", "replicates", "goes_on"), [("a", 1, True), ("a", 2, False), ("b", 1, False)]
)
def test_a_fresh_run_goes_on_with_the_same_figures_alone(
    events, tmp_path, capsys, name, replicates, goes_on
):
    marker, begins = tmp_path / "smoke/measuring-again", []

    def measure(name, replicates, error=None):
        run.measure_rows(
            {name: figure(FigureCells([REQUEST]), error)},
            load_profile("smoke"),
            range(replicates),
            run.RunOptions(fresh=True),
            lambda *_: begins.append(marker.stat().st_mtime),
        )

    with pytest.raises(ValueError, match="a: interrupted"):
        measure("a", 1, ValueError("interrupted"))
    os.utime(marker, (1e9, 1e9))
    measure(name, replicates)
    assert (begins == [1e9]) == goes_on
    notice = f"; without {marker} it begins anew\n"
    assert (notice in capsys.readouterr().out) == goes_on
    assert not marker.exists()
