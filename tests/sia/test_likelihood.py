"""Log-likelihoods of the steered policy, against sequences computed whole and against its own samples."""

import math

import numpy as np
import pytest
import torch

from sia import (
    AttentionGate,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Never,
    PositionGate,
    RandomGate,
    Steering,
    generate,
)
from sia.likelihood import log_likelihoods
from tests.helpers import tiny
from tests.helpers.reference import whole_values

MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
PROMPTS = tiny.prompts(5)


def responses(steering: Steering, seed: int = 0) -> list:
    return generate(
        MODEL, tiny.tokenizer(), PROMPTS, steering, max_new_tokens=9, seed=seed, progress=False
    )


@torch.no_grad()
def by_hand(steering: Steering, prompt, response, steered, temperature: float) -> list[float]:
    """As plainly as it can be written, given where the gate was open."""
    found = []
    for step, token in enumerate(response):
        prefix = [*prompt, *response[:step]]
        scores, candidates = (
            MODEL(input_ids=torch.tensor([prefix])).logits[0, -1].topk(steering.candidates)
        )
        if steered[step]:
            values = whole_values(VALUES, prefix, candidates.tolist())
            scores = values if math.isinf(steering.beta) else scores + steering.beta * values
        places = (candidates == token).nonzero().flatten().tolist()
        found.append(
            float((scores / temperature).log_softmax(0)[places[0]]) if places else -math.inf
        )
    return found


@pytest.mark.parametrize(
    "gate",
    [
        EntropyGate(1.5),
        EntropyRiseGate(0.0),
        RandomGate(0.5),
        PositionGate(3),
        EveryToken(),
        Never(),
    ],
)
@pytest.mark.parametrize("beta", [2.0, math.inf])
def test_of_its_own_samples_they_are_those_of_whole_sequences(gate, beta):
    steering = Steering(VALUES, gate, beta, candidates=6)
    made = responses(steering, seed=3)
    found = log_likelihoods(
        MODEL, steering, PROMPTS, [g.token_ids.tolist() for g in made], temperature=0.7, seed=3, batch_size=2
    )
    for prompt, generation, likelihood in zip(PROMPTS, made, found, strict=True):
        np.testing.assert_array_equal(likelihood.steered, generation.steered)
        expected = by_hand(steering, prompt, generation.token_ids.tolist(), generation.steered, 0.7)
        np.testing.assert_allclose(likelihood.log_probabilities, expected, atol=2e-4)
        assert likelihood.total == pytest.approx(sum(expected), abs=2e-3)


def test_greedy_responses_are_greedy_and_others_are_not():
    steering = Steering(VALUES, EntropyGate(1.0), 3.0)
    greedy = generate(
        MODEL, tiny.tokenizer(), PROMPTS, steering, max_new_tokens=6, temperature=0, progress=False
    )
    tokens = [g.token_ids.tolist() for g in greedy]
    assert all(
        likelihood.greedy.all() for likelihood in log_likelihoods(MODEL, steering, PROMPTS, tokens)
    )
    other = [[(token + 1) % 60, *rest] for token, *rest in tokens]
    assert not any(
        likelihood.greedy[0] for likelihood in log_likelihoods(MODEL, steering, PROMPTS, other)
    )


def test_a_policy_sums_to_one_and_excludes_the_rest():
    steering = Steering(VALUES, EveryToken(), 1.5, candidates=7)
    found = log_likelihoods(MODEL, steering, [PROMPTS[0]] * 60, [[token] for token in range(60)])
    totals = np.array([likelihood.total for likelihood in found])
    assert np.exp(totals).sum() == pytest.approx(1.0, abs=1e-5)
    assert np.isinf(totals).sum() == 53
    floor = log_likelihoods(
        MODEL,
        Steering(VALUES, EveryToken(), 1.5, candidates=7, min_probability=0.15),
        [PROMPTS[0]] * 60,
        [[token] for token in range(60)],
    )
    assert np.isinf([likelihood.total for likelihood in floor]).sum() > 53


def test_value_prompts_count():
    steering = Steering(VALUES, EveryToken(), 4.0)
    tokens = [g.token_ids.tolist() for g in responses(steering)]
    usual = log_likelihoods(MODEL, steering, PROMPTS, tokens)
    other = log_likelihoods(MODEL, steering, PROMPTS, tokens, value_prompts=[[9, 8, 7]] * 5)
    assert [a.total for a in usual] != [b.total for b in other]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature must be above 0: a greedy policy has no likelihoods"),
        ({"responses": [[7]] * 4}, "prompts and responses must be as many, got 5 and 4"),
        (
            {"responses": [[7], [], [7], [7], [7]]},
            "a response needs at least one token, number 1 is empty",
        ),
        (
            {"prompts": [[7], [7], [], [7], [7]]},
            "a prompt needs at least one token, number 2 is empty",
        ),
        (
            {"steering": Steering(VALUES, AttentionGate(1.0))},
            "log-likelihoods need a gate that looks at entropies, positions or noise",
        ),
        ({"steering": None, "candidates": 61}, "candidates"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "steering": Steering(VALUES, EveryToken()),
        "prompts": PROMPTS,
        "responses": [[7]] * 5,
    } | change
    with pytest.raises(ValueError, match=message):
        log_likelihoods(MODEL, **arguments)
