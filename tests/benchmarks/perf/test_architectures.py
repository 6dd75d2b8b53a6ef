"""Cost of architectures without weights: what is built, timed, counted and drawn."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.perf import architectures
from benchmarks.perf.architectures import REPORTED, read_settings, scaled_down, summarize
from benchmarks.perf.random_models import random_models
from tests.helpers.project import redirect_output

SETTINGS = read_settings()


def test_shapes_are_those_of_the_public_configurations():
    """By their number of parameters, which the families are named after."""
    for name, shape in SETTINGS.architectures.items():
        hidden, heads, groups, size = (
            shape[key]
            for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        )
        layer = hidden * size * (2 * heads + 2 * groups) + 3 * hidden * shape["intermediate_size"]
        embedding = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
        billions = (shape["num_hidden_layers"] * layer + embedding) / 1e9
        named = float(name.split("-")[-1].removesuffix("B"))
        assert billions == pytest.approx(named, rel=0.25), name


def test_scaled_down_models_keep_the_family_and_its_ratios():
    for shape in SETTINGS.architectures.values():
        small = scaled_down(shape)
        assert small["num_attention_heads"] % small["num_key_value_heads"] == 0
        assert (
            small["intermediate_size"] / small["hidden_size"]
            == shape["intermediate_size"] / shape["hidden_size"]
        )
        assert (small["family"], small["tie_word_embeddings"]) == (
            shape["family"],
            shape["tie_word_embeddings"],
        )


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    tiny_shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    names = ("Qwen3-0.6B", "Llama-3.1-8B")
    shapes = {name: SETTINGS.architectures[name] | tiny_shape for name in names}
    settings = replace(
        SETTINGS,
        architectures=shapes,
        batches=[1, 3],
        prompt_tokens=5,
        new_tokens=24,
        chunk=4,
        rounds=2,
        responses=4,
    )
    monkeypatch.setattr(architectures, "read_settings", lambda: settings)
    monkeypatch.setattr(architectures, "scaled_down", lambda shape: shape)
    monkeypatch.setattr(
        architectures, "available_cores", lambda: 1
    )  # as every test: threads that wait for a busy core take its time
    monkeypatch.setattr(architectures, "PAGE", tmp_path / "architectures.md")
    redirect_output(monkeypatch, tmp_path)
    return settings, tmp_path


def test_everything_is_timed_and_counted(tiny):
    settings, _ = tiny
    rows = architectures.measure(settings, "cpu", 6)
    assert len(rows) == 2 * 2 * 2 * 6  # architectures, batches, rounds, methods
    table = summarize(rows, 6)
    plain = table[table["method"] == "plain"]
    assert (plain[["time", "positions", "flops"]] == 1).all().all()
    by = table[(table["architecture"] == "Qwen3-0.6B") & (table["batch"] == 3)].set_index("method")
    assert (
        by.loc["dense", "positions"]
        > by.loc["sia 40%", "positions"]
        > by.loc["sia 20%", "positions"]
        > 1
    )
    # every try after the first shares the prompt; the value model reads each response once
    assert 4 < by.loc["best of 4", "positions"] < 8
    assert by["reported"].dropna().to_dict() == {
        name: REPORTED[name] for name in ("sia 20%", "dense")
    }
    assert (table["time_low"] <= table["time"]).all()
    assert (table["time"] <= table["time_high"]).all()


def test_the_command_measures_once_and_draws(tiny, capsys):
    _, path = tiny
    assert main(["cost", "--profile", "architectures"]) == 0
    printed = capsys.readouterr().out
    assert "cost: measuring, because results/architectures has no table for it" in printed
    assert (
        "there is no GPU; the architectures are scaled down, and responses have 6 tokens" in printed
    )
    provenance = json.loads((path / "results/architectures/cost.json").read_text())
    assert provenance["scaled_down"]
    assert {"hardware", "packages", "git_commit", "device", "settings"} <= set(provenance)
    assert (path / "figures/architectures/cost.png").read_bytes().startswith(b"\x89PNG")
    page = (path / "architectures.md").read_text()
    assert "(Qwen3-0.6B, Llama-3.1-8B;\nscaled down: " in page
    assert "Prompts have 5 tokens, responses 6; K = 10; 1 cores." in page
    (row,) = [line for line in page.splitlines() if line.startswith("| dense ")]
    dense = pd.read_csv(path / "results/architectures/cost.csv").query("method == 'dense'")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    for cell, (_, times) in zip(cells[1:3], dense.groupby("batch")["time"], strict=True):
        assert cell == f"{times.min():.1f} to {times.max():.1f}"
    assert cells[-1] == "10"
    assert main(["cost", "--profile", "architectures"]) == 0
    printed = capsys.readouterr().out
    assert "drawing from the table in results/architectures without measuring" in printed
    (path / "results/architectures/cost.csv").write_text("x")
    assert main(["cost", "--profile", "architectures"]) == 2
    assert "cost.csv is missing or not the file that cost.json describes" in capsys.readouterr().err


def test_only_cost_can_be_measured(capsys):
    assert main(["figure2", "--profile", "architectures"]) == 2
    assert (
        "error: profile architectures has random weights: only its cost can be measured"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt, 130, "interrupted: nothing was written"),
        (MemoryError, 2, "out of memory, use a smaller `batches` in profiles/architectures.toml"),
    ],
)
def test_errors_during_the_measurement_are_reported(
    tiny, monkeypatch, capsys, error, code, message
):
    def stop(*_):
        raise error

    monkeypatch.setattr(architectures, "measure", stop)
    assert main(["cost", "--profile", "architectures"]) == code
    assert message in capsys.readouterr().err
    assert not list(tiny[1].iterdir())


def test_random_models_are_of_the_requested_family():
    shape = scaled_down(SETTINGS.architectures["Llama-3.2-1B"])
    models = random_models(shape | {"vocab_size": 64, "num_hidden_layers": 1})
    assert models.language.config.model_type == "llama"
