"""What `make verify` sees: every way in which tables, summaries, verdicts and figures can fall apart."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.analysis import tables
from benchmarks.analysis.tables import sha256
from benchmarks.checks.verify import _reference
from benchmarks.figures import figure3, figure5
from benchmarks.figures.registry import FIGURES
from benchmarks.runtime import fingerprints
from benchmarks.spec.profile import load_profile
from tests.helpers.fake import FakeResults

SMOKE = load_profile("smoke")


def places(patch: pytest.MonkeyPatch, path: Path) -> None:
    patch.setattr(tables, "RESULTS", path / "results")
    patch.setattr(tables, "FIGURES", path / "figures")
    for module in ("benchmarks.__main__", "benchmarks.analysis.tables"):
        patch.setattr(f"{module}.ROOT", path)
    patch.setattr(tables, "git_commit", lambda: "c0ffee")
    patch.setattr(
        "benchmarks.__main__.FIGURES",
        {"figure3": FIGURES["figure3"], "figure5": FIGURES["figure5"]},
    )


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
    restore = "; git restore results figures brings back what was committed" if faults else ""
    assert last == f"verify: 4 parts checked, {len(faults)} faults{restore}"
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
    path.write_text(
        json.dumps(
            {k: v for k, v in (json.loads(path.read_text()) | fields).items() if v is not None}
        )
    )


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
        (
            change_a_number,
            "fault: smoke/figure3: figure3.csv is missing or not the file that figure3.json describes",
        ),
        (
            honest_change,
            "fault: smoke/figure3: the column estimate of figure3.csv does not follow from its rows",
        ),
        (
            drop_a_row,
            "fault: smoke/figure3: figure3.csv has other rows or columns than follow from its rows",
        ),
        (
            change_a_verdict,
            "fault: smoke/claims: the column verdict of claims.csv does not follow from the tables",
        ),
        (
            lambda c: (c / "results/smoke/claims.csv").unlink(),
            "fault: smoke/claims: claims.csv is missing",
        ),
        (
            lambda c: (c / "results/smoke/figure3.parquet").unlink(),
            "figure3.parquet is missing or not the file that figure3.json describes",
        ),
        (
            lambda c: (c / "results/smoke/figure3.json").write_text("{"),
            "figure3.json is no readable JSON",
        ),
        (
            lambda c: (c / "results/smoke/figure3.json").unlink(),
            "figure3.json, which says where its numbers come from, is missing",
        ),
        (
            lambda c: change_provenance(c, profile_digest="0"),
            "it was measured under other settings than profile smoke has now",
        ),
        (lambda c: change_provenance(c, hardware=None), "figure3.json does not say hardware"),
        (
            lambda c: change_provenance(c, git_commit="c0ffee+changes"),
            "it was measured by sources that were never committed",
        ),
        (
            lambda c: change_provenance(c, sha256={}),
            "figure3.json names no files with their hashes",
        ),
        (
            lambda c: (c / "figures/smoke/figure3.png").write_bytes(b"x"),
            "figure3.png is missing or not what was drawn",
        ),
        (
            lambda c: (c / "figures/smoke/figure3.pdf").unlink(),
            "figure3.pdf is missing or not what was drawn",
        ),
        (
            lambda c: (c / "figures/smoke/report.html").write_text("old"),
            "smoke/report: report.html was made from other files than there are",
        ),
        (
            lambda c: (c / "figures/smoke/report.html").write_text(
                '<span id="made-from">{"cut</span>'
            ),
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


def test_rows_of_earlier_code_are_a_fault_and_are_not_summarised(committed, capsys):
    path = committed / "results/smoke/figure3.parquet"
    pd.read_parquet(path).drop(columns="judge").to_parquet(path, index=False)
    rehash(committed, "figure3")
    told = "figure3.parquet lacks what its summary reads (['judge'] not in index); if earlier code measured it, measure again with FRESH=1"
    code, faults = verify(capsys)
    assert code == 2
    assert f"fault: smoke/figure3: {told}" in faults, faults
    before = (committed / "results/smoke/figure3.csv").read_bytes()
    assert main(["summaries", "--profile", "smoke"]) == 2
    assert told in capsys.readouterr().err
    assert (committed / "results/smoke/figure3.csv").read_bytes() == before


def test_a_damaged_table_is_one_fault(committed, capsys):
    """What stands on it is judged when it is whole again; the verdicts on other tables are judged all the same."""
    (committed / "results/smoke/figure3.parquet").write_bytes(b"x")
    code, faults = verify(capsys)
    assert (code, len(faults)) == (2, 1)
    path = committed / "results/smoke/claims.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[table["figure"] != "figure3", "verdict"] = "wrong"
    path.write_text(table.to_csv(index=False))
    assert any("the column verdict of claims.csv" in fault for fault in verify(capsys)[1])


def test_a_figure_of_an_older_table_is_seen(committed, capsys):
    write("figure3", figure3, lambda cell: cell.target_ratio)
    code, faults = verify(capsys)
    assert code == 2
    assert any("the figure of figure3 was drawn from another table" in line for line in faults)


def test_a_figure_by_other_code_is_seen(committed, capsys, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.checks.verify.drawing_code",
        lambda name: "other" if name == "figure5" else fingerprints.drawing_code(name),
    )
    assert verify(capsys) == (
        2,
        ["fault: smoke/figure5: the figure of figure5 was drawn by other code than there is now"],
    )


def test_what_draws_a_figure_is_its_file_and_the_style(monkeypatch, tmp_path):
    shutil.copytree(
        fingerprints.ROOT / "benchmarks",
        tmp_path / "benchmarks",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    monkeypatch.setattr(fingerprints, "ROOT", tmp_path)
    before = {name: fingerprints.drawing_code(name) for name in ("figure3", "value-error")}
    for file, moved in (
        ("figure5", set()),
        ("value_error", {"value-error"}),
        ("style", {"figure3", "value-error"}),
    ):
        path = tmp_path / f"benchmarks/figures/{file}.py"
        path.write_text(path.read_text() + "\n# a comment\n")
        assert {name: fingerprints.drawing_code(name) for name in before} == before
        path.write_text(path.read_text() + "\nmore = 1\n")
        after = {name: fingerprints.drawing_code(name) for name in before}
        assert {name for name in before if after[name] != before[name]} == moved
        before = after


def test_a_reference_that_is_not_of_its_table_is_seen(committed, monkeypatch):
    """It lies beside tables of all of several replicates."""
    profile = dataclasses.replace(SMOKE, replicates=2)
    summary = pd.read_csv(committed / "results/smoke/figure3.csv")
    path = committed / "results/smoke/reference/figure3.csv"
    assert _reference(SMOKE, "figure3", summary) == []
    assert _reference(profile, "figure3", summary) == ["reference/figure3.csv is missing"]
    path.parent.mkdir()
    kept = summary[summary["objective"] == "all"]
    path.write_text(kept.to_csv(index=False))
    assert _reference(profile, "figure3", summary) == []
    path.write_text(kept.assign(estimate=kept["estimate"] + 1).to_csv(index=False))
    assert _reference(profile, "figure3", summary) == [
        "the column estimate of reference/figure3.csv does not follow from figure3.csv"
    ]


def test_timings_that_are_not_those_described_are_seen(committed, capsys):
    (committed / "results/speed.json").write_text(json.dumps({"sha256": {"speed.csv": "0"}}))
    assert main(["verify"]) == 2
    assert (
        "fault: speed: speed.csv is missing or not the file that speed.json describes"
        in capsys.readouterr().out
    )
