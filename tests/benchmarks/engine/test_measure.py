"""What turns a cell into steering and responses into rows, on tiny models."""

import re
from dataclasses import replace

import numpy as np
import pytest
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.engine import costs, measure
from benchmarks.engine.costs import total_costs
from benchmarks.engine.gates import calibrated_setting
from benchmarks.engine.measure import steering_of
from benchmarks.spec.cells import Cell, Shard
from benchmarks.spec.methods import ARGS
from benchmarks.spec.model_kinds import value_kind
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.replicate import Replicate, with_eos
from sia import EntropyGate, RandomGate, RewardScorer, Steering, best_of_n, generate
from sia.signals import Attention
from tests.helpers import tiny

SMOKE, TOKENIZER = load_profile("smoke"), tiny.tokenizer()
CELL = Cell(
    0,
    "qwen3",
    scorer=value_kind("token"),
    gate="entropy",
    target_ratio=0.2,
    thresholds=(0.5, 1.0, 3.0),
    beta=2.0,
)


class Lab:
    """The parts of a replicate that measuring needs; its prompts are token ids."""

    profile = SMOKE
    reward_strength = Replicate.reward_strength

    def encode(self, prompts, kind):
        return prompts

    def conversations(self, prompts, responses, kind):
        return [[*p, *with_eos(r)] for p, r in zip(prompts, responses, strict=True)]

    def scale(self, kind):
        return {"mean": 0.0, "sd": 4.0}


@pytest.fixture
def models(monkeypatch):
    tiny_models = {
        "base": tiny.language_model("qwen3"),
        "reward": tiny.reward_model("qwen3"),
        "value": tiny.value_model("qwen3"),
    }

    def scorer_of(subject, kind, family):
        return tiny_models["value"] if kind.name == "value" else RewardScorer(tiny_models["reward"])

    for module in (measure, costs):
        monkeypatch.setattr(
            module, "language_model", lambda subject, kind, family: tiny_models["base"]
        )
        monkeypatch.setattr(module, "reward_model", lambda subject, kind: tiny_models["reward"])
        monkeypatch.setattr(module, "scorer_of", scorer_of)
    return tiny_models


def test_rewards_steer_on_the_scale_that_values_are_learned_on(models):
    steering = steering_of(CELL, "helpfulness", Lab())
    assert steering == Steering(
        models["value"],
        EntropyGate(1.0),
        2.0,
        candidates=SMOKE.decoding.candidates,
    )
    args = steering_of(replace(CELL, scorer=ARGS, gate="every"), "helpfulness", Lab())
    assert args.beta == 2.0 * SMOKE.training.reward_scale / 4.0
    assert isinstance(args.scorer, RewardScorer)
    assert steering_of(Cell(0, "qwen3"), "helpfulness", Lab()) is None


@pytest.mark.parametrize(
    ("gate", "reward"), [("never", "decoder"), ("every", "decoder"), ("every", "encoder")]
)
def test_samples_cost_what_best_of_n_counts(models, gate, reward):
    """Plain samples cost what the library's own search counts; all responses are as long."""
    prompts, count = tiny.prompts(4), 3
    if reward == "encoder":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
        config = BertConfig(
            vocab_size=60, num_hidden_layers=2, num_labels=1, eos_token_id=tiny.EOS, **sizes
        )
        models["reward"] = BertForSequenceClassification(config).eval()
    models["base"].generation_config.eos_token_id = None
    kind = value_kind("token") if gate == "every" else None
    cell = replace(CELL, gate=gate, target_ratio=float(gate == "every"), scorer=kind)
    steering = steering_of(cell, "honesty", Lab())
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    options = {"max_new_tokens": 6, "progress": False}
    samples = [
        generate(models["base"], tokenizer, prompts, steering, seed=seed, **options)
        for seed in range(count)
    ]
    assert {len(g.token_ids) for responses in samples for g in responses} == {6}
    scorer = RewardScorer(models["reward"], closing=[tiny.EOS])
    best = best_of_n(models["base"], tokenizer, prompts, scorer, count, steering, **options)
    costs = total_costs(Lab(), cell, prompts, samples)
    for cost, expected in zip(costs, [response.cost for response in best], strict=True):
        same = {"value_forwards": expected.value_forwards, "model_flops": expected.model_flops}
        assert replace(cost, value_flops=0.0, **same) == replace(expected, value_flops=0.0)
        assert cost.model_flops == pytest.approx(expected.model_flops)
        assert cost.value_flops == pytest.approx(expected.value_flops, rel=1e-3)
    assert total_costs(Lab(), cell, prompts, samples[:1]) == [g.cost for g in samples[0]]


