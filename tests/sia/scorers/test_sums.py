"""Sums of scorers, and the implicit reward of a pair of models, against whole sequences."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig

from sia import (
    AutoregressiveScorer,
    EveryToken,
    ImplicitRewardScorer,
    RewardScorer,
    RolloutScorer,
    Scorer,
    Steering,
    SumScorer,
    best_of_n,
)
from tests.helpers import tiny
from tests.helpers.reference import whole_rewards, whole_values
from tests.helpers.tiny import q_head
from tests.sia.scorers.test_reward import adapted

MODEL = tiny.language_model("qwen3")
VALUES, REWARD = tiny.value_model("llama"), tiny.reward_model("gemma3")
POLICY, REFERENCE = tiny.language_model("mistral", seed=3), tiny.language_model("mistral", seed=4)


@torch.no_grad()
def whole_log_ratios(prefix, candidates):
    """Log-probability ratios of policy and reference, from whole sequences."""
    policy, reference = (
        model(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)[candidates]
        for model in (POLICY, REFERENCE)
    )
    return policy - reference


def implicit(prefix, candidates):
    return 0.7 * whole_log_ratios(prefix, candidates)


SUMS = {
    "implicit reward": (lambda: ImplicitRewardScorer(POLICY, REFERENCE, 0.7), implicit),
    "difference": (
        lambda: 2.0 * VALUES - 0.5 * RewardScorer(REWARD),
        lambda *a: 2.0 * whole_values(VALUES, *a) - 0.5 * whole_rewards(REWARD, *a),
    ),
    "sum of sums": (
        lambda: -(VALUES + ImplicitRewardScorer(POLICY, REFERENCE, 0.7)) * 3,
        lambda *a: -3 * (whole_values(VALUES, *a) + implicit(*a)),
    ),
    "mean": (
        lambda: sum([VALUES, RewardScorer(REWARD)]) / np.float32(2),
        lambda *a: (whole_values(VALUES, *a) + whole_rewards(REWARD, *a)) / 2,
    ),
}


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("samples", [1, 2])
def test_sums_equal_those_of_whole_sequences(kind, samples):
    build, whole = SUMS[kind]
    prompts = tiny.prompts(3, seed=2)
    rows = [prompt for prompt in prompts for _ in range(samples)]
    responses, session = (
        tiny.random_tokens(len(rows), 6),
        build().start_session(prompts, 6, samples),
    )
    order = torch.arange(len(rows))
    for step in (0, 2, 5):
        candidates = tiny.random_tokens(len(rows), 4, seed=step)
        candidates[:, 1] = tiny.EOS
        expected = [
            whole([*prompt, *response[:step]], tokens)
            for prompt, response, tokens in zip(
                rows, responses.tolist(), candidates.tolist(), strict=True
            )
        ]
        scores = session.score(order, responses[:, :step], candidates)
        torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_implicit_reward_of_a_response_is_the_sum_over_its_tokens():
    prompts, responses = tiny.prompts(3, seed=2), tiny.random_tokens(3, 6)
    session = ImplicitRewardScorer(POLICY, REFERENCE, 0.7).start_session(prompts, 6)
    rewards = session.score_responses(torch.arange(3), responses, torch.tensor([6, 3, 5]))
    for reward, prompt, response, n in zip(
        rewards, prompts, responses.tolist(), (6, 3, 5), strict=True
    ):
        terms = [implicit([*prompt, *response[:t]], [response[t]]) for t in range(n)]
        torch.testing.assert_close(reward, torch.cat(terms).sum(), atol=1e-4, rtol=1e-4)


def test_sums_steer_search_and_add_their_costs():
    prompts, each = tiny.prompts(4), []
    for scorer in (VALUES, RewardScorer(REWARD), VALUES + RewardScorer(REWARD)):
        session = scorer.start_session(prompts, 4)
        session.score(torch.arange(4), tiny.random_tokens(4, 2), tiny.random_tokens(4, 5))
        each.append(sum(meter.totals()[2] for meter in session.meters))
    assert torch.equal(each[0] + each[1], each[2])
    total = 2.0 * VALUES - 0.5 * RewardScorer(REWARD)
    (alone,), batch = (
        tiny.generate(MODEL, some, Steering(total, EveryToken(), beta=3.0), max_new_tokens=6)
        for some in (prompts[:1], prompts)
    )
    assert alone.token_ids.tolist() == batch[0].token_ids.tolist()
    (best,) = best_of_n(
        MODEL, tiny.tokenizer(), prompts[:1], total, 3, max_new_tokens=6, progress=False
    )
    prefix, last = [*prompts[0], *best.token_ids[:-1].tolist()], best.token_ids[-1:].tolist()
    assert best.reward == pytest.approx(SUMS["difference"][1](prefix, last).item(), abs=1e-3)


class Duck:
    """A third-party scorer that inherits from nothing."""

    vocabulary_size = tiny.VOCABULARY

    def start_session(self, prompts, max_new_tokens, samples=1):
        return VALUES.start_session(prompts, max_new_tokens, samples)


class Child(Duck, Scorer):
    """One that inherits."""


def test_sums_hand_hidden_states_to_the_scorers_that_read_them():
    """A head on the language model's own hidden states, in a sum of two halves."""
    single = q_head(MODEL)
    prompts = tiny.prompts(3)
    whole, halves = (
        tiny.generate(MODEL, prompts, Steering(scorer, EveryToken(), beta=3.0), max_new_tokens=6)
        for scorer in (single, 0.5 * single + 0.5 * single)
    )
    assert tiny.tokens(whole) == tiny.tokens(halves)
    assert any(generation.shifted.any() for generation in whole)


