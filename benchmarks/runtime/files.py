"""Files that are written whole or not at all, and the cache, whose files hold their checksums."""

import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyarrow as pa
from filelock import FileLock, Timeout

from benchmarks.runtime.fingerprints import ROOT

CACHE = ROOT / ".cache"
SEAL = "sha256.json"
UNFINISHED = ".unfinished"  # ends the name of a folder in which something is being written


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file or a folder beside `path` and, once it is safely on disk, move it there.

    Args:
        path: Final place. A folder that is there, or that another process makes meanwhile, stays.
        write: Called with the temporary path, where it makes the file or the folder.
    """
    with _unfinished(path) as temporary:
        write(temporary)
        for file in [temporary, *temporary.rglob("*")]:
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        try:
            temporary.replace(path)
        except OSError:
            if not (temporary.is_dir() and path.is_dir()):
                raise


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """Yield the name of `path` in a new folder beside it, which tells this machine and process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = f"@{platform.node()}@{os.getpid()}{UNFINISHED}"
    prefix = f".{path.name}-"
    with tempfile.TemporaryDirectory(
        prefix=prefix, suffix=owner, dir=path.parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder, path.name)


def remove_leftovers(folder: Path) -> None:
    """Remove, at any depth, what processes of this machine were writing when they were killed."""
    for unfinished in list(folder.rglob(f".*{UNFINISHED}")):
        _, machine, process = unfinished.name.removesuffix(UNFINISHED).rsplit("@", 2)
        if machine == platform.node() and not _is_running(int(process)):
            shutil.rmtree(unfinished, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def file_lock(path: Path) -> FileLock:
    """Return the lock of a lock file, whose folder is created if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


@contextmanager
def working_alone(output: Path) -> Iterator[None]:
    """Hold the lock of an output, in a hidden file beside it, while a command works on it.

    Raises:
        ValueError: If another command does already.
    """
    lock = file_lock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"another run is writing {output}: wait until it ends, or name another output"
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, its sibling, in place of any older link."""
    with _unfinished(path) as temporary:
        temporary.symlink_to(target.name)
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a text atomically, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a Parquet file whose bytes depend only on the frame and the versions of packages."""
    options = {"index": False, "compression": "zstd", "compression_level": 19}
    write_atomically(path, lambda temporary: frame.to_parquet(temporary, **options))


def read_frame(path: Path) -> pd.DataFrame:
    """Read a Parquet file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is no readable parquet file (truncated?): delete it and run again"
        ) from error


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ValueError: If the file holds anything else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no readable JSON (damaged?): restore it, or make it anew"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, it holds a {type(content).__name__}")
    return content


def write_cell(path: Path, frame: pd.DataFrame) -> None:
    """Write a frame of the cache with its `attrs`: the SHA-256 of a Parquet file, then the file."""
    content = frame.to_parquet(None, index=False, compression="zstd", compression_level=3)
    checksum = hashlib.sha256(content).digest()
    write_atomically(path, lambda temporary: temporary.write_bytes(checksum + content))


def read_cell(path: Path) -> pd.DataFrame:
    """Read a frame of the cache.

    Raises:
        ValueError: If its content is not what was written.
    """
    file = path.read_bytes()
    checksum, content = file[:32], file[32:]
    if hashlib.sha256(content).digest() != checksum:
        raise ValueError(
            f"{path} is damaged, its checksum is not that of its content: delete it and run again"
        )
    return pd.read_parquet(io.BytesIO(content))


def seal(folder: Path) -> None:
    """Write the checksums of all files below a folder into it."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    checksums = {str(file.relative_to(folder)): sha256(file) for file in files}
    (folder / SEAL).write_text(json.dumps(checksums, indent=1), encoding="utf-8")


def check_seal(folder: Path) -> Path:
    """Return `folder` if its files are those that were sealed.

    Raises:
        ValueError: If the folder is missing, or a file is not what was written.
    """
    if not folder.exists():
        raise ValueError(
            f"{folder} is missing (was it removed, or the code edited, while this ran?): run again"
        )
    try:
        checksums = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        damaged = [name for name, sha in checksums.items() if sha256(folder / name) != sha]
    except (OSError, ValueError, AttributeError):
        damaged = [SEAL]
    if damaged:
        raise ValueError(
            f"{folder} is damaged ({', '.join(damaged)} is not what was written): "
            "delete the folder and run again"
        )
    return folder


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
