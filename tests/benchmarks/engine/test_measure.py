"""What turns a cell into steering and responses into rows, on tiny models."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.engine import costs, measure, timing, traces
from benchmarks.engine.costs import total_costs
from benchmarks.engine.gates import (
    InvertedEntropyGate,
    calibrated_gates,
    calibrated_setting,
    gate_of,
)
from benchmarks.engine.measure import steering_of
from benchmarks.spec.cells import Cell, Shard
from benchmarks.spec.methods import ARGS
from benchmarks.spec.model_kinds import value_kind
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.quality import token_values
from benchmarks.subjects.lab.replicate import Replicate, with_eos
from sia import (
    Attention,
    AttentionGate,
    AttentionRiseGate,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Never,
    PositionGate,
    RandomGate,
    RewardScorer,
    Steering,
    best_of_n,
    generate,
)
from sia.steering import kl_divergence, tilt
from tests.helpers import tiny
from tests.helpers.reference import whole_values

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
    """As much of a replicate as is asked for; its prompts are token ids."""

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
    made = {
        "base": tiny.language_model("qwen3"),
        "reward": tiny.reward_model("qwen3"),
        "value": tiny.value_model("qwen3"),
    }

    def scorer_of(subject, kind, family):
        return made["value"] if kind.name == "value" else RewardScorer(made["reward"])

    for module in (measure, costs):
        monkeypatch.setattr(module, "language_model", lambda subject, kind, family: made["base"])
        monkeypatch.setattr(module, "reward_model", lambda subject, kind: made["reward"])
        monkeypatch.setattr(module, "scorer_of", scorer_of)
    return made


def test_every_gate_has_the_threshold_of_its_objective():
    expected = {
        "entropy": EntropyGate(3.0), "inverted-entropy": InvertedEntropyGate(3.0), "entropy-rise": EntropyRiseGate(3.0),
        "attention": AttentionGate(3.0), "attention-rise": AttentionRiseGate(3.0), "position": PositionGate(3),
    }  # fmt: skip
    assert set(expected) == set(calibrated_gates())
    for gate, made in expected.items():
        assert gate_of(replace(CELL, gate=gate), "honesty") == made
    assert gate_of(CELL, "harmlessness") == EntropyGate(0.5)
    assert gate_of(replace(CELL, thresholds=(1.5,) * 3), "honesty") == EntropyGate(1.5)
    assert gate_of(replace(CELL, gate="random"), "honesty") == RandomGate(0.2)
    assert (
        gate_of(replace(CELL, gate="every"), "honesty"),
        gate_of(replace(CELL, gate="never"), "honesty"),
    ) == (EveryToken(), Never())


def test_rewards_steer_on_the_scale_that_values_are_learned_on(models):
    steering = steering_of(replace(CELL, floor=0.1), "helpfulness", Lab())
    assert steering == Steering(
        models["value"],
        EntropyGate(1.0),
        2.0,
        candidates=SMOKE.decoding.candidates,
        min_probability=0.1,
    )
    args = steering_of(replace(CELL, scorer=ARGS, gate="every"), "helpfulness", Lab())
    assert args.beta == 2.0 * SMOKE.training.reward_scale / 4.0
    assert isinstance(args.scorer, RewardScorer)
    assert steering_of(Cell(0, "qwen3"), "helpfulness", Lab()) is None


def test_thresholds_open_on_the_share_that_is_asked():
    generations = generate(
        tiny.language_model("qwen3"),
        TOKENIZER,
        tiny.prompts(30),
        max_new_tokens=20,
        observe=[Attention()],
        progress=False,
    )
    entropies, lengths = (
        np.concatenate([g.entropy for g in generations]),
        np.array([len(g.token_ids) for g in generations]),
    )
    assert (entropies >= calibrated_setting("entropy", generations, 0.3)).mean() == pytest.approx(
        0.3, abs=0.01
    )
    assert (
        entropies < calibrated_setting("inverted-entropy", generations, 0.3)
    ).mean() == pytest.approx(0.3, abs=0.01)
    assert (
        np.concatenate([g.signal(Attention()) for g in generations])
        >= calibrated_setting("attention", generations, 0.3)
    ).mean() == pytest.approx(0.3, abs=0.01)
    tokens = calibrated_setting("position", generations, 0.3)
    shares = {n: np.minimum(n, lengths).sum() / lengths.sum() for n in range(21)}
    assert tokens == min(shares, key=lambda n: abs(shares[n] - 0.3))


@pytest.mark.parametrize("gate", ["never", "every"])
def test_samples_cost_what_best_of_n_counts(models, gate):
    """Plain samples cost what the library's own search counts; all responses are as long."""
    prompts, count = tiny.prompts(4), 3
    models["base"].generation_config.eos_token_id = None
    scorer = value_kind("token") if gate == "every" else None
    cell = replace(CELL, gate=gate, target_ratio=float(gate == "every"), scorer=scorer)
    steering = steering_of(cell, "honesty", Lab())
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    options = {"max_new_tokens": 6, "progress": False}
    samples = [
        generate(models["base"], tokenizer, prompts, steering, seed=seed, **options)
        for seed in range(count)
    ]
    assert {len(g.token_ids) for responses in samples for g in responses} == {6}
    reward = RewardScorer(models["reward"])
    best = best_of_n(models["base"], tokenizer, prompts, reward, count, steering, **options)
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


