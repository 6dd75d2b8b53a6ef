"""A project of its own in a temporary folder."""

import shutil
from pathlib import Path

import pytest

from benchmarks.analysis import tables
from benchmarks.spec.profile import PROFILES

CACHED = ("analysis.tables", "engine.run", "engine.store", "subjects.lab.replicate")


def copy_project(patch: pytest.MonkeyPatch, path: Path) -> Path:
    """Redirect profiles, cache, results and figures to folders below this path.

    Returns:
        The folder of profiles, which holds a copy of each of the project's own.
    """
    profiles = shutil.copytree(PROFILES, path / "profiles")
    patch.setattr("benchmarks.spec.profile.PROFILES", profiles)
    for module in CACHED:
        patch.setattr(f"benchmarks.{module}.CACHE", path / ".cache")
    redirect_output(patch, path)
    return profiles


def redirect_output(patch: pytest.MonkeyPatch, path: Path) -> None:
    """Redirect results and figures to folders below this path."""
    patch.setattr(tables, "RESULTS", path / "results")
    patch.setattr(tables, "FIGURES", path / "figures")
    for module in ("benchmarks.__main__", "benchmarks.analysis.tables"):
        patch.setattr(f"{module}.ROOT", path)
    patch.setattr(tables, "git_commit", lambda: "c0ffee")
