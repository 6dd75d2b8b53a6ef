"""Digests of the code and packages that a cached number or a drawing depends on."""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path

from benchmarks.spec.profile import Profile, digest

ROOT = Path(__file__).resolve().parents[2]
# MODELS decide a trained model, ROWS a measured row; what only reports or draws is not in them
MODELS = (
    "sia/**/*.py",
    "benchmarks/subjects/*.py",
    "benchmarks/subjects/lab/*.py",
    "benchmarks/subjects/lab/lexicons/*.toml",
)
ROWS = (
    *MODELS,
    "benchmarks/engine/costs.py",
    "benchmarks/engine/gates.py",
    "benchmarks/engine/loading.py",
    "benchmarks/engine/measure.py",
    "benchmarks/engine/traces.py",
)
DRAWING = (  # what all figures share
    "figures/base.py", "figures/methods.py", "figures/style.py", "analysis/divergence.py",
    "analysis/estimates.py", "analysis/labels.py", "spec/methods.py",
)  # fmt: skip
REPORTING = ("quality.py", "theory.py", "lm_eval.py")
BLOCKS, BLOCK = 256, 2**16  # read of a big file: a block of so many bytes here and there
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def row_code(profile: Profile) -> str:
    """Return the digest of the code and packages that decide a profile's measured rows."""
    return code_digest((*ROWS, f"benchmarks/subjects/{profile.subject}/*.py"))


@cache
def code_digest(patterns: tuple[str, ...]) -> str:
    """Return the digest of files, but for comments and docstrings, and of the packages they use.

    Args:
        patterns: Globs below the project's folder, such as MODELS or ROWS.
    """
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    decisive = sorted(path for path in paths if path.name not in REPORTING)
    return _digest([*(f"{name} {version(name)}" for name in PACKAGES), *_sources(decisive)])


def input_states(profile: Profile) -> dict[str, str]:
    """Return the state of each file and folder that a profile names, where it is there."""
    inputs = profile.local_inputs.items()
    return {name: digest(states) for name, paths in inputs if (states := file_states(paths))}


def file_states(paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Return name and digest of files, and of all files in folders but hidden ones."""
    files = [
        file
        for path in paths
        for file in (path, *sorted(path.rglob("*")))
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    stats = [file.stat() for file in files]
    return [
        (file.name, _content(file, stat.st_size, stat.st_mtime_ns))
        for file, stat in zip(files, stats, strict=True)
    ]


@lru_cache(maxsize=4096)
def _content(file: Path, size: int, time: int) -> str:
    """Return the digest of a file of this size; it is read once for every `time` of change.

    All of a file counts or, of a big one, blocks that lie evenly, first and last among them:
    training changes weights everywhere.
    """
    sha = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= BLOCKS * BLOCK:
            sha.update(stream.read())
        else:
            for number in range(BLOCKS):
                stream.seek(number * (size - BLOCK) // (BLOCKS - 1))
                sha.update(stream.read(BLOCK))
    return sha.hexdigest()[:16]


def drawing_code(name: str) -> str:
    """Return the digest of the code that draws a figure, or writes the report.

    Args:
        name: Name of the figure, "verdicts", "editions" or "report".
    """
    of_report = {
        "report": ("report/render.py", "report/page.html.j2"),
        "verdicts": ("report/forest.py",),
        "editions": ("report/editions.py", "report/forest.py"),
    }
    files = of_report.get(name, (f"figures/{name.replace('-', '_')}.py",))
    return _digest(_sources([ROOT / "benchmarks" / file for file in (*files, *DRAWING)]))


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _sources(paths: list[Path]) -> list[str]:
    """Return the name of each file, followed by its text."""
    sources = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        sources += [path.name, _without_docstrings(text) if path.suffix == ".py" else text]
    return sources


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return ast.dump(tree)
