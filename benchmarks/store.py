"""Files that are written whole or not at all, and where work in progress is kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa

from benchmarks.digests import ROOT

CACHE = ROOT / ".cache"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path` and, once it is safely on disk, gives it the final name.

    `write` may make a file or a folder; an existing folder of that name is kept as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        made = temporary / path.name
        write(made)
        for file in [made, *made.rglob("*")]:
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if not path.is_dir():
            made.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link(path: Path, target: Path) -> None:
    """Makes `path` a link to `target`, its sibling, in place of any older link."""
    temporary = path.with_name(f".{path.name}-link-{os.getpid()}")
    temporary.symlink_to(target.name)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda made: made.write_text(text, encoding="utf-8"))


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Parquet whose bytes depend on nothing but the frame and the versions of the packages."""
    write_atomically(path, lambda made: frame.to_parquet(made, index=False, compression="zstd", compression_level=19))


def read_frame(path: Path) -> pd.DataFrame:
    """Errors: ValueError in one sentence for a damaged file."""
    try:
        return pd.read_parquet(path)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no readable parquet file (truncated?): delete it and run again") from error
