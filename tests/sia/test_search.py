"""Best-of-N and chunk beam search against plain loops over single responses."""

from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from sia import (
    EntropyGate,
    RandomGate,
    RewardScorer,
    RolloutScorer,
    Steering,
    _sampling,
    best_of_n,
    chunk_beam_search,
    generate,
)
from sia._decoding import Decoding
from sia._inputs import pad_left
from sia.search import select_beams
from tests.helpers import tiny
from tests.sia.scorers.test_reward import whole_rewards

TOKENIZER = tiny.tokenizer()
MODEL, VALUES, REWARD = (
    tiny.language_model("qwen3"),
    tiny.value_model("qwen3"),
    RewardScorer(tiny.reward_model("qwen3")),
)
STEERING = Steering(VALUES, EntropyGate(1.5), beta=2.0)
PROMPTS = tiny.prompts(5, seed=3)


def continuation(prompt, key, steering, start, tokens, max_new_tokens):
    """One response, decoded alone from the beginning with forced first tokens `start`: the plain way to go on."""
    input_ids, mask = pad_left([prompt], "cpu")
    decoding = Decoding(
        MODEL, input_ids, mask, steering=steering, row_keys=key, value_prompts=[prompt], max_new_tokens=max_new_tokens,
        temperature=1.0, stop_tokens=[tiny.EOS],
    )  # fmt: skip
    forced = iter(start)
    pick = decoding._pick
    decoding._pick = lambda *arguments: (
        torch.tensor([t]) if (t := next(forced, None)) is not None else pick(*arguments)
    )
    # a steered step picks twice, so tokens are forced on unsteered steps only
    decoding.steering = None
    session, decoding.session = decoding.session, None
    decoding.run(len(start))
    decoding.steering, decoding.session = steering, session
    decoding.run(tokens)
    return decoding.responses.tokens[0, : int(decoding.responses.lengths[0])].tolist()


def rewarded(prompt, response):
    return float(whole_rewards(REWARD.model, [*prompt, *response[:-1]], [response[-1]])[0])


def slow_search(prompt, width, expansions, chunk, steering, max_new_tokens, seed):
    """Beams as a list of (response, reward), each of which goes on under the key of the row that it fills."""
    keys = _sampling.sample_keys(_sampling.prompt_keys([prompt], [seed]), width * expansions)
    beams = [[]]
    copies = width * expansions
    ended = []
    while beams:
        found = []
        for row, beam in enumerate(beam for beam in beams for _ in range(copies)):
            response = continuation(
                prompt, keys[row : row + 1], steering, beam, chunk, max_new_tokens
            )
            found.append((response, rewarded(prompt, response)))
        best = sorted([*found, *ended], key=lambda pair: -pair[1])[:width]
        beams = [r for r, _ in best if r[-1] != tiny.EOS and len(r) < max_new_tokens]
        ended = [pair for pair in best if pair[0] not in beams]
        copies = expansions
    return max(ended, key=lambda pair: pair[1])


@pytest.mark.parametrize(("width", "expansions", "chunk"), [(1, 4, 12), (2, 2, 3), (3, 2, 4)])
@pytest.mark.parametrize("steering", [None, STEERING])
def test_the_search_finds_what_the_plain_loop_finds(width, expansions, chunk, steering):
    options = {"max_new_tokens": 12, "seed": 2, "progress": False}
    found = chunk_beam_search(
        MODEL,
        TOKENIZER,
        PROMPTS,
        REWARD,
        width=width,
        expansions=expansions,
        chunk=chunk,
        steering=steering,
        **options,
    )
    alone = [
        chunk_beam_search(
            MODEL,
            TOKENIZER,
            [p],
            REWARD,
            width=width,
            expansions=expansions,
            chunk=chunk,
            steering=steering,
            **options,
        )[0]
        for p in PROMPTS
    ]
    for prompt, generation, single in zip(PROMPTS, found, alone, strict=True):
        response, reward = slow_search(prompt, width, expansions, chunk, steering, 12, 2)
        assert generation.token_ids.tolist() == single.token_ids.tolist() == response
        assert generation.reward == pytest.approx(reward, abs=1e-4)
        assert generation.cost == single.cost
        assert generation.finished == (response[-1] == tiny.EOS)
        assert generation.text == TOKENIZER.decode(response, skip_special_tokens=True)