def test_what_is_timed_is_responding_and_the_choice_of_the_best_once_for_each_prompt(monkeypatch):
    clock, said = [0.0], []

    def takes(seconds, result):
        clock[0] += seconds
        return result

    def respond(subject, shard, prompts, seeds):
        said.append((shard.objective, prompts, seeds))
        return takes(6.0 * shard.cell.responses, [["a", "b"]] * shard.cell.responses)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(
        timing, "subject_of", lambda profile, replicate: takes(100.0, "the subject")
    )
    monkeypatch.setattr(
        timing,
        "expand_prompts",
        lambda subject, shard: takes(100.0, (["p", "q", "p", "q"], [0, 1, 0, 1], [0, 0, 1, 1])),
    )
    monkeypatch.setattr(timing, "respond", respond)
    monkeypatch.setattr(timing, "choose_best", lambda subject, samples, prompts: takes(1.0, None))
    found = timing.time_cells(
        (SMOKE, [Cell(0, "qwen3"), Cell(0, "qwen3", search="best-of", responses=4)], 2)
    )
    assert found.to_dict("list") == {
        "cell": [0, 1, 0, 1],
        "prompt": [1, 1, 2, 2],
        "seconds": [3.0, 12.5, 3.0, 12.5],
    }
    # the first round, which is not kept, is of the first objective
    assert [objective for objective, *_ in said] == ["harmlessness"] * 2 + ["helpfulness"] * 2 + [
        "honesty"
    ] * 2
    assert all((prompts, seeds) == (["p", "q"], [0, 0]) for _, prompts, seeds in said)


def test_bigrams_are_counted_over_the_samples_of_a_prompt():
    said = [np.array([1, 2, 1, 2]), np.array([7, 8]), np.array([1, 2, 3]), np.array([9])]
    assert measure.distinct_bigrams([0, 1, 0, 2], said) == [3 / 5, 1.0, 3 / 5, 0.0]


def test_candidates_of_a_response_are_valued_as_whole_sequences_are():
    model, values, prompts = (
        tiny.language_model("llama"),
        tiny.value_model("llama"),
        tiny.prompts(3),
    )
    responses = generate(model, TOKENIZER, prompts, max_new_tokens=7, progress=False)
    logits, candidates = traces.candidate_logits(model, prompts, responses, 5)
    found = traces.candidate_values(values, prompts, responses, candidates)
    for prompt, response, at_step, tokens, scores in zip(
        prompts, responses, logits, candidates, found, strict=True
    ):
        assert at_step.shape == tokens.shape == scores.shape == (len(response.token_ids), 5)
        for step in range(len(response.token_ids)):
            expected = whole_values(
                values, [*prompt, *response.token_ids[:step].tolist()], tokens[step].tolist()
            )
            np.testing.assert_allclose(scores[step], expected, atol=2e-5)
    # and the divergence of a trace is the regret of leaving such a step alone
    assert (kl_divergence(logits[0], tilt(logits[0], found[0], 1.0)) >= 0).all()


def test_of_validation_prompts_the_score_and_the_lengths_are_measured_and_nothing_else(
    models, monkeypatch
):
    prompts = tiny.prompts(4)
    said = generate(
        models["base"],
        TOKENIZER,
        prompts,
        Steering(models["value"], RandomGate(0.5), 1.0),
        max_new_tokens=6,
        progress=False,
    )
    monkeypatch.setattr(
        measure, "expand_prompts", lambda subject, shard: (prompts, [0, 1, 2, 3], [0] * 4)
    )
    monkeypatch.setattr(measure, "respond", lambda subject, shard, prompts, seeds: [said])
    subject = Lab()
    subject.score = lambda prompts, responses, reward_model: np.float32(
        [r.entropy.sum() for r in responses]
    )
    rows = measure.measure_shard(subject, Shard(replace(CELL, split="validation"), "honesty"))
    assert set(rows) == {"objective", "prompt", "seed", "best_of", "judge", "tokens", "steered"}
    assert rows["judge"].tolist() == [r.entropy.sum().astype(np.float32) for r in said]
    assert rows["tokens"].tolist() == [len(r.token_ids) for r in said]
    assert rows["steered"].tolist() == [r.steered.sum() for r in said]
    assert 0 < rows["steered"].sum() < rows["tokens"].sum()
    assert rows.attrs["thresholds"] == {
        "entropy": {"0.2": calibrated_setting("entropy", said, 0.2)}
    }


def test_values_of_a_batch_of_responses_are_those_of_each_alone():
    values, prompts = tiny.value_model("qwen3"), tiny.prompts(4)
    responses = [[5, 6, 7], [8], [9, 5, 6, 7, 8, 9, 5], [6, 6]]
    for prompt, response, found in zip(
        prompts, responses, token_values(values, prompts, responses), strict=True
    ):
        with torch.no_grad():
            alone = values(torch.tensor([[*prompt, *response]]))[0, len(prompt) :]
        np.testing.assert_allclose(found, alone, atol=1e-5)
