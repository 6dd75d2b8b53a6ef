"""Files that are written whole or not at all, and where work in progress is kept: files there hold their own checksum."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pandas as pd
import pyarrow as pa

from benchmarks.runtime.fingerprints import ROOT

CACHE = ROOT / ".cache"
SEAL = "sha256.json"
UNFINISHED, HELD = (
    ".unfinished",
    ".held",
)  # ends the name of a folder in which something is being written; the file that is locked there


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path` and, once it is safely on disk, gives it the final name.

    `write` may make a file or a folder; an existing folder of that name is kept as it is.
    """
    with _unfinished(path) as made:
        write(made)
        for file in [made, *made.rglob("*")]:
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if not path.is_dir():
            _replace(made, path)


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """The name of `path` in a new folder beside it, which is removed at the end, and locked until then: one that nobody locks was left."""
    folder, handle = _new_folder(path)
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        handle.close()


def _new_folder(path: Path) -> tuple[Path, IO[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=UNFINISHED, dir=path.parent))
        with suppress(FileNotFoundError):  # another process took it for left before it was locked
            handle = (folder / HELD).open("w")
            fcntl.flock(handle, fcntl.LOCK_EX)
            if (folder / HELD).exists():
                return folder, handle
            handle.close()


def remove_leftovers(where: Path) -> None:
    """Removes, in a folder and all inside, what killed processes were writing; what is being written stays."""
    for parent, names, _ in os.walk(where):
        for folder in [Path(parent, name) for name in names if name.endswith(UNFINISHED)]:
            with suppress(BlockingIOError, FileNotFoundError), (folder / HELD).open("w") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def _replace(made: Path, path: Path) -> None:
    try:
        made.replace(path)
    except OSError:
        if not (
            made.is_dir() and path.is_dir()
        ):  # else another process made the same folder meanwhile, which is kept
            raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process is inside with the same `path`, an empty file that stays. A killed process leaves by being killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def link(path: Path, target: Path) -> None:
    """Makes `path` a link to `target`, its sibling, in place of any older link."""
    with _unfinished(path) as made:
        made.symlink_to(target.name)
        made.replace(path)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda made: made.write_text(text, encoding="utf-8"))


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Parquet whose bytes depend on nothing but the frame and the versions of the packages."""
    write_atomically(
        path,
        lambda made: frame.to_parquet(made, index=False, compression="zstd", compression_level=19),
    )


def read_frame(path: Path) -> pd.DataFrame:
    """Errors: ValueError in one sentence for a damaged file."""
    try:
        return pd.read_parquet(path)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path} is no readable parquet file (truncated?): delete it and run again"
        ) from error


def read_json(path: Path) -> dict:
    """Errors: ValueError in one sentence for what is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no readable JSON (damaged?): restore it, or make it anew"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold a JSON object, it holds a {type(found).__name__}")
    return found


def write_cell(path: Path, frame: pd.DataFrame) -> None:
    """A frame of the cache: the SHA-256 of a parquet file, and the file. `attrs` are kept."""
    written = frame.to_parquet(None, index=False, compression="zstd", compression_level=3)
    write_atomically(
        path, lambda made: made.write_bytes(hashlib.sha256(written).digest() + written)
    )


def read_cell(path: Path) -> pd.DataFrame:
    """Errors: ValueError in one sentence for a file that is not what was written."""
    content = path.read_bytes()
    digest, written = content[:32], content[32:]
    if hashlib.sha256(written).digest() != digest:
        raise ValueError(
            f"{path} is damaged, its checksum is not that of its content: delete it and run again"
        )
    return pd.read_parquet(io.BytesIO(written))


def seal(folder: Path) -> None:
    """Writes the checksums of the files of a folder of the cache into it."""
    sums = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }
    (folder / SEAL).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def check_seal(folder: Path) -> Path:
    """The folder itself. Errors: ValueError in one sentence if it is not there, or a file is not what was written."""
    if not folder.exists():
        raise ValueError(
            f"{folder} is missing (was it removed, or the code edited, while this ran?): run again"
        )
    try:
        sums = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        damaged = [
            name
            for name, digest in sums.items()
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest
        ]
    except (OSError, ValueError, AttributeError):
        damaged = [SEAL]
    if damaged:
        raise ValueError(
            f"{folder} is damaged ({', '.join(damaged)} is not what was written): delete the folder and run again"
        )
    return folder
