"""Progress of worker processes."""

import io
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.runtime import workers


def test_no_remaining_time_is_shown_before_two_percent_are_done():
    bar = workers.Bar(total=100, bar_format=workers.BAR, file=io.StringIO())
    bar.update(1)
    assert str(bar).endswith("? to go")
    bar.update(4)
    assert str(bar).endswith(":00 to go")
    bar.close()


def test_without_a_terminal_each_stage_is_one_line(capsys):
    with workers.progress_bar(100) as bar:
        for description in ("sweep 1/5: thresholds, 0 of 12", "sweep 2/5: cells, 1 of 3", "timing"):
            bar.set_description(description)
            bar.update(10)
    assert capsys.readouterr().err == "sweep …\ntiming …\n"


@pytest.mark.parametrize(
    ("visible", "gpus", "each", "groups"),
    [
        ("", 4, 1, ["0", "1", "2", "3"]),
        ("", 5, 2, ["0,1", "2,3"]),
        ("3,5", 2, 1, ["3", "5"]),
        ("3,5,6", 2, 2, ["3,5"]),
        ("3", 0, 1, []),
    ],
)
def test_every_process_sees_gpus_of_its_own(monkeypatch, visible, gpus, each, groups):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers.gpu_groups(gpus, each) == groups


def test_workers_know_their_gpus_before_torch_is_imported():
    """They import the main module first; torch may ask for the GPUs as soon as it is there."""
    code = (
        "import sys, benchmarks.__main__, scripts.annotate_rewards; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_one_worker_runs_here():
    kept = {}
    with workers.ThisProcess() as here, here.progress(3):
        assert here.run(str, [1, 2], description="write") == ["1", "2"]
        assert here.run(str, [3], description="keep", on_result=kept.__setitem__) == []
    assert kept == {3: "3"}


CODE = """
import sys, time
from pathlib import Path
from benchmarks.runtime import files, workers
from benchmarks.runtime.command_line import exit_code

def write_slowly(folder):
    def write(path):
        path.write_text("half")
        Path(folder, "begun").touch()
        time.sleep(60)
    files.write_atomically(Path(folder, "cell"), write)

def run():
    with workers.Workers() as pool, pool.progress(1.0):
        pool.run(write_slowly, sys.argv[1:], description="write")

if __name__ == "__main__":
    workers.CACHE = Path(sys.argv[1])
    sys.exit(exit_code(run, "what was finished is kept", ""))
"""


@pytest.mark.faults
def test_ctrl_c_ends_workers_at_once_without_a_trace(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(CODE)
    folder.mkdir()
    run = subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    while not (folder / "begun").exists():
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to every process
    output, errors = run.communicate(timeout=20)
    assert (run.returncode, output) == (130, "")
    message = "interrupted: what was finished is kept"
    assert errors.splitlines() == ["write …", "", message]
    assert [path.name for path in folder.iterdir()] == ["begun"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_free_memory_below_what_is_in_use_goes_back_to_the_system():
    blocks = [bytearray(1000) for _ in range(100_000)]
    last = blocks.pop()
    held = resident_megabytes()
    del blocks
    workers.release_memory()
    assert resident_megabytes() < held - 80
    assert len(last) == 1000


def resident_megabytes() -> float:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6
