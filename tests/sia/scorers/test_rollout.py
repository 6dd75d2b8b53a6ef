"""Values of candidates by rollouts, against going on token by token."""

import copy

import pytest
import torch

from sia import AttentionGate, EntropyGate, RewardScorer, RolloutScorer, Steering, _sampling
from tests.helpers import tiny
from tests.helpers.reference import whole_rewards, whole_values

MODEL = tiny.language_model("qwen3")
REWARD = RewardScorer(tiny.reward_model("qwen3"))


def slow_rollout(model, reward, prefix, candidate, *, tokens, temperature, candidates, key, step):
    """Go on from one candidate token by token without a cache, then read the reward."""
    branch = [candidate]
    key = _sampling.mix(_sampling.mix(key, step), torch.tensor([candidate]))
    for depth in range(1, tokens + 1):
        if branch[-1] == tiny.EOS:
            break
        logits = model(torch.tensor([[*prefix, *branch]])).logits[0, -1]
        scores, choices = logits.topk(candidates)
        if temperature:
            noise = _sampling.gumbel(key, depth, choices[None])[0]
            scores = scores.double() / temperature + noise
        branch.append(choices[scores.argmax()].item())
    return whole_rewards(reward, [*prefix, *branch[:-1]], [branch[-1]])[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "temperature", "tokens"), [("qwen3", 1.0, 4), ("gemma3", 0.7, 7), ("llama", 0.0, 1)]
)
def test_rollouts_equal_going_on_token_by_token(family, temperature, tokens):
    model, reward, prompts = (
        tiny.language_model(family),
        tiny.reward_model(family),
        tiny.prompts(3, seed=6),
    )
    options = {"temperature": temperature, "candidates": 7}
    scorer = RolloutScorer(model, RewardScorer(reward), tokens, seed=4, **options)
    session, responses = scorer.start_session(prompts, 6), tiny.random_tokens(3, 6)
    keys = _sampling.prompt_keys(prompts, [4] * 3)
    for step, rows in ((0, [0, 2]), (2, [1, 2]), (6, [0, 1, 2])):
        candidates = tiny.random_tokens(len(rows), 4, seed=step)
        candidates[0, 1] = tiny.EOS
        values = session.score(torch.tensor(rows), responses[rows, :step], candidates)
        for row, row_candidates, row_values in zip(rows, candidates.tolist(), values, strict=True):
            prefix = [*prompts[row], *responses[row, :step].tolist()]
            settings = {"tokens": tokens, "key": keys[row : row + 1], "step": step, **options}
            expected = [
                slow_rollout(model, reward, prefix, token, **settings) for token in row_candidates
            ]
            torch.testing.assert_close(row_values, torch.stack(expected), atol=2e-5, rtol=2e-5)


def test_rollouts_end_where_the_language_model_ends_responses():
    values, prefix, ends = tiny.value_model("qwen3"), [7, 8, 20, 21], [tiny.EOS, 3]
    scorer = RolloutScorer(MODEL, values, 6).closed_by(None, [3])
    session = scorer.start_session([prefix[:2]], 8)
    read = session.score(torch.tensor([0]), torch.tensor([prefix[2:]]), torch.tensor([ends]))
    torch.testing.assert_close(read, whole_values(values, prefix, ends)[None])


def test_steering_by_rewards_and_rollouts_is_independent_of_the_batch():
    values, prompts, responses = tiny.value_model("qwen3"), tiny.prompts(6), []
    scorers = [
        values,
        REWARD,
        RolloutScorer(MODEL, REWARD, 3),
        RolloutScorer(MODEL, REWARD, 3, seed=1),
        RolloutScorer(MODEL, values, 3),
    ]
    for scorer in scorers:
        steering = Steering(scorer, EntropyGate(1.5), beta=4.0)
        batch = tiny.generate(MODEL, prompts, steering, max_new_tokens=8)
        alone = [
            tiny.generate(MODEL, [prompt], steering, max_new_tokens=8)[0] for prompt in prompts
        ]
        assert tiny.tokens(batch) == tiny.tokens(alone)
        assert [g.cost for g in batch] == [g.cost for g in alone]
        responses.append(str(tiny.tokens(batch)))
    assert len(set(responses)) == len(scorers)  # every scorer and every setting of it matters


def test_a_rollout_model_may_be_the_steered_model_under_an_attention_gate():
    shared, apart = (
        tiny.generate(
            MODEL,
            tiny.prompts(4),
            Steering(RolloutScorer(model, REWARD, 3), AttentionGate(2.0), beta=4.0),
            max_new_tokens=8,
        )
        for model in (MODEL, copy.deepcopy(MODEL))
    )
    assert tiny.tokens(shared) == tiny.tokens(apart)
    steered = [generation.steered.tolist() for generation in shared]
    assert steered == [generation.steered.tolist() for generation in apart]
    assert any(map(any, steered))
