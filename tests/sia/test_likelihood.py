"""Log-likelihoods of the steered policy, against whole sequences and its own samples."""

import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sia import (
    AttentionGate,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Never,
    PositionGate,
    RandomGate,
    RewardScorer,
    Steering,
    log_likelihoods,
)
from tests.helpers import hub_folders, tiny
from tests.helpers.reference import whole_values

MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
PROMPTS = tiny.prompts(5)
generate = partial(tiny.generate, MODEL, PROMPTS)


@torch.no_grad()
def log_probability(steering, prefix, token, steered, temperature) -> float:
    """The log-probability of one token, given whether the gate was open."""
    logits = MODEL(torch.tensor([prefix])).logits[0, -1]
    scores, candidates = logits.topk(steering.candidates)
    if steered:
        values = whole_values(VALUES, prefix, candidates.tolist())
        scores = values if math.isinf(steering.beta) else scores + steering.beta * values
    return (scores / temperature).log_softmax(0)[candidates == token].item()


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
def test_likelihoods_of_its_own_samples_are_those_of_whole_sequences(gate, beta):
    steering = Steering(VALUES, gate, beta, candidates=6)
    generations = generate(steering, max_new_tokens=9, seed=3)
    likelihoods = log_likelihoods(
        MODEL,
        steering,
        PROMPTS,
        tiny.tokens(generations),
        temperature=0.7,
        seed=3,
        batch_size=2,
    )
    for prompt, generation, likelihood in zip(PROMPTS, generations, likelihoods, strict=True):
        tokens, steered = generation.token_ids.tolist(), generation.steered.tolist()
        assert likelihood.steered.tolist() == steered
        expected = [
            log_probability(steering, [*prompt, *tokens[:step]], token, steered[step], 0.7)
            for step, token in enumerate(tokens)
        ]
        np.testing.assert_allclose(likelihood.log_probabilities, expected, atol=2e-4)
        assert likelihood.total == pytest.approx(sum(expected), abs=2e-3)


def test_greedy_responses_are_greedy_and_others_are_not():
    steering = Steering(VALUES, EntropyGate(1.0), 3.0)
    tokens = tiny.tokens(generate(steering, max_new_tokens=6, temperature=0))
    other = [[(token + 1) % 60, *rest] for token, *rest in tokens]
    for likelihood in log_likelihoods(MODEL, steering, PROMPTS, tokens):
        assert likelihood.greedy.all()
    for likelihood in log_likelihoods(MODEL, steering, PROMPTS, other):
        assert not likelihood.greedy[0]


def test_a_policy_sums_to_one_and_excludes_the_rest():
    def totals(**settings):
        steering = Steering(VALUES, EveryToken(), 1.5, candidates=7, **settings)
        tokens = [[token] for token in range(60)]
        likelihoods = log_likelihoods(MODEL, steering, PROMPTS[:1] * 60, tokens)
        return np.array([likelihood.total for likelihood in likelihoods])

    assert np.exp(totals()).sum() == pytest.approx(1.0, abs=1e-5)
    assert np.isinf(totals()).sum() == 53 < np.isinf(totals(min_probability=0.15)).sum()


def test_value_prompts_count():
    steering = Steering(VALUES, EveryToken(), 4.0)
    score = partial(log_likelihoods, MODEL, steering, PROMPTS, tiny.tokens(generate(steering)))
    usual, other = score(), score(value_prompts=[[9, 8, 7]] * 5)
    assert [a.total for a in usual] != [b.total for b in other]


def test_columns_of_a_filtered_table_go_together_by_place():
    table = pd.DataFrame({"prompt": PROMPTS, "response": [[8 + i, 9] for i in range(5)]})
    table = table.iloc[[3, 0, 4]]
    steering = Steering(VALUES, EveryToken(), candidates=60)
    by_list, by_column = (
        [each.total for each in log_likelihoods(MODEL, steering, *columns)]
        for columns in ((list(table.prompt), list(table.response)), (table.prompt, table.response))
    )
    assert by_column == by_list


def test_responses_may_end_where_the_positions_do():
    """The last token is never read from, so it needs no position."""
    config = GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=1,
        eos_token_id=tiny.EOS,
    )  # fmt: skip
    model = tiny.seeded(lambda: GPT2LMHeadModel(config).eval(), 0)
    prompts, responses = [[7] * 9, [7] * 14], [[8] * 8, [9] * 3]  # 16 tokens are read of each
    together = log_likelihoods(model, None, prompts, responses, candidates=60)
    for prompt, response, one in zip(prompts, responses, together, strict=True):
        logits = model(torch.tensor([[*prompt, *response][:-1]])).logits[0, len(prompt) - 1 :]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])
        assert one.total == pytest.approx(expected.sum().item(), rel=1e-4)
    with pytest.raises(ValueError, match="16"):
        log_likelihoods(model, None, [[7] * 9], [[8] * 9])


