"""The command that fits a junction gate, on models and prompts of the Hub's form."""

from argparse import Namespace

import pandas as pd
import pytest

from scripts import compare, fit_junction_gate
from sia import JunctionGate, QHead
from tests.helpers import hub_folders


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    base = hub_folders.save_model(folder / "base", "qwen3", 0, "base")
    values = hub_folders.save_value_model(folder / "values", base)
    prompts = hub_folders.save_prompts(folder / "prompts", 10)["helpfulness"]
    options = {
        "model": base,
        "value-model": values,
        "backbone": base,
        "prompts": f"alpaca-eval={prompts}",
        "max-new-tokens": 6,
        "batch-size": 4,
    }
    return [argument for name, value in options.items() for argument in (f"--{name}", str(value))]


def test_the_folder_holds_gate_head_table_and_plot(arguments, tmp_path, capsys):
    output = tmp_path / "gate"
    assert fit_junction_gate.main([*arguments, "--output", str(output), "--q-head"]) == 0
    printed = capsys.readouterr().out
    assert "threshold " in printed
    assert "the Q-head explains " in printed
    table = pd.read_csv(output / "captured.csv")
    names = ["random", "entropy", "predictor", "oracle", "Q-head"]
    assert table["score"].unique().tolist() == names
    assert table["captured"].between(0, 1).all()
    oracle = table[table["score"] == "oracle"].set_index("share")["captured"]
    assert (oracle >= table.groupby("share")["captured"].max() - 1e-6).all()
    assert (output / "captured.png").stat().st_size > 1000
    assert JunctionGate.from_pretrained(output).threshold > 0
    assert QHead.from_pretrained(output).vocabulary_size > 100
    models = arguments[: arguments.index("--prompts")]
    steering = ["--junction-gate", str(output), "--q-head", str(output), "--prompt", "hi"]
    assert compare.main([*models, *steering, "--max-new-tokens", "4"]) == 0
    assert "% steered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--share", "0"], "share must be greater than 0 and at most 1, got 0.0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--candidates", "-1"], "--candidates must be at least 1, got -1"),
        (["--limit", "4"], "--limit must be at least 5 prompts, got 4"),
        (["--model", ""], "--model and --prompts go together: name both, or neither"),
        (["--prompts", "poems"], "unknown prompt set"),
    ],
)
def test_invalid_options_give_a_one_line_error(arguments, change, message, tmp_path, capsys):
    output = tmp_path / "gate"
    assert fit_junction_gate.main([*arguments, "--output", str(output), *change]) == 2
    errors = capsys.readouterr().err
    assert f"error: {message}" in errors
    assert not output.exists()


def test_the_limit_is_the_number_of_the_labs_prompts_which_are_taken_evenly():
    options = (Namespace(prompts=None, limit=limit) for limit in (10**9, 300, 700))
    every, usual, many = map(fit_junction_gate.prompts_of, options)
    assert usual == every[::16]
    assert (len(many), many[-1]) == (700, every[-7])


def test_options_of_a_value_model_need_one(tmp_path, capsys):
    assert fit_junction_gate.main(["--backbone", "x", "--output", str(tmp_path / "gate")]) == 2
    message = "error: --subfolder and --backbone belong to --value-model: name it, too\n"
    assert capsys.readouterr().err == message


def test_an_existing_output_is_kept(arguments, tmp_path, capsys):
    assert fit_junction_gate.main([*arguments, "--output", str(tmp_path)]) == 2
    assert "is there already: name another output, or delete it" in capsys.readouterr().err


def test_an_output_below_a_file_is_refused_before_models_are_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    models = ["--model", "nobody/a", "--value-model", "nobody/b", "--prompts", "alpaca-eval"]
    assert fit_junction_gate.main([*models, "--output", str(tmp_path / "file/gates/new")]) == 2
    message = f"error: --output must be written to a folder, got the file {tmp_path / 'file'}\n"
    assert capsys.readouterr().err == message
