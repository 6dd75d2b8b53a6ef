"""Peers' algorithms, written from their papers, beside ours on the same models.

ARGS: algorithm 1 of Khanov, Burapacheep and Li (2024). Weak-to-strong search: algorithm 1 of Zhou
et al. (2024). No cache, each sequence read alone by transformers; only the noise is ours.
"""

from functools import partial

import pytest
import torch

from sia import (
    EveryToken,
    ImplicitRewardScorer,
    RewardScorer,
    Steering,
    ValueModel,
    _sampling,
    chunk_beam_search,
    log_likelihoods,
)
from tests.helpers import tiny
from tests.helpers.reference import beam_search

MODEL, REWARD = tiny.language_model("qwen3"), tiny.reward_model("llama")
TUNED, UNTUNED = (tiny.language_model("llama", seed=seed) for seed in (3, 4))
PROMPTS = tiny.prompts(4, seed=3)
WEIGHT = 1.5


@torch.no_grad()
def reward_of(closing, sequence):
    """The weighted reward at the last token of a sequence, behind what the scorer closes it by."""
    end = closing if sequence[-1] != tiny.EOS else []
    return (
        WEIGHT
        * REWARD.score(REWARD.model(torch.tensor([[*sequence, *end]])).last_hidden_state)[0, -1, 0]
    )


def sample(prompt, response, key, score, temperature, candidates=10):
    """Extend a response by the best of softmax(score / temperature) under the noise of its row.

    Returns:
        The token and its log-probability.
    """
    with torch.no_grad():
        logits, tokens = MODEL(torch.tensor([[*prompt, *response]])).logits[0, -1].topk(candidates)
    scores = logits + torch.tensor(
        [score([*prompt, *response, token]) for token in tokens.tolist()]
    )
    if temperature == 0:
        return tokens[scores.argmax()].item(), 0.0
    noise = _sampling.gumbel(key, len(response), tokens[None])[0]
    best = (scores / temperature + noise).argmax()
    return tokens[best].item(), (scores / temperature).log_softmax(0)[best].item()


def unclosed():
    """The reward model as ARGS reads it, at the candidate itself."""
    head = torch.nn.Linear(32, 1)
    head.load_state_dict({"weight": REWARD.score.weight, "bias": torch.zeros(1)})
    return ValueModel(REWARD.model, head)


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize(
    ("build", "closing"),
    [(unclosed, []), (lambda: RewardScorer(REWARD), [tiny.EOS])],
    ids=["read at the candidate", "closed by the end token"],
)
def test_dense_steering_by_a_reward_model_is_args(build, closing, temperature):
    """ARGS-greedy, and ARGS-stochastic with the probabilities of its tokens."""
    steering = Steering(build(), EveryToken(), beta=WEIGHT)
    generations = tiny.generate(
        MODEL, PROMPTS, steering, temperature=temperature, seed=1, max_new_tokens=8
    )
    responses = tiny.tokens(generations)
    probabilities = None
    if temperature:
        probabilities = log_likelihoods(
            MODEL, steering, PROMPTS, responses, temperature=temperature
        )
    for number, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        key = _sampling.prompt_keys([prompt], [1])
        score, expected, logs = partial(reward_of, closing), [], []
        while len(expected) < 8 and expected[-1:] != [tiny.EOS]:
            token, log_probability = sample(prompt, expected, key, score, temperature)
            expected.append(token)
            logs.append(log_probability)
        assert response == expected
        if probabilities:
            assert probabilities[number].log_probabilities == pytest.approx(logs, abs=1e-4)


@torch.no_grad()
def log_ratio(prompt, response):
    """ln π_tuned − ln π_untuned of a response, from whole sequences."""
    ids = torch.tensor([[*prompt, *response]])
    of_tokens = ids[0, len(prompt) :, None]
    tuned, untuned = (
        model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, of_tokens).sum()
        for model in (TUNED, UNTUNED)
    )
    return float(tuned - untuned)


def extend(prompt, key, response, tokens, max_new_tokens):
    """Sample up to `tokens` more tokens of the language model."""
    end = min(len(response) + tokens, max_new_tokens)
    while len(response) < end and response[-1:] != [tiny.EOS]:
        token, _ = sample(prompt, response, key, lambda sequence: 0.0, 1.0)
        response = [*response, token]
    return response


@pytest.mark.parametrize(("width", "expansions", "chunk"), [(2, 2, 3), (1, 3, 2), (3, 1, 4)])
def test_beam_search_by_an_implicit_reward_is_weak_to_strong_search(width, expansions, chunk):
    options = {"width": width, "expansions": expansions, "chunk": chunk, "max_new_tokens": 8}
    searched = chunk_beam_search(
        MODEL, tiny.tokenizer(), PROMPTS, ImplicitRewardScorer(TUNED, UNTUNED), seed=2,
        progress=False, **options,
    )  # fmt: skip
    for prompt, generation in zip(PROMPTS, searched, strict=True):
        keys = _sampling.sample_keys(_sampling.prompt_keys([prompt], [2]), width * expansions)
        reward, response = beam_search(
            partial(extend, prompt), partial(log_ratio, prompt), keys, **options
        )
        assert generation.token_ids.tolist() == response
        assert generation.reward == pytest.approx(reward, abs=1e-4)
