"""Faults of real machines: kills, damaged files, full disks, two runs at once (`make faults`).

Never a wrong table, never a finished cell lost, always one clear sentence.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from benchmarks.analysis.tables import STAGING_SUFFIX, changed_files
from benchmarks.runtime.files import UNFINISHED
from tests.helpers.tiny_lab import TINY, cells, command, copy_sources

pytestmark = pytest.mark.faults
KILLS = 20
SPANS = {
    "training": 12.0,
    "sweep": 6.0,
    "drawing": 6.0,
}  # seconds from its beginning in which a run is killed
NUMBER = re.compile(r"-?\d+\.?\d*")
LIMIT = 900  # seconds that a command may take


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sources")
    copy_sources(path)
    (path / "benchmarks/spec/profiles/tiny.toml").write_text(TINY)
    return path


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory) -> Path:
    """A checkout in which everything was reproduced without faults."""
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
    """A copy of `whole` that has its cache, but no tables and no figures."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, symlinks=True)
    for folder in ("results", "figures"):
        shutil.rmtree(tmp_path / folder)
    return tmp_path


def run(checkout: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=checkout, capture_output=True, text=True, timeout=LIMIT, **options
    )


def sentence(done: subprocess.CompletedProcess) -> str:
    """Return the only error line of a command that failed."""
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [
        line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")
    ]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


def check_tables(checkout: Path, expected: Path) -> int:
    """Return the number of tables, checked against the expected ones (of cost, by hash alone)."""
    written = sorted((checkout / "results/tiny").glob("*.json"))
    for path in written:
        provenance = json.loads(path.read_text())
        if list(path.parent.glob(f".{path.stem}.written")):
            continue  # being moved: the next command goes on with it
        assert changed_files(path.parent, provenance["sha256"]) == []
        if path.stem != "cost":
            for name in provenance["sha256"]:
                assert (path.parent / name).read_bytes() == (
                    expected / "results/tiny" / name
                ).read_bytes(), name
    return len(written)


def check_whole(checkout: Path, expected: Path) -> None:
    """Check that all tables and figures equal those of the run without faults."""
    names = sorted(path.name for path in (expected / "results/tiny").glob("*.json"))
    assert check_tables(checkout, expected) == len(names)
    for path in (expected / "figures/tiny").iterdir():
        if path.stem in ("cost", "drawn", "report"):
            continue
        drawn = checkout / "figures/tiny" / path.name
        if path.suffix == ".pdf":
            check_pdf(drawn, path)
        else:
            assert drawn.read_bytes() == path.read_bytes(), path.name
    assert not [
        path for path in checkout.rglob(".*") if path.name.endswith((STAGING_SUFFIX, UNFINISHED))
    ]


def check_pdf(drawn: Path, expected: Path) -> None:
    """Check that two PDFs are equal but for the last digits of coordinates.

    The solver of the layout adds in an order that differs between processes.
    """
    pages, expected_pages = content(drawn), content(expected)
    assert NUMBER.sub("", pages) == NUMBER.sub("", expected_pages), expected.name
    numbers, expected_numbers = (
        [float(number) for number in NUMBER.findall(text)] for text in (pages, expected_pages)
    )
    np.testing.assert_allclose(numbers, expected_numbers, atol=1e-5, err_msg=expected.name)


def content(pdf: Path) -> str:
    """Return what a PDF draws (commands and coordinates)."""
    streams = re.findall(rb"/FlateDecode.*?stream\n(.*?)\nendstream", pdf.read_bytes(), re.DOTALL)
    return "\n".join(zlib.decompress(stream).decode("latin-1") for stream in streams)


def phase(checkout: Path) -> str:
    """Return the phase of a run, judged by the files that it has written."""
    if not cells(checkout):
        return "training"
    return "drawing" if list(checkout.glob("figures/tiny/*.png")) else "sweep"


def finished(checkout: Path) -> dict[Path, int]:
    """Return complete cells and models with their modification times."""
    models = checkout.glob(".cache/tiny/models/replicate*/*")
    return cells(checkout) | {
        path: path.stat().st_mtime_ns for path in models if not path.name.startswith(".")
    }


