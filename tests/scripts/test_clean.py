"""`make clean`: lists, asks, deletes what can be made anew, and nothing else."""

import io
import sys

import pytest

from scripts import clean

GONE = (
    ".cache/lab/models",
    ".cache/my-qwen/cells",
    "results/smoke",
    "figures/smoke",
    ".ruff_cache",
)
KEPT = ("results/lab", "results/my-qwen", "my-value-model", ".venv/lib")


@pytest.fixture
def project(tmp_path):
    for folder in (*GONE, *KEPT, "results/my-qwen/.x-1@here@7.unfinished"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_bytes(b"x" * 50_000)
    (tmp_path / ".cache/latest").symlink_to("lab")
    return tmp_path


def answer(monkeypatch, text: str, terminal: bool = True) -> None:
    stdin = io.StringIO(text)
    stdin.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdin", stdin)


def left(project) -> set[str]:
    return {str(file.parent.relative_to(project)) for file in project.rglob("file")}


def test_recreatable_files_are_listed_and_deleted(project, monkeypatch, capsys):
    answer(monkeypatch, "y\n")
    assert clean.main([], project) == 0
    assert left(project) == set(KEPT)
    assert not (project / ".cache/latest").is_symlink()
    printed = capsys.readouterr().out
    assert "     0.1 MB  .cache/my-qwen: trained models and measured cells; a run" in printed
    assert (
        "Tables and figures of all other profiles, models in folders of your own, and .venv stay."
        in printed
    )
    assert clean.main([], project) == 0
    assert capsys.readouterr().out == "nothing to delete\n"


@pytest.mark.parametrize(
    ("text", "terminal", "code", "message"),
    [
        ("\n", True, 0, "nothing was deleted"),
        ("", True, 130, "nothing was deleted"),
        ("y\n", False, 2, "without a terminal to ask at: make clean YES=1 deletes"),
    ],
)
def test_nothing_is_deleted_without_confirmation(
    project, monkeypatch, capsys, text, terminal, code, message
):
    before = left(project)
    answer(monkeypatch, text, terminal)
    assert clean.main([], project) == code
    assert message in "".join(capsys.readouterr())
    assert left(project) == before
    assert clean.main(["--yes"], project) == 0
    assert left(project) == set(KEPT)
