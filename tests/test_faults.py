"""What goes wrong on real machines: kills, damaged files, full disks, two runs at once. `make faults`: minutes, so not in `make test`.

Never a wrong table, never a finished cell lost, always one clear sentence.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.tables import changed_files
from tests.test_road import TINY, cells, command, copy_sources

pytestmark = pytest.mark.faults
KILLS = 20
LIMIT = 900  # seconds that a command may take


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The sources with a tiny profile."""
    path = tmp_path_factory.mktemp("sources")
    copy_sources(path)
    (path / "benchmarks/profiles/tiny.toml").write_text(TINY)
    return path


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory) -> Path:
    """All of it reproduced without any fault."""
    path = tmp_path_factory.mktemp("whole")
    shutil.copytree(sources, path, dirs_exist_ok=True)
    done = run(path, "reproduce")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def fresh(sources, tmp_path) -> Path:
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def trained(whole, tmp_path) -> Path:
    """Everything cached, no table and no figure."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, symlinks=True)
    for folder in ("results", "figures"):
        shutil.rmtree(tmp_path / folder)
    return tmp_path


def run(checkout: Path, *arguments: str, **how) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=checkout, capture_output=True, text=True, timeout=LIMIT, **how)


def sentence(done: subprocess.CompletedProcess) -> str:
    """The one error line of a command that failed."""
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


def check_tables(checkout: Path, expected: Path) -> int:
    """Every table that is there is right: its rows are those of the run without faults (of cost, whose times differ, its hashes fit)."""
    written = sorted((checkout / "results/tiny").glob("*.json"))
    for path in written:
        provenance = json.loads(path.read_text())
        if list(path.parent.glob(f".{path.stem}.written")):
            continue  # being moved: the next command goes on with it
        assert changed_files(path.parent, provenance["sha256"]) == []
        if path.stem != "cost":
            for name in provenance["sha256"]:
                assert (path.parent / name).read_bytes() == (expected / "results/tiny" / name).read_bytes(), name
    return len(written)


def check_whole(checkout: Path, expected: Path) -> None:
    """All tables and figures are those of the run without faults."""
    names = sorted(path.name for path in (expected / "results/tiny").glob("*.json"))
    assert check_tables(checkout, expected) == len(names)
    for path in (expected / "figures/tiny").iterdir():
        if path.stem not in ("cost", "drawn", "report"):
            assert (checkout / "figures/tiny" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not [path for path in (checkout / "results/tiny").iterdir() if path.name.endswith(".written")]


def test_twenty_kills_at_random_moments_end_in_the_same_tables(fresh, whole):
    """Of training, sweep and drawing, whatever it is at. What was finished before a kill is there after it, untouched."""
    rng, finished, kills = random.Random(0), {}, 0
    models = fresh / ".cache/tiny/models"
    while kills < KILLS:
        process = subprocess.Popen(
            command("reproduce"), cwd=fresh, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(rng.uniform(3, 12))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        else:  # it came to its end: from the beginning, then
            assert process.returncode == 0
            check_whole(fresh, whole)
            for folder in (".cache", "results", "figures"):
                shutil.rmtree(fresh / folder)
            finished = {}
            continue
        check_tables(fresh, whole)
        now = cells(fresh) | {path: path.stat().st_mtime_ns for path in models.glob("replicate*/*") if not path.name.startswith(".")}
        assert finished.items() <= now.items()
        finished = now
    assert run(fresh, "reproduce").returncode == 0
    check_whole(fresh, whole)


def test_two_runs_at_once_on_one_cache(fresh, whole):
    both = [subprocess.Popen(command("reproduce"), cwd=fresh, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=2 * LIMIT)
        assert process.returncode == 0, errors.decode()
    check_whole(fresh, whole)


def damage(path: Path, rng: random.Random) -> None:
    """A bit flipped, or the end lost."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        content[place] ^= 1 << rng.randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)


def test_damaged_cells_are_named_and_measured_again(trained, whole):
    rng = random.Random(0)
    for _ in range(4):
        path = rng.choice(sorted((trained / ".cache/tiny/cells").glob("*/*.cell")))
        damage(path, rng)
        said = sentence(run(trained, "reproduce"))
        assert f"{path} is damaged" in said
        assert "delete it and run again" in said
        assert check_tables(trained, whole) == 1  # of the models, which is first
        path.unlink()
    assert run(trained, "reproduce").returncode == 0
    check_whole(trained, whole)


def test_damaged_models_are_named_and_trained_again(trained, whole):
    rng = random.Random(0)
    shutil.rmtree(trained / ".cache/tiny/cells")  # or nothing would ask for models
    folder = next(path for path in trained.glob(".cache/tiny/models/replicate0-*/*-base"))
    for _ in range(4):
        path = rng.choice(sorted(folder.iterdir()))
        content = path.read_bytes()
        damage(path, rng)
        said = sentence(run(trained, "figure2"))
        assert f"{folder} is damaged (" in said
        assert "delete the folder and run again" in said
        assert check_tables(trained, whole) == 0
        path.write_bytes(content)
    shutil.rmtree(folder)
    assert run(trained, "figure2").returncode == 0
    assert check_tables(trained, whole) == 1


@pytest.mark.parametrize("number", range(6))
def test_damaged_tables_are_named_and_not_drawn(whole, tmp_path, number):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, symlinks=True)
    rng = random.Random(number)
    path = tmp_path / "results/tiny" / rng.choice(["figure2.csv", "figure2.parquet", "figure2.json"])
    before = path.read_bytes()
    while path.read_bytes() == before:
        damage(path, rng)
    picture = tmp_path / "figures/tiny/figure2.png"
    picture.unlink()
    done = run(tmp_path, "figure2")
    if path.suffix == ".json" and done.returncode == 0:  # a bit of what is told and not checked, as of the time it took
        assert picture.read_bytes() == (whole / "figures/tiny/figure2.png").read_bytes()
        return
    said = sentence(done)
    assert "figure2" in said
    assert not picture.exists()


def test_a_full_disk_is_one_sentence_and_loses_nothing(fresh, whole):
    """Files may not grow beyond so much, which fails as a full disk does: at the first model, at later ones, at tables or figures."""
    before: dict[Path, int] = {}
    for kilobytes in (8, 100, 300):

        def limit(most: int = kilobytes * 1024) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        said = sentence(run(fresh, "reproduce", preexec_fn=limit))
        assert "File too large" in said
        assert before.items() <= cells(fresh).items()
        before = cells(fresh)
        check_tables(fresh, whole)
    assert run(fresh, "reproduce").returncode == 0
    assert before.items() <= cells(fresh).items()
    check_whole(fresh, whole)


def test_a_write_that_was_cut_off_is_finished_by_the_next_command(whole, tmp_path):
    """Killed when one of a table's files had been moved into place and the others not."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, symlinks=True)
    where = tmp_path / "results/tiny"
    aside = where / ".figure2.written"
    aside.mkdir()
    for name in ("figure2.json", "figure2.parquet"):
        (where / name).rename(aside / name)
        (where / name).write_text("old")
    started = time.monotonic()
    assert run(tmp_path, "figure2").returncode == 0
    assert time.monotonic() - started < 60  # drawn, not measured
    check_whole(tmp_path, whole)