def test_the_best_try_is_the_earliest_of_highest_reward(models, monkeypatch):
    rewards = iter([np.array([1.0, 5.0]), np.array([2.0, 5.0]), np.array([2.0, 4.0])])
    monkeypatch.setattr(measure, "trajectory_rewards", lambda model, sequences: next(rewards))
    tries = [
        generate(
            models["base"], TOKENIZER, tiny.prompts(2), max_new_tokens=3, seed=s, progress=False
        )
        for s in range(3)
    ]
    best = measure.choose_best(Lab(), tries, tiny.prompts(2))
    assert best[0] is tries[1][0]
    assert best[1] is tries[0][1]


@pytest.mark.parametrize("reward", [np.nan, np.inf])
def test_a_reward_that_is_no_number_is_not_the_best(models, monkeypatch, reward):
    monkeypatch.setattr(
        measure, "trajectory_rewards", lambda model, sequences: np.array([1.0, reward])
    )
    responses = generate(
        models["base"], TOKENIZER, tiny.prompts(2), max_new_tokens=3, progress=False
    )
    text = re.escape(repr(responses[1].text))
    with pytest.raises(FloatingPointError, match=rf"must be finite, .* gives {reward} for {text}"):
        measure.choose_best(Lab(), [responses], tiny.prompts(2))


def test_bigrams_are_counted_over_the_samples_of_a_prompt():
    responses = [np.array([1, 2, 1, 2]), np.array([7, 8]), np.array([1, 2, 3]), np.array([9])]
    assert measure.distinct_bigrams([0, 1, 0, 2], responses) == [3 / 5, 1.0, 3 / 5, 0.0]


@pytest.mark.parametrize(("tokens", "most"), [(3, 2 / 3), (2, 0.5), (1, None)])
def test_gates_open_as_often_as_they_can(models, tokens, most):
    """A rise has no first token: of responses of two tokens it opens on half at most."""
    subject = Lab()
    sweep = replace(SMOKE.sweep, ratios=(0.2, 0.5, 0.8))
    subject.profile = replace(SMOKE, sweep=sweep)
    options = {"observe": [Attention()], "max_new_tokens": tokens, "progress": False}
    responses = generate(models["base"], TOKENIZER, tiny.prompts(3), **options)
    cell = replace(CELL, split="validation", gate="never", scorer=None)
    settings = measure.calibrated_settings(subject, cell, responses)
    assert list(settings["entropy"]) == ["0.2", "0.5", "0.8"]
    for name in ("entropy-rise", "attention-rise"):
        expected = calibrated_setting(name, responses, most) if most else 0.0
        assert settings[name]["0.8"] == expected


def test_of_validation_prompts_the_score_and_the_lengths_are_measured_and_nothing_else(
    models, monkeypatch
):
    prompts = tiny.prompts(4)
    steering = Steering(models["value"], RandomGate(0.5), 1.0)
    responses = generate(
        models["base"], TOKENIZER, prompts, steering, max_new_tokens=6, progress=False
    )
    monkeypatch.setattr(measure, "expand_prompts", lambda *_: (prompts, [0, 1, 2, 3], [0] * 4))
    monkeypatch.setattr(measure, "respond", lambda *_: [responses])
    subject = Lab()
    subject.score = lambda prompts, responses, reward_model: np.float32(
        [r.entropy.sum() for r in responses]
    )
    rows = measure.measure_shard(subject, Shard(replace(CELL, split="validation"), "honesty"))
    assert set(rows) == {"objective", "prompt", "seed", "best_of", "judge", "tokens", "steered"}
    assert rows["judge"].tolist() == [r.entropy.sum().astype(np.float32) for r in responses]
    assert rows["tokens"].tolist() == [len(r.token_ids) for r in responses]
    assert rows["steered"].tolist() == [r.steered.sum() for r in responses]
    assert 0 < rows["steered"].sum() < rows["tokens"].sum()
    assert rows.attrs["thresholds"] == {
        "entropy": {"0.2": calibrated_setting("entropy", responses, 0.2)}
    }


def test_counts_of_long_searches_have_room():
    assert measure.counts([0, 2**15 - 1]).dtype == "int16"
    assert measure.counts([0, 2**15]).tolist() == [0, 2**15]
