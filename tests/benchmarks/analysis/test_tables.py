"""Result tables, and the command line over them."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.__main__ import FIGURES, main
from benchmarks.analysis import tables
from benchmarks.checks import assets
from benchmarks.report import editions
from benchmarks.spec.profile import profile_digest
from tests.helpers.fake import SMOKE, FakeResults
from tests.helpers.project import redirect_output


@pytest.fixture
def whole_assets(tmp_path, monkeypatch):
    """A folder of models of the lab, with nothing but its digests."""
    folder = tmp_path / "assets"
    folder.mkdir()
    assets.write_digests(folder)
    monkeypatch.setattr(assets, "ASSETS", folder)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with a table of figure 3 for the smoke profile."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        redirect_output(patch, folder)
        rows = FIGURES["figure3"].collect(SMOKE, range(2), FakeResults(SMOKE))
        summary = FIGURES["figure3"].summarize(rows, SMOKE)
        tables.write_table(SMOKE, "figure3", rows, summary, range(2), 1.0, {})
    return folder


@pytest.fixture(scope="module")
def drawn(measured, tmp_path_factory):
    """The same with its drawings, verdicts and report."""
    folder = tmp_path_factory.mktemp("drawn") / "project"
    with pytest.MonkeyPatch.context() as patch:
        copy_project(patch, measured, folder)
        assert main(["figures", "--profile", "smoke"]) == 0
    return folder


def copy_project(patch, project, folder):
    """Copy a project into a folder, where commands find it, with figure 3 alone."""
    shutil.copytree(project, folder)
    redirect_output(patch, folder)
    patch.setattr("benchmarks.__main__.FIGURES", {"figure3": FIGURES["figure3"]})
    patch.setattr("benchmarks.figures.style.DPI", 40)
    return folder


@pytest.fixture
def table(whole_assets, measured, tmp_path, monkeypatch):
    return copy_project(monkeypatch, measured, tmp_path / "project")


@pytest.fixture
def drawn_table(whole_assets, drawn, tmp_path, monkeypatch):
    return copy_project(monkeypatch, drawn, tmp_path / "project")


def test_figure_is_drawn_from_the_table(table, capsys):
    assert main(["figure3", "--profile", "smoke"]) == 0
    printed = capsys.readouterr().out
    assert (
        "figure3: drawing from the table in results/smoke without measuring "
        "(FRESH=1 measures again)" in printed
    )
    assert "figure3: figures/smoke/figure3.png, figures/smoke/figure3.pdf" in printed
    drawn = [
        (table / "figures/smoke" / name).read_bytes() for name in ("figure3.png", "figure3.pdf")
    ]
    assert drawn[0].startswith(b"\x89PNG")
    assert drawn[1].startswith(b"%PDF")
    assert main(["figures", "--profile", "smoke"]) == 0
    printed = capsys.readouterr().out
    assert "figures: figure3 drawn in figures/smoke" in printed
    assert re.search(r"not measured\n(?:[a-z ]+  +[\d ]+\n)*caption of figure 1 ", printed)
    assert "not measured; in results/smoke/claims.csv" in printed
    assert drawn == [
        (table / "figures/smoke" / name).read_bytes() for name in ("figure3.png", "figure3.pdf")
    ]


def test_a_table_of_other_settings_is_drawn_as_stale(table, capsys):
    main(["figure3", "--profile", "smoke"])
    fresh = (table / "figures/smoke/figure3.png").read_bytes()
    path = table / "results/smoke/figure3.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"profile_digest": "0123456789abcdef"})
    )
    assert main(["figure3", "--profile", "smoke"]) == 0
    assert (
        "warning: figure3.csv is stale, it was measured under other settings"
        in capsys.readouterr().err
    )
    assert (table / "figures/smoke/figure3.png").read_bytes() != fresh


def test_another_level_asks_for_new_summaries_but_for_no_measurement(table, capsys, monkeypatch):
    other = replace(SMOKE, statistics=replace(SMOKE.statistics, level=0.5))
    monkeypatch.setattr("benchmarks.__main__.load_profile", lambda name: other)
    before, _ = tables.read_table(SMOKE, "figure3")
    assert main(["figure3", "--profile", "smoke"]) == 0
    assert capsys.readouterr().err == (
        "warning: figure3.csv is stale, it was summarized under other [statistics] than profile "
        "smoke has now: make summaries PROFILE=smoke recomputes it\n"
    )
    assert tables.existing_rows(other, "figure3") is not None
    assert main(["summaries", "--profile", "smoke"]) == 0
    assert capsys.readouterr().err == ""
    after, stale = tables.read_table(other, "figure3")
    assert not stale
    assert (after["high"] - after["low"]).sum() < (before["high"] - before["low"]).sum()


@pytest.mark.parametrize(
    "command", ["figure3", "figures", "summaries", "claims", "report", "verify"]
)
def test_every_command_names_models_retrained_under_the_same_path(
    drawn_table, capsys, monkeypatch, command
):
    path = drawn_table / "results/smoke/figure3.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inputs": {"value-mean": "before"}}))
    monkeypatch.setattr(tables, "input_states", lambda profile: {"value-mean": "now"})
    capsys.readouterr()
    assert main([command, "--profile", "smoke"]) == 0
    printed = capsys.readouterr()
    message = "measured with other files of value-mean than the present ones"
    if command == "verify":
        assert f"outdated: figure3.csv was {message}\n" in printed.out
    else:
        assert printed.err == f"warning: figure3.csv is stale, it was {message}\n"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"profile_digest": "0"}, "measured under other settings than profile smoke has now"),
        (
            {"inputs": {"value-mean": "0"}},
            "measured with other files of value-mean than the present ones",
        ),
        ({"code_digest": "0"}, "measured by other code than today's"),
    ],
)
def test_keep_refuses_tables_of_other_settings_models_or_code(
    table, capsys, monkeypatch, changed, message
):
    path = table / "results/smoke/figure3.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    monkeypatch.setattr(tables, "input_states", lambda profile: {"value-mean": "now"})
    assert main(["figure3", "--profile", "smoke", "--keep"]) == 2
    error = f"error: figure3 was {message}, so KEEP=1 cannot keep it: use FRESH=1\n"
    assert capsys.readouterr().err == error


def test_verify_tells_a_run_of_a_single_figure_from_a_damaged_file(table, capsys, whole_assets):
    def verify(exit_code):
        before = {path: path.read_bytes() for path in table.rglob("*") if path.is_file()}
        assert main(["verify", "--profile", "smoke"]) == exit_code
        assert before == {path: path.read_bytes() for path in before}  # nothing is changed
        return capsys.readouterr().out.splitlines()

    assert main(["figure3", "--profile", "smoke"]) == 0
    capsys.readouterr()
    assert verify(0) == [
        "outdated: claims.csv does not follow from the tables: "
        "make claims PROFILE=smoke recreates it",
        "outdated: verdicts is not drawn: make claims PROFILE=smoke recreates it",
        "outdated: report.html does not show the present files: "
        "make figures PROFILE=smoke recreates it",
        "verify: 1 tables of profile smoke, all whole; 3 outdated",
    ]
    assert main(["figures", "--profile", "smoke"]) == 0
    capsys.readouterr()
    assert verify(0) == ["verify: 1 tables of profile smoke, all whole; 0 outdated"]
    drawing, page = (table / "figures/smoke" / name for name in ("figure3.pdf", "report.html"))
    whole = page.read_bytes()
    page.write_bytes(whole + b" ")
    assert verify(0)[0] == (
        "outdated: report.html is not what was drawn: make figures PROFILE=smoke recreates it"
    )
    page.write_bytes(whole)
    drawing.write_bytes(drawing.read_bytes() + b" ")
    message = (
        "figure3.pdf is missing or not what was drawn: make figure3 PROFILE=smoke recreates it"
    )
    assert verify(0)[0] == f"outdated: {message}"
    path = table / "results/smoke/figure3.parquet"
    path.write_bytes(path.read_bytes()[:-7])
    assert verify(1) == [
        f"damaged: {path} is missing or not the file that figure3.json describes",
        "verify: 1 tables of profile smoke, 1 damaged; 0 outdated",
    ]
    extra = whole_assets / "extra"
    extra.write_text("")
    assert verify(1)[1] == f"damaged: {extra} is not described by digests.json"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"a,b\n1,2\n1,2,3\n", None])
@pytest.mark.parametrize("file", ["results/smoke/claims.csv", "figures/smoke/report.html"])
def test_verdicts_and_reports_that_are_no_such_files_are_outdated(
    drawn_table, capsys, file, content
):
    path = drawn_table / file
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", "--profile", "smoke"]) == 0
    outdated = {
        "claims.csv": [
            "claims.csv does not follow from the tables: make claims PROFILE=smoke",
            "verdicts is drawn from another table: make claims PROFILE=smoke",
        ],
        "report.html": [],
    }[path.name]
    outdated += ["report.html does not show the present files: make figures PROFILE=smoke"]
    assert capsys.readouterr().out.splitlines() == [
        *(f"outdated: {text} recreates it" for text in outdated),
        f"verify: 1 tables of profile smoke, all whole; {len(outdated)} outdated",
    ]


def test_a_damaged_first_edition_says_nothing_about_the_present_one(
    drawn_table, capsys, monkeypatch
):
    monkeypatch.setitem(editions.FIRST_EDITION, "smoke", "earlier")
    earlier = drawn_table / "results/earlier/claims.csv"
    earlier.parent.mkdir()
    earlier.write_bytes(b"")
    capsys.readouterr()
    assert main(["verify", "--profile", "smoke"]) == 0
    message = "outdated: editions is not drawn: make claims PROFILE=smoke recreates it\n"
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("drawings", "message"),
    [
        (
            {"figure3": {}, "verdicts": []},
            "does not say how figure3, verdicts was drawn (damaged?)",
        ),
        ({"report": None}, "does not say how report was drawn (damaged?)"),
        (
            {"figure3": {"table": "", "code": "", "files": None}},
            "does not say how figure3 was drawn",
        ),
        (None, "is no readable JSON (damaged?)"),
    ],
)
def test_drawings_of_which_nothing_is_known_are_outdated(drawn_table, capsys, drawings, message):
    path = drawn_table / "figures/smoke/drawn.json"
    whole = json.loads(path.read_text())
    path.write_text("{" if drawings is None else json.dumps(whole | drawings))
    capsys.readouterr()
    assert main(["verify", "--profile", "smoke"]) == 0
    sentence, last = capsys.readouterr().out.splitlines()
    assert sentence.startswith(f"outdated: {path} {message}")
    assert last == "verify: 1 tables of profile smoke, all whole; 1 outdated"
    assert main(["figure3", "--profile", "smoke"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} {message}")
    path.unlink()
    assert main(["figures", "--profile", "smoke"]) == 0
    assert json.loads(path.read_text()) == whole


@pytest.mark.parametrize("command", ["verify", "claims"])
@pytest.mark.parametrize(
    "damage",
    [
        {"sha256": None},
        {"sha256": {}},
        {"sha256": ["figure3.csv"]},
        {"inputs": []},
        {"hardware": None},
        {"git_commit": 7, "replicates": 2},
    ],
)
def test_a_provenance_that_lacks_an_entry_is_damaged(drawn_table, capsys, command, damage):
    path = drawn_table / "results/smoke/figure3.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    capsys.readouterr()
    sentence = (
        f"{path} does not say {', '.join(damage)} (damaged?): restore it, or measure again with "
        "FRESH=1\n"
    )
    code = main([command, "--profile", "smoke"])
    printed = capsys.readouterr()
    if command == "verify":
        last = "verify: 1 tables of profile smoke, 1 damaged; 0 outdated\n"
        assert (code, printed.out) == (1, f"damaged: {sentence}{last}")
    else:
        assert (code, printed.err) == (2, f"error: {sentence}")


def test_a_table_is_damaged_where_its_provenance_names_a_folder(drawn_table, capsys):
    path = drawn_table / "results/smoke/figure3.json"
    provenance = json.loads(path.read_text())
    hashes = provenance["sha256"] | {"..": "0"}
    path.write_text(json.dumps(provenance | {"sha256": hashes}))
    assert main(["verify", "--profile", "smoke"]) == 1
    damaged = f"damaged: {path.with_name('..')} is missing or not the file that figure3.json"
    assert damaged in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "file"),
    [("figure3", "figure3.csv"), ("figure3", "figure3.parquet"), ("figures", "figure3.parquet")],
)
def test_nothing_is_drawn_from_a_damaged_table(table, capsys, command, file):
    path = table / "results/smoke" / file
    path.write_bytes(path.read_bytes()[:-7])
    assert main([command, "--profile", "smoke"]) == 2
    assert (
        f"{file} is missing or not the file that figure3.json describes" in capsys.readouterr().err
    )
    assert not (table / "figures").exists()


def test_commands_that_need_tables_do_not_measure_them(table, capsys, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.__main__.FIGURES",
        {"figure1": FIGURES["figure1"], "figure3": FIGURES["figure3"]},
    )
    assert main(["figures", "--profile", "smoke"]) == 0
    printed = capsys.readouterr().out
    assert (
        "figure1: not drawn, results/smoke has no table for it "
        "(make figure1 PROFILE=smoke measures it)" in printed
    )
    assert "figures: figure3 drawn in figures/smoke" in printed
    for path in (table / "results/smoke").glob("*.json"):
        path.unlink()
    (table / "results/smoke/claims.csv").unlink()
    for command in ("figures", "summaries", "claims", "report", "verify"):
        assert main([command, "--profile", "smoke"]) == 2
        assert capsys.readouterr().err == (
            "error: there is no table in results/smoke to draw or judge: "
            "make reproduce PROFILE=smoke measures them\n"
        )
        assert not (table / "results/smoke/claims.csv").exists()


def test_the_next_command_finishes_a_table_that_was_written_in_part(table):
    """The process that wrote it was killed after moving some of its files into place."""
    folder = table / "results/smoke"
    whole = {path.name: path.read_bytes() for path in folder.glob("figure3.*")}
    aside = folder / ".figure3.written"
    aside.mkdir()
    for name in ("figure3.json", "figure3.parquet"):
        (folder / name).rename(aside / name)
        (folder / name).write_text("old")
    assert main(["figure3", "--profile", "smoke"]) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("figure3.*")} == whole
    assert not aside.exists()


def test_the_commit_is_marked_where_sources_differ_or_are_new(tmp_path, monkeypatch):
    def git(*words):
        author = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", "-C", tmp_path, *author, *words], check=True, capture_output=True)

    monkeypatch.setitem(tables._git.__kwdefaults__, "cwd", tmp_path)
    assert tables.git_commit() == "unknown"
    for path in (tmp_path / "sia/gates.py", tmp_path / "benchmarks/spec/profiles/lab.toml"):
        path.parent.mkdir(parents=True)
        path.write_text("")
    git("init")
    git("config", "status.showUntrackedFiles", "no")
    git("add", ".")
    git("commit", "-m", "x")
    (tmp_path / "notes.txt").write_text("no source")
    assert re.fullmatch("[0-9a-f]{40}", tables.git_commit())
    (tmp_path / "benchmarks/spec/profiles/my-model.toml").write_text("")
    assert re.fullmatch(r"[0-9a-f]{40}\+changes", tables.git_commit())
    (tmp_path / "benchmarks/spec/profiles/my-model.toml").unlink()
    (tmp_path / "sia/gates.py").write_text("changed")
    assert tables.git_commit().endswith("+changes")


def test_provenance_says_where_the_numbers_come_from(table):
    provenance = json.loads((table / "results/smoke/figure3.json").read_text())
    assert provenance["profile_digest"] == profile_digest(SMOKE)
    assert provenance["sha256"]["figure3.csv"] == tables.sha256(table / "results/smoke/figure3.csv")
    assert {
        "command",
        "git_commit",
        "packages",
        "hardware",
        "seeds",
        "replicates",
        "wall_seconds",
        "intervals",
    } <= set(provenance)


def summary_of(estimates, **further) -> pd.DataFrame:
    """Return a summary of three cells: two with a set β and one with a tuned β."""
    return pd.DataFrame(
        {
            "method": "sia",
            "beta": [1.0, 2.0, 4.0],
            "tuned": [False, False, True],
            "estimate": estimates,
            "low": [e - 0.5 for e in estimates],
            "high": [e + 0.5 for e in estimates],
            "replicates": 1,
            "replicate": "all",
        }
        | further
    )


def test_agreement_with_the_committed_tables_pairs_like_with_like():
    pooled = summary_of([1.0, 2.0, 3.0], replicates=2)
    first = summary_of([1.0, 2.0, 3.0], replicate="0", replicates=None)
    committed = pd.concat([pooled, first], ignore_index=True)
    same = (
        "of 3 estimates, 100% equal those of the committed first replicate to the last digit "
        "(largest difference 0.0000), and 100%"
    )
    assert (
        tables.agreement(summary_of([1.0, 2.0, 3.0]), committed)
        == f"{same} lie inside the committed intervals over 2 replicates"
    )
    # in whatever order, and whichever β was chosen
    assert tables.agreement(
        summary_of([1.0, 2.0, 3.0], beta=[1.0, 2.0, 8.0])[::-1], committed
    ).startswith(same)
    # a β that was asked for is another cell
    assert tables.agreement(
        summary_of([1.0, 2.0, 3.0], beta=[1.0, 8.0, 4.0]), committed
    ).startswith("of 2 estimates, 100%")
    differing = tables.agreement(summary_of([1.0, 2.25, 4.0]), committed)
    assert differing.startswith("of 3 estimates, 33% equal those")
    assert "(largest difference 1.0000), and 67% lie inside" in differing
    alone = summary_of([1.0, 2.0, 3.0])
    expected = "the committed table has no single replicates to compare with"
    assert tables.agreement(alone, pooled) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["figure2", "--profile", "nope"],
            "error: unknown profile 'nope', expected one of: architectures, check, lab, "
            "lab-words, llama-3.1-8b, llama-3.2-1b, llama-3.2-3b, qwen3-0.6b, qwen3-1.7b, "
            "qwen3-4b, qwen3-8b, smoke, w2s-qwen3",
        ),
        (
            ["reproduce", "--replicates", "9"],
            "error: replicates must be 1 to 8 for the profile lab, got 9",
        ),
    ],
)
def test_invalid_arguments_give_a_one_line_error(arguments, message, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure9"], r"argument COMMAND: invalid choice: 'figure9' \(choose from .*figure2"),
        (
            ["figure2", "--replicates", "two"],
            "argument --replicates: invalid int value: 'two'",
        ),
        (
            ["figure2", "--fresh", "--keep"],
            "argument --keep: not allowed with argument --fresh",
        ),
        (["claims", "--executor", "ray"], "claims does not take --executor ray"),
        (["check", "--profile", "lab"], "check does not take --profile lab"),
    ],
)
def test_the_parser_refuses_invalid_arguments_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert re.fullmatch(f"error: {message}.*\n", capsys.readouterr().err)
