"""Speed: what is measured against is the same algorithm, and rows say what they should."""

import copy

import pytest

from benchmarks.perf import speed, throughput
from benchmarks.perf.published_loop import published_loop
from benchmarks.perf.random_models import random_models
from benchmarks.perf.timing import ratios as ratios_of
from sia import EntropyGate, RandomGate, Steering, generate

SHAPE = speed.SMALL | {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.25,
}


@pytest.mark.parametrize("gate", [RandomGate(0.4), EntropyGate(2.2)])
def test_the_published_loop_is_the_same_algorithm(gate):
    models = random_models(SHAPE)
    eager = copy.deepcopy(models.language)
    eager.set_attn_implementation("eager")
    prompt = models.prompts(1)[0]
    expected = generate(
        models.language,
        models.tokenizer,
        [prompt],
        Steering(models.value, gate, 2.0),
        max_new_tokens=20,
        seed=3,
        progress=False,
    )[0]
    assert (
        published_loop(eager, models.value, prompt, gate, 2.0, 10, 20, seed=3)
        == expected.token_ids.tolist()
    )
    assert 0 < expected.steered.mean() < 1


def test_the_table_has_a_row_for_every_comparison():
    rows = speed.small_models(1, SHAPE, batches=(1, 3), tokens=4)
    measures = [(row["measure"], row["batch"], row["ratio"]) for row in rows]
    assert len(set(measures)) == len(rows)
    assert ("time_published", 1, 0.2) in measures
    assert all(row["low"] <= row["estimate"] <= row["high"] for row in rows)
    goals = {(row["measure"], row["batch"]): row["goal"] for row in rows if row["goal"]}
    assert goals["time_steered", 1] == "≤ 1.25"
    assert next(r for r in rows if r["measure"] == "forwards_per_junction")["estimate"] == 1.0


def test_medians_and_ratios_are_taken_round_by_round():
    ratios = ratios_of([1.0, 2.0, 4.0], [2.0, 2.0, 2.0])
    assert ratios == [2.0, 1.0, 0.5]
    row = speed.row("time", ratios, "≤ 1", batch=1)
    expected = {"estimate": 1.0, "low": 0.5, "high": 2.0, "runs": 3, "batch": 1, "model": ""}
    assert row.items() >= expected.items()


@pytest.mark.parametrize("module", [speed, throughput])
def test_invalid_arguments_give_a_one_line_error(module, capsys):
    assert module.main(["--runs", "0"]) == 2
    assert capsys.readouterr().err == "error: runs must be at least 1, got 0\n"
