"""Files written whole or not at all, that hold their own checksums; locks."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.runtime import files

INSIDE = """
import time
from pathlib import Path
from benchmarks.runtime import files

def stay(_):
    print("inside", flush=True)
    time.sleep(60)
"""


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(target):
        target.write_text("half")
        raise RuntimeError("disk full")

    path = tmp_path / "folder" / "table.csv"
    files.write_text(path, "whole")
    with pytest.raises(RuntimeError, match="disk full"):
        files.write_atomically(path, fail)
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["table.csv"]


def test_frames_are_read_back_with_their_attributes(tmp_path):
    frame = pd.DataFrame({"a": np.array([1, 2], dtype=np.int8), "b": [0.5, 1.5]})
    frame.attrs["thresholds"] = {"0.2": 1.25}
    for name in ("one", "two"):
        files.write_frame(tmp_path / name, frame)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = files.read_frame(tmp_path / "one")
    pd.testing.assert_frame_equal(loaded, frame)
    assert loaded.attrs == frame.attrs


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_damage_to_a_cell_is_detected(tmp_path_factory, place, bit, cut):
    """Any bit flipped, in the pages, the footer or the notes, and any end lost."""
    path = tmp_path_factory.mktemp("cells") / "a.cell"
    frame = pd.DataFrame({"a": np.arange(50, dtype=np.int8)})
    frame.attrs["thresholds"] = {"0.2": 1.25}
    files.write_cell(path, frame)
    loaded = files.read_cell(path)
    pd.testing.assert_frame_equal(loaded, frame)
    assert loaded.attrs == frame.attrs
    content = bytearray(path.read_bytes())
    offset = int(place * len(content))
    if cut:
        del content[offset:]
    else:
        content[offset] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"a\.cell is damaged, its checksum is not that of its content: "
        "delete it and run again",
    ):
        files.read_cell(path)


def test_a_sealed_folder_is_what_was_written(tmp_path):
    (tmp_path / "weights").write_bytes(b"1234")
    files.seal(tmp_path)
    assert files.check_seal(tmp_path) == tmp_path
    for content in (b"1235", b"123"):
        (tmp_path / "weights").write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"is damaged \(weights is not what was written\): "
            "delete the folder and run again",
        ):
            files.check_seal(tmp_path)
    (tmp_path / files.SEAL).write_text("{")
    with pytest.raises(ValueError, match=r"is damaged \(sha256.json is not"):
        files.check_seal(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"base is missing \(was it removed, or the code edited, while this ran\?\): "
        "run again",
    ):
        files.check_seal(tmp_path / "base")


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path):
    def write(target, text="mine"):
        target.mkdir()
        (target / "file").write_text(text)
        if text == "mine":
            files.write_atomically(tmp_path / "model", lambda other: write(other, "theirs"))

    files.write_atomically(tmp_path / "model", write)
    assert (tmp_path / "model/file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen]:
    """Another process that says "inside" and then sleeps; it is killed at the end."""
    code = f"{INSIDE}\n{code}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout.readline() == "inside\n"
        try:
            yield running
        finally:
            running.kill()


def test_only_one_process_at_a_time_is_inside_a_lock(tmp_path):
    """The second waits for the first, and a killed one leaves it."""
    with process(f"with files.file_lock(Path({str(tmp_path / 'lock')!r})): stay(0)") as other:
        threading.Timer(0.5, other.kill).start()
        started = time.monotonic()
        with files.file_lock(tmp_path / "lock"):
            assert time.monotonic() - started > 0.3


def test_a_second_run_on_an_output_is_refused_and_the_end_of_the_first_leaves_nothing(tmp_path):
    message = f"another run is writing {tmp_path / 'out'}: wait until it ends, or name another outp"
    with files.working_alone(tmp_path / "out"):
        with files.working_alone(tmp_path / "other"):
            pass
        with pytest.raises(ValueError, match=message), files.working_alone(tmp_path / "out"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_was_writing_is_removed_and_what_one_is_writing_stays(tmp_path):
    files.write_text(tmp_path / "models/base", "whole")
    with process(f"files.write_atomically(Path({str(tmp_path / 'models/value')!r}), stay)"):
        files.remove_leftovers(tmp_path)
        assert len(list((tmp_path / "models").iterdir())) == 2
    files.remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["base"]
    elsewhere = tmp_path / f".value-x@another-machine@{2**22 + 1}{files.UNFINISHED}"
    elsewhere.mkdir()  # whose processes are not to be seen from here
    files.remove_leftovers(tmp_path)
    assert elsewhere.exists()


def test_a_truncated_frame_is_an_error(tmp_path):
    files.write_frame(tmp_path / "cell", pd.DataFrame({"a": range(1000)}))
    (tmp_path / "cell").write_bytes((tmp_path / "cell").read_bytes()[:100])
    with pytest.raises(ValueError, match="cell is no readable parquet file"):
        files.read_frame(tmp_path / "cell")
