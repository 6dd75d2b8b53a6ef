"""What `make verify` sees: every way in which tables, summaries, verdicts and figures can fall apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import figure3, figure5, tables
from benchmarks.__main__ import main
from benchmarks.profile import load_profile
from benchmarks.tables import sha256
from tests.fake import FakeResults

SMOKE = load_profile("smoke")


def places(patch: pytest.MonkeyPatch, path: Path) -> None:
    patch.setattr(tables, "RESULTS", path / "results")
    patch.setattr(tables, "FIGURES", path / "figures")
    for module in ("benchmarks.__main__", "benchmarks.tables"):
        patch.setattr(f"{module}.ROOT", path)
    patch.setattr(tables, "git_commit", lambda: "c0ffee")
    patch.setattr("benchmarks.__main__.FIGURES", {"figure3": figure3, "figure5": figure5})


def write(name: str, figure, effect=lambda cell: 0.0) -> None:
    rows = figure.collect(SMOKE, range(2), FakeResults(SMOKE, effect))
    tables.write_table(SMOKE, name, rows, figure.summarize(rows, SMOKE), range(2), 1.0, {})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two tables of the smoke profile, drawn and judged."""
    path = tmp_path_factory.mktemp("committed")
    with pytest.MonkeyPatch.context() as patch:
        places(patch, path)
        write("figure3", figure3)
        write("figure5", figure5)
        assert main(["figures", "--profile", "smoke"]) == 0
    return path


@pytest.fixture
def committed(made, tmp_path, monkeypatch) -> Path:
    """A copy of them, to damage."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    places(monkeypatch, tmp_path)
    return tmp_path


def verify(capsys) -> tuple[int, list[str]]:
    capsys.readouterr()
    code = main(["verify"])
    *faults, last = capsys.readouterr().out.splitlines()
    assert last == f"verify: 4 parts checked, {len(faults)} faults"
    return code, faults


def test_what_belongs_together_passes(committed, capsys):
    assert verify(capsys) == (0, [])


def rehash(committed: Path, name: str) -> None:
    """As one would who changes a table and its hash."""
    path = committed / f"results/smoke/{name}.json"
    provenance = json.loads(path.read_text())
    provenance["sha256"] = {file: sha256(path.parent / file) for file in provenance["sha256"]}
    path.write_text(json.dumps(provenance))


def change_provenance(committed: Path, **fields) -> None:
    path = committed / "results/smoke/figure3.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | fields).items() if v is not None}))


def change_a_number(committed: Path) -> None:
    path = committed / "results/smoke/figure3.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[3, "estimate"] = "0.1234"
    path.write_text(table.to_csv(index=False))


def honest_change(committed: Path) -> None:
    change_a_number(committed)
    rehash(committed, "figure3")


def drop_a_row(committed: Path) -> None:
    path = committed / "results/smoke/figure3.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    rehash(committed, "figure3")


def change_a_verdict(committed: Path) -> None:
    path = committed / "results/smoke/claims.csv"
    text = path.read_text()
    wrong = "reproduced" if "undecided" in text else "undecided"
    path.write_text(text.replace("undecided" if "undecided" in text else "not reproduced", wrong))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (change_a_number, "fault: smoke/figure3: figure3.csv is missing or not the file that figure3.json describes"),
        (honest_change, "fault: smoke/figure3: the column estimate of figure3.csv does not follow from its rows"),
        (drop_a_row, "fault: smoke/figure3: figure3.csv has other rows or columns than follow from its rows"),
        (change_a_verdict, "fault: smoke/claims: the column verdict of claims.csv does not follow from the tables"),
        (lambda c: (c / "results/smoke/claims.csv").unlink(), "fault: smoke/claims: claims.csv is missing"),
        (
            lambda c: (c / "results/smoke/figure3.parquet").unlink(),
            "figure3.parquet is missing or not the file that figure3.json describes",
        ),
        (lambda c: (c / "results/smoke/figure3.json").write_text("{"), "figure3.json is no readable JSON"),
        (lambda c: change_provenance(c, profile_digest="0"), "it was measured under other settings than profile smoke has now"),
        (lambda c: change_provenance(c, hardware=None), "figure3.json does not say hardware"),
        (lambda c: change_provenance(c, git_commit="c0ffee+changes"), "it was measured by sources that were never committed"),
        (lambda c: change_provenance(c, sha256={}), "figure3.json names no files with their hashes"),
        (lambda c: (c / "figures/smoke/figure3.png").write_bytes(b"x"), "figure3.png is missing or not what was drawn"),
        (lambda c: (c / "figures/smoke/figure3.pdf").unlink(), "figure3.pdf is missing or not what was drawn"),
        (
            lambda c: (c / "figures/smoke/report.html").write_text("old"),
            "smoke/report: report.html was made from other files than there are",
        ),
        (
            lambda c: (c / "figures/smoke/report.html").write_text('<span id="made-from">{"cut</span>'),
            "report.html was made from other files",
        ),
        (lambda c: (c / "figures/smoke/drawn.json").unlink(), "no figure of figure3 was drawn"),
    ],
)
def test_every_fault_is_seen(committed, capsys, damage, fault):
    damage(committed)
    code, faults = verify(capsys)
    assert code == 2
    assert any(fault in line for line in faults), faults


def test_a_figure_of_an_older_table_is_seen(committed, capsys):
    write("figure3", figure3, lambda cell: cell.target_ratio)
    code, faults = verify(capsys)
    assert code == 2
    assert any("the figure of figure3 was drawn from another table" in line for line in faults)