def test_twenty_kills_at_random_moments_end_in_the_same_tables(fresh, whole):
    """Of training, sweep and drawing, each several times; what was finished stays untouched."""
    rng, kills = random.Random(0), dict.fromkeys(SPANS, 0)
    while sum(kills.values()) < KILLS or min(kills.values()) < KILLS // 5:
        target = min(kills, key=lambda name: kills[name])
        if list(SPANS).index(phase(fresh)) > list(SPANS).index(target):
            for folder in (
                (".cache", "results", "figures")
                if target == "training"
                else (".cache/tiny/cells", "results", "figures")
            ):
                shutil.rmtree(fresh / folder)
        before = finished(fresh)
        process = subprocess.Popen(
            command("reproduce"),
            cwd=fresh,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while phase(fresh) != target and process.poll() is None:
            time.sleep(0.02)
        try:
            process.wait(rng.uniform(0, SPANS[target]))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills[phase(fresh)] += 1
        else:
            assert process.returncode == 0
            check_whole(fresh, whole)
        check_tables(fresh, whole)
        assert before.items() <= finished(fresh).items()
    print(kills)
    assert run(fresh, "reproduce").returncode == 0
    check_whole(fresh, whole)


def test_two_runs_at_once_on_one_cache(fresh, whole):
    both = [
        subprocess.Popen(
            command("reproduce"), cwd=fresh, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=2 * LIMIT)
        assert process.returncode == 0, errors.decode()
    check_whole(fresh, whole)


def damage(path: Path, rng: random.Random) -> None:
    """Flip a bit of a file, or truncate it."""
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
        error = sentence(run(trained, "reproduce"))
        assert f"{path} is damaged" in error
        assert "delete it and run again" in error
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
        error = sentence(run(trained, "figure2"))
        assert f"{folder} is damaged (" in error
        assert "delete the folder and run again" in error
        assert check_tables(trained, whole) == 0
        path.write_bytes(content)
    shutil.rmtree(folder)
    assert run(trained, "figure2").returncode == 0
    assert check_tables(trained, whole) == 1


@pytest.mark.parametrize("number", range(6))
def test_damaged_tables_are_named_and_not_drawn(whole, tmp_path, number):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, symlinks=True)
    rng = random.Random(number)
    path = (
        tmp_path / "results/tiny" / rng.choice(["figure2.csv", "figure2.parquet", "figure2.json"])
    )
    before = path.read_bytes()
    while path.read_bytes() == before:
        damage(path, rng)
    picture = tmp_path / "figures/tiny/figure2.png"
    picture.unlink()
    done = run(tmp_path, "figure2")
    if (
        path.suffix == ".json" and done.returncode == 0
    ):  # a bit of what is told and not checked, as of the time it took
        assert picture.read_bytes() == (whole / "figures/tiny/figure2.png").read_bytes()
        return
    error = sentence(done)
    assert "figure2" in error
    assert not picture.exists()


def test_a_full_disk_gives_a_one_line_error_and_loses_nothing(sources, whole, tmp_path):
    """A disk that is full at the first model, at a later one, at cells, at tables, at figures."""
    sizes = [
        size(sources),
        *(
            size(whole / folder)
            for folder in (".cache/tiny/models", ".cache/tiny/cells", "results", "figures")
        ),
    ]
    room = [
        sum(sizes[:n]) + share * sizes[n]
        for n, share in ((1, 0.02), (1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5))
    ]
    with disk(tmp_path, room[0]):
        shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
        before: dict[Path, int] = {}
        for kilobytes in room:
            mount("-o", f"remount,size={kilobytes:.0f}k", tmp_path)
            assert "No space left on device" in sentence(run(tmp_path, "reproduce"))
            assert before.items() <= finished(tmp_path).items()
            before = finished(tmp_path)
            check_tables(tmp_path, whole)
        mount("-o", f"remount,size={3 * sum(sizes):.0f}k", tmp_path)
        assert run(tmp_path, "reproduce").returncode == 0
        assert before.items() <= finished(tmp_path).items()
        check_whole(tmp_path, whole)


def size(folder: Path) -> float:
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


def mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a disk of so much room can only be made by root: {done.stderr.strip()}")


@contextmanager
def disk(path: Path, kilobytes: float) -> Iterator[None]:
    mount("-t", "tmpfs", "-o", f"size={kilobytes:.0f}k", "tmpfs", path)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("kilobytes", [8, 100, 300])
def test_a_file_size_limit_gives_a_one_line_error_and_loses_nothing(fresh, whole, kilobytes):
    """A limit on the size of files: at the first model, at later ones, at tables or figures."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))

    assert "File too large" in sentence(run(fresh, "reproduce", preexec_fn=limit))
    check_tables(fresh, whole)
    before = finished(fresh)
    assert run(fresh, "reproduce").returncode == 0
    assert before.items() <= finished(fresh).items()
    check_whole(fresh, whole)


def test_workers_exit_with_their_parent(trained):
    shutil.rmtree(trained / ".cache/tiny/cells")
    process = subprocess.Popen(
        command("figure3", "--fresh"),
        cwd=trained,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not cells(trained):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _group_members(process.pid) == []


def _group_members(group: int) -> list[int]:
    """Return the ids of running processes of this process group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def test_summaries_and_figures_follow_from_the_rows_without_torch(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True, symlinks=True)
    code = """
if __name__ == "__main__":
    import sys
    from benchmarks import __main__
    __main__.main(["summaries", "--profile", "tiny"])
    print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "claims: " in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    check_whole(tmp_path, whole)
