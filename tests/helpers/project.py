"""A project of its own in a temporary folder."""

from pathlib import Path

import pytest

from benchmarks.analysis import tables


def redirect_output(patch: pytest.MonkeyPatch, path: Path) -> None:
    """Redirect results and figures to folders below this path."""
    patch.setattr(tables, "RESULTS", path / "results")
    patch.setattr(tables, "FIGURES", path / "figures")
    for module in ("benchmarks.__main__", "benchmarks.analysis.tables"):
        patch.setattr(f"{module}.ROOT", path)
    patch.setattr(tables, "git_commit", lambda: "c0ffee")