def test_best_of_n_is_the_best_of_n_single_responses():
    options = {"max_new_tokens": 10, "progress": False}
    best = best_of_n(MODEL, TOKENIZER, PROMPTS, REWARD, 4, STEERING, seed=1, **options)
    first = generate(MODEL, TOKENIZER, PROMPTS, STEERING, seed=1, **options)
    one = best_of_n(MODEL, TOKENIZER, PROMPTS, REWARD, 1, STEERING, seed=1, **options)
    assert [g.token_ids.tolist() for g in one] == [g.token_ids.tolist() for g in first]
    for prompt, generation in zip(PROMPTS, best, strict=True):
        keys = _sampling.sample_keys(_sampling.prompt_keys([prompt], [1]), 4)
        singles = [continuation(prompt, keys[i : i + 1], STEERING, [], 10, 10) for i in range(4)]
        rewards = [rewarded(prompt, response) for response in singles]
        assert generation.token_ids.tolist() == singles[rewards.index(max(rewards))]
        tried = sum(len(response) for response in singles)
        assert (
            generation.cost.model_tokens == len(prompt) + tried - 4
        )  # the prompt once, the last token of each never
        assert (
            generation.cost.model_forwards == tried - 3
        )  # the first of each after one forward pass of the prompt
    assert all(b.reward >= a.reward for a, b in zip(one, best, strict=True))
    assert any(b.reward > a.reward for a, b in zip(one, best, strict=True))
    for a, b in zip(one, best, strict=True):
        np.testing.assert_allclose(
            a.kl,
            generate(MODEL, TOKENIZER, [PROMPTS[one.index(a)]], STEERING, seed=1, **options)[0].kl,
            atol=1e-5,
        )
        assert all(
            more >= less for less, more in zip(astuple(a.cost), astuple(b.cost), strict=True)
        )
    few = best_of_n(MODEL, TOKENIZER, PROMPTS, REWARD, 4, STEERING, seed=1, batch_size=5, **options)
    assert [g.token_ids.tolist() for g in few] == [g.token_ids.tolist() for g in best]


def test_every_setting_of_a_search_matters():
    options = {"max_new_tokens": 10, "progress": False}
    usual = {
        "width": 2,
        "expansions": 2,
        "chunk": 3,
        "steering": STEERING,
        "seed": 0,
        "temperature": 1.0,
    }

    def tokens(**changed):
        settings = {"reward": REWARD, **usual, **changed}
        found = chunk_beam_search(
            MODEL, TOKENIZER, PROMPTS, settings.pop("reward"), **settings, **options
        )
        return str([g.token_ids.tolist() for g in found])

    outputs = [
        tokens(), tokens(width=1), tokens(expansions=3), tokens(chunk=5), tokens(steering=None), tokens(seed=1), tokens(temperature=0.5),
        tokens(reward=VALUES), tokens(steering=replace(STEERING, gate=RandomGate(0.3))),
        tokens(value_prompts=[[9, 8]] * 5), tokens(reward_prompts=[[9, 8]] * 5), tokens(reward=RolloutScorer(MODEL, VALUES, 2)),
    ]  # fmt: skip
    assert (
        len(set(outputs)) == len(outputs) - 1
    )  # a RolloutScorer rates whole responses as its reward does
    assert outputs[-1] == outputs[7]


def test_selection_keeps_the_best_and_fills_rows():
    rewards = torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 5.0, 4.0, -torch.inf]])
    going = torch.tensor([[True, True, False, True], [False, True, True, False]])
    sources, on, held = select_beams(rewards, going, width=2, expansions=2)
    assert sources.tolist() == [1, 1, 2, 3, 5, 5, 4, 7]
    assert on.tolist() == [True, True, False, False, True, True, False, False]
    assert held.tolist() == [[True, True, True, False], [True, True, True, False]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_of_n(MODEL, TOKENIZER, [[7]], REWARD, 0), "n must be at least 1, got 0"),
        (lambda: chunk_beam_search(MODEL, TOKENIZER, [[7]], REWARD, width=0, expansions=2, chunk=3), "width must be at least 1, got 0"),
        (lambda: chunk_beam_search(MODEL, TOKENIZER, [[7]], REWARD, width=2, expansions=0, chunk=3), "expansions must be at least 1, got 0"),
        (lambda: chunk_beam_search(MODEL, TOKENIZER, [[7]], REWARD, width=2, expansions=2, chunk=0), "chunk must be at least 1, got 0"),
        (lambda: best_of_n(MODEL, TOKENIZER, [[7]], REWARD, 2, temperature=0.0),
         "temperature must be above 0 in a search: greedy samples of a prompt are all the same"),
        (lambda: best_of_n(MODEL, TOKENIZER, [[7]], REWARD.model, 2),
         "reward must be a RewardScorer, a ValueModel or the like, got Qwen3ForSequenceClassification"),
        (lambda: best_of_n(MODEL, TOKENIZER, [[7]], REWARD, 2, reward_prompts=[]),
         "reward_prompts must be as many as prompts: expected 1, got 0"),
        (lambda: best_of_n(MODEL, TOKENIZER, [[7]], RewardScorer(tiny.reward_model("qwen3", vocabulary=70)), 2),
         "model and reward must share a vocabulary: the model has 60 tokens, the reward 70"),
    ],
)  # fmt: skip
def test_searches_refuse_what_they_cannot_mean(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message


def test_the_only_sample_may_be_greedy():
    (found,) = best_of_n(
        MODEL, TOKENIZER, [[7, 8]], REWARD, 1, temperature=0, max_new_tokens=4, progress=False
    )
    (expected,) = generate(
        MODEL, TOKENIZER, [[7, 8]], temperature=0, max_new_tokens=4, progress=False
    )
    assert found.token_ids.tolist() == expected.token_ids.tolist()


def test_bad_rewards_stop_with_step_and_prompt():
    reward = RewardScorer(tiny.reward_model("qwen3"))
    with torch.no_grad():
        reward.model.score.weight.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="values must be finite, got NaN or infinity at step 3 of prompt 1"
    ):
        best_of_n(
            MODEL, TOKENIZER, [[7, 8, 9], [7, 8]], reward, 2, max_new_tokens=4, progress=False
        )
