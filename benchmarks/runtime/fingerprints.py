"""What a cached number depends on, as digests."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from benchmarks.spec.profile import Profile

ROOT = Path(__file__).resolve().parents[2]
# What decides a trained model, and what besides decides a measured row; reporting, summarising and drawing are not among them.
MODELS = (
    "sia/**/*.py",
    "benchmarks/subjects/base.py",
    "benchmarks/subjects/lab/*.py",
    "benchmarks/subjects/lab/*.toml",
)
ROWS = (
    *MODELS,
    *(
        f"benchmarks/engine/{name}.py"
        for name in ("costs", "gates", "loading", "measure", "traces")
    ),
)
REPORTING = ("quality.py", "theory.py", "lm_eval.py")
PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def row_code(profile: Profile) -> str:
    """Return the digest of the code and packages that decide a profile's measured rows."""
    return code_digest((*ROWS, f"benchmarks/subjects/{profile.subject}/*.py"))


@cache
def code_digest(patterns: tuple[str, ...]) -> str:
    """Of the files of MODELS or ROWS, comments and docstrings aside, and of the packages they run on."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    decisive = sorted(path for path in paths if path.name not in REPORTING)
    return _digest([*(f"{name} {version(name)}" for name in PACKAGES), *_sources(decisive)])


def drawing_code(name: str) -> str:
    """Of what draws the figure of this name, or writes the report, comments and docstrings aside."""
    drawing = "report/render" if name == "report" else f"figures/{name.replace('-', '_')}"
    return _digest(
        _sources(
            [
                ROOT / f"benchmarks/{file}.py"
                for file in (drawing, "figures/style", "analysis/estimates")
            ]
        )
    )


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _sources(paths: list[Path]) -> list[str]:
    texts = [(path, path.read_text(encoding="utf-8")) for path in paths]
    return [
        part
        for path, text in texts
        for part in (path.name, _without_docstrings(text) if path.suffix == ".py" else text)
    ]


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return ast.dump(tree)