@pytest.mark.parametrize("wrapper", [np.array, torch.tensor])
@pytest.mark.parametrize("scorer", [VALUES, RewardScorer(tiny.reward_model("qwen3"))])
def test_token_ids_may_be_arrays_and_tensors(wrapper, scorer):
    score = partial(log_likelihoods, MODEL, Steering(scorer, EveryToken(), candidates=60))
    square = [[7, 8], [9, 10]]
    expected = [one.total for one in score(square, square)]
    for rows in (wrapper(square), [wrapper(row) for row in square]):
        assert [one.total for one in score(rows, rows, value_prompts=rows)] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature must be above 0: a greedy policy has no likelihoods"),
        (
            {"responses": [[7]] * 4},
            "prompts, responses and value_prompts must be as many, got 5, 4 and 5",
        ),
        (
            {"responses": [[7], [7, 60], [7], [7], [7]]},
            "response 1: .* below the vocabulary of 60 tokens, got 60",
        ),
        (
            {"responses": [[7], [], [7], [7], [7]]},
            "response 1: a response needs at least one token, got none",
        ),
        (
            {"prompts": [[7], [7], [], [7], [7]]},
            "prompt 2: a prompt needs at least one token, got none",
        ),
        ({"prompts": [[7], None, [7], [7], [7]]}, "prompt 1: .* list of token ids, got None"),
        ({"responses": [[7], "hi", [7], [7], [7]]}, "response 1: .* list of token ids, got 'hi'"),
        ({"responses": [[7.5], [7], [7], [7], [7]]}, "response 0: .* got one that holds 7.5"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        (
            {"steering": Steering(VALUES, AttentionGate(1.0))},
            "log-likelihoods need a gate that looks at entropies, hidden states, positions or "
            "noise",
        ),
        ({"steering": None, "candidates": 61}, "candidates"),
    ],
)
def test_bad_input_is_refused(change, message):
    usual = {
        "steering": Steering(VALUES, EveryToken()),
        "prompts": PROMPTS,
        "responses": [[7]] * 5,
    }
    with pytest.raises(ValueError, match=message):
        log_likelihoods(MODEL, **usual | change)


@pytest.mark.parametrize("candidates", [1, 3])
def test_more_ties_than_candidates_end_as_in_transformers(candidates):
    model = tiny.language_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight[4:] = model.lm_head.weight[3]
    prompts = tiny.prompts(4)
    generations = tiny.generate(model, prompts, candidates=candidates, temperature=0.0)
    for prompt, generation in zip(prompts, generations, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
        assert generation.token_ids.tolist() == expected[0, len(prompt) :].tolist()
    likelihoods = log_likelihoods(
        model, None, prompts, tiny.tokens(generations), candidates=candidates
    )
    assert all(likelihood.greedy.all() for likelihood in likelihoods)


def test_ties_end_as_in_decoding():
    """Pairs of tokens with one logit: the greedy one is the lower, and so is the last candidate."""
    model = tiny.language_model("qwen3", vocabulary=64)
    with torch.no_grad():
        model.lm_head.weight[1::2] = model.lm_head.weight[::2]
    steering = Steering(tiny.value_model("qwen3"), Never(), candidates=9)
    for options, greedy in (({"temperature": 0.0}, True), ({"temperature": 20.0}, False)):
        prompts = tiny.prompts(40)
        generations = tiny.generate(model, prompts, steering, max_new_tokens=6, **options)
        likelihoods = log_likelihoods(model, steering, prompts, tiny.tokens(generations))
        assert all(likelihood.total > -math.inf for likelihood in likelihoods)
        assert all(likelihood.greedy.all() for likelihood in likelihoods) == greedy


def test_a_tokenizer_closes_responses_as_generate_does():
    tokenizer = hub_folders.tokenizer()
    model = tiny.language_model("qwen3", vocabulary=len(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 9]
    scorer = RewardScorer(
        tiny.reward_model("qwen3", vocabulary=len(tokenizer)), tokenizer.eos_token_id
    )
    steerings = [
        Steering(s, EveryToken(), 3.0, candidates=len(tokenizer))
        for s in (scorer, scorer.closed_by(tokenizer, [9]))
    ]
    plain, closed = (log_likelihoods(model, s, PROMPTS, PROMPTS) for s in steerings)
    given = log_likelihoods(model, steerings[0], PROMPTS, PROMPTS, tokenizer=tokenizer)
    assert [one.total for one in given] == [one.total for one in closed]
    assert [one.total for one in given] != [one.total for one in plain]
