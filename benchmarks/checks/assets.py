"""The models of the lab that are committed below assets/lab, and whether they are whole."""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.runtime.files import read_json, sha256
from benchmarks.runtime.fingerprints import ROOT

ASSETS = ROOT / "assets" / "lab"
EXPORT = "python scripts/export_lab_models.py"
DIGESTS = "digests.json"
LARGEST = 4_000_000  # bytes of all files together


def damage(folder: Path) -> Iterator[str]:
    """Yield a sentence for each file below a folder that is not what its digests describe."""
    path = folder / DIGESTS
    if not path.exists():
        yield f"{path} is missing: git restores it, or {EXPORT} writes it anew"
        return
    try:
        digests = read_json(path)
    except ValueError as error:
        yield str(error)
        return
    present = digests_of(folder)
    for name in sorted(digests.keys() | present.keys()):
        if name not in digests:
            yield f"{folder / name} is not described by {DIGESTS}"
        elif present.get(name) != digests[name]:
            yield f"{folder / name} is missing or not the file that {DIGESTS} describes"
    if (size := size_of(folder)) > LARGEST:
        yield f"{folder} has {size:,} bytes, more than {LARGEST:,}"


def digests_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder but that of the digests."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): sha256(p) for p in files if p != folder / DIGESTS}


def write_digests(folder: Path) -> None:
    """Write the digests of a folder's files into it."""
    text = json.dumps(digests_of(folder), indent=1) + "\n"
    (folder / DIGESTS).write_text(text, encoding="utf-8")


def size_of(folder: Path) -> int:
    """Return the size of all files below a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
