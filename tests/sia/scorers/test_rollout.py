"""Scoring candidates by rollouts, against going on token by token."""

from __future__ import annotations

import copy

import pytest
import torch

from sia import (
    AttentionGate,
    EntropyGate,
    RewardScorer,
    RolloutScorer,
    Steering,
    _sampling,
    generate,
)
from tests.helpers import tiny
from tests.helpers.reference import whole_rewards

TOKENIZER = tiny.tokenizer()


def slow_rollout(model, reward, prefix, candidate, *, tokens, temperature, candidates, key, step):
    """One candidate: go on token by token without a cache, then ask the reward."""
    branch = [candidate]
    key = _sampling.mix(_sampling.mix(key, step), torch.tensor([candidate]))
    for depth in range(1, tokens + 1):
        if branch[-1] == tiny.EOS:
            break
        base, options = (
            model(input_ids=torch.tensor([[*prefix, *branch]])).logits[0, -1].topk(candidates)
        )
        scores = (
            base.double() / temperature + _sampling.gumbel(key, depth, options[None])[0]
            if temperature
            else base
        )
        branch.append(options[scores.argmax()].item())
    return whole_rewards(reward, [*prefix, *branch[:-1]], [branch[-1]])[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "temperature", "tokens"), [("qwen3", 1.0, 4), ("gemma3", 0.7, 7), ("llama", 0.0, 1)]
)
def test_rollouts_equal_going_on_token_by_token(family, temperature, tokens):
    model, reward = tiny.language_model(family), tiny.reward_model(family)
    prompts = tiny.prompts(3, seed=6)
    options = {"temperature": temperature, "candidates": 7, "seed": 4}
    scorer = RolloutScorer(model, RewardScorer(reward), tokens, **options)
    session = scorer.start_session(prompts, 6)
    keys = _sampling.prompt_keys(prompts, [4] * 3)
    responses = torch.randint(
        3, tiny.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0)
    )
    ended = 0
    for step, rows in ((0, [0, 2]), (2, [1, 2]), (6, [0, 1, 2])):
        candidates = torch.randint(
            3, tiny.VOCABULARY, (len(rows), 4), generator=torch.Generator().manual_seed(step)
        )
        candidates[0, 1] = tiny.EOS
        values = session.score(torch.tensor(rows), responses[rows, :step], candidates)
        for row, options, found in zip(rows, candidates.tolist(), values, strict=True):
            prefix = [*prompts[row], *responses[row, :step].tolist()]
            settings = {
                "tokens": tokens,
                "temperature": temperature,
                "candidates": 7,
                "key": keys[row : row + 1],
                "step": step,
            }
            expected = torch.stack(
                [slow_rollout(model, reward, prefix, token, **settings) for token in options]
            )
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
            ended += tiny.EOS in options
    assert ended > 0


def test_steering_by_rewards_and_rollouts_is_independent_of_the_batch():
    model, reward, prompts = (
        tiny.language_model("qwen3"),
        RewardScorer(tiny.reward_model("qwen3")),
        tiny.prompts(6),
    )
    options = {"max_new_tokens": 8, "progress": False}
    values = tiny.value_model("qwen3")
    scorers = [
        values,
        reward,
        RolloutScorer(model, reward, 3),
        RolloutScorer(model, reward, 3, seed=1),
        RolloutScorer(model, values, 3),
    ]
    outputs = []
    for scorer in scorers:
        steering = Steering(scorer, EntropyGate(1.5), beta=4.0)
        batch = generate(model, TOKENIZER, prompts, steering, **options)
        alone = [generate(model, TOKENIZER, [prompt], steering, **options)[0] for prompt in prompts]
        assert [g.token_ids.tolist() for g in batch] == [g.token_ids.tolist() for g in alone]
        assert [g.cost for g in batch] == [g.cost for g in alone]
        outputs.append(str([g.token_ids.tolist() for g in batch]))
    assert len(set(outputs)) == len(scorers)  # every scorer and every setting of it matters


def test_a_rollout_model_may_be_the_steered_model_under_an_attention_gate():
    model, reward, prompts = (
        tiny.language_model("qwen3"),
        RewardScorer(tiny.reward_model("qwen3")),
        tiny.prompts(4),
    )
    outputs = []
    for rolled in (model, copy.deepcopy(model)):
        steering = Steering(RolloutScorer(rolled, reward, 3), AttentionGate(2.0), beta=4.0)
        outputs.append(
            generate(model, TOKENIZER, prompts, steering, max_new_tokens=8, progress=False)
        )
    for a, b in zip(*outputs, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.steered.tolist() == b.steered.tolist()
    assert any(g.steered.any() for g in outputs[0])