def test_third_party_scorers_can_be_summed():
    assert isinstance(Duck(), Scorer)
    prompts, order = tiny.prompts(2), torch.arange(2)
    given = order, tiny.random_tokens(2, 1), tiny.random_tokens(2, 5)
    single, *totals = (
        scorer.start_session(prompts, 3).score(*given)
        for scorer in (
            VALUES,
            VALUES + Duck(),
            Duck() + VALUES,
            Duck() - -VALUES,
            2 * Child(),
            SumScorer([(2, Duck())]),
        )
    )
    for total in totals:
        torch.testing.assert_close(total, 2 * single)
    by_duck, by_values = (
        tiny.generate(MODEL, prompts, Steering(scorer, EveryToken()), max_new_tokens=3)
        for scorer in (Duck(), VALUES)
    )
    assert tiny.tokens(by_duck) == tiny.tokens(by_values)


def test_padded_vocabularies_share_their_tokens():
    """As in families whose sizes pad their embeddings differently."""
    wide, prompts = tiny.value_model("qwen3", vocabulary=64), tiny.prompts(2)
    assert (VALUES + wide).vocabulary_size == tiny.VOCABULARY
    rollouts = RolloutScorer(tiny.language_model("qwen3", vocabulary=64), VALUES, 3)
    assert rollouts.vocabulary_size == tiny.VOCABULARY
    session = rollouts.start_session(prompts, 4)
    values = session.score(
        torch.arange(2), torch.zeros(2, 0, dtype=torch.int64), tiny.random_tokens(2, 5)
    )
    assert values.isfinite().all()


def adapted_and_base():
    base = tiny.language_model("llama")
    return adapted(LoraConfig(target_modules=["q_proj"]), base), base


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: math.nan * VALUES, ValueError, "must be a finite number, got nan"),
        (lambda: 10**400 * VALUES, ValueError, "must be a finite number, got int"),
        (lambda: VALUES * "2", ValueError, "must be a finite number, got str"),
        (lambda: VALUES * VALUES, ValueError, "must be a finite number, got ValueModel"),
        (lambda: VALUES / None, ValueError, "must be a finite number, got NoneType"),
        (lambda: VALUES / 0, ZeroDivisionError, "division by zero"),
        (lambda: 1 - VALUES, TypeError, "scorers add up with scorers, got int"),
        (lambda: VALUES + 1.0, TypeError, "scorers add up with scorers, got float"),
        (
            lambda: VALUES + tiny.value_model("qwen3", vocabulary=2000),
            ValueError,
            r"but for at most 1024 rows of padding, got vocabularies of \[60, 2000\] tokens",
        ),
        (lambda: ImplicitRewardScorer(POLICY, REFERENCE, math.inf), ValueError, "got inf"),
        (
            lambda: ImplicitRewardScorer(*adapted_and_base()),
            ValueError,
            r"policy and reference must be two models, got one \(PEFT .*: load the reference apart",
        ),
        (
            lambda: RolloutScorer(MODEL, AutoregressiveScorer(POLICY), 2),
            TypeError,
            "reward must be a RewardScorer or a ValueModel, got AutoregressiveScorer",
        ),
    ],
)
def test_sums_refuse_incompatible_scorers(call, error, message):
    with pytest.raises(error, match=message):
        call()
