"""Best-of-N and chunk beam search against plain loops over single responses."""

import re
from dataclasses import astuple, replace
from functools import partial

import numpy as np
import pytest
import torch

import sia
from sia import (
    EntropyGate,
    EveryToken,
    RandomGate,
    RewardScorer,
    RolloutScorer,
    Steering,
    _sampling,
    log_likelihoods,
)
from sia._decoding import Decoding
from sia._inputs import pad_left
from sia.search import select_beams
from tests.helpers import tiny
from tests.helpers.reference import beam_search, whole_rewards

TOKENIZER = tiny.tokenizer()
MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
REWARD = RewardScorer(tiny.reward_model("qwen3"))
STEERING = Steering(VALUES, EntropyGate(1.5), beta=2.0)
PROMPTS = tiny.prompts(5, seed=3)
HEAD = tiny.candidate_values()
WHOLE = "a reward must value whole responses, as a RewardScorer or a ValueModel does, got a "
IDS = "token ids must be at least 0 and below the vocabulary of 60 tokens, got 60"
best_of_n = partial(sia.best_of_n, MODEL, TOKENIZER, progress=False, max_new_tokens=10)
search = partial(sia.chunk_beam_search, MODEL, TOKENIZER, progress=False, max_new_tokens=10)


def continuation(prompt, steering, key, start, tokens, max_new_tokens=10):
    """Decode one response alone, forcing its first tokens: the plain way to go on."""
    input_ids, mask = pad_left([prompt], "cpu")
    decoding = Decoding(
        MODEL,
        input_ids,
        mask,
        steering=steering,
        prompt_keys=key,
        value_prompts=[prompt],
        max_new_tokens=max_new_tokens,
        stop_tokens=[tiny.EOS],
    )
    forced, pick = iter(start), decoding._pick
    decoding._pick = lambda *arguments: (
        pick(*arguments) if (token := next(forced, None)) is None else torch.tensor([token])
    )
    # a steered step picks twice, so tokens are forced on unsteered steps only
    session, decoding.steering, decoding.session = decoding.session, None, None
    decoding.run(len(start))
    decoding.steering, decoding.session = steering, session
    decoding.run(tokens)
    return decoding.responses.tokens[0, : int(decoding.responses.lengths[0])].tolist()


def rewarded(prompt, response):
    return float(whole_rewards(REWARD.model, [*prompt, *response[:-1]], response[-1:])[0])


@pytest.mark.parametrize(("width", "expansions", "chunk"), [(1, 4, 10), (2, 2, 3), (3, 2, 4)])
@pytest.mark.parametrize("steering", [None, STEERING])
def test_the_search_finds_what_the_plain_loop_finds(width, expansions, chunk, steering):
    options = {"width": width, "expansions": expansions, "chunk": chunk}
    find = partial(search, reward=REWARD, steering=steering, seed=2, **options)
    for prompt, generation in zip(PROMPTS, find(PROMPTS), strict=True):
        keys = _sampling.sample_keys(_sampling.prompt_keys([prompt], [2]), width * expansions)
        reward, response = beam_search(
            partial(continuation, prompt, steering), partial(rewarded, prompt), keys, **options
        )
        (alone,) = find([prompt])
        assert generation.token_ids.tolist() == alone.token_ids.tolist() == response
        assert generation.reward == pytest.approx(reward, abs=1e-4)
        assert generation.cost == alone.cost
        assert generation.finished == (response[-1] == tiny.EOS)
        assert generation.text == TOKENIZER.decode(response, skip_special_tokens=True)


def test_best_of_n_is_the_best_of_n_single_responses():
    best = best_of_n(PROMPTS, REWARD, 4, STEERING, seed=1)
    for prompt, generation in zip(PROMPTS, best, strict=True):
        keys = _sampling.sample_keys(_sampling.prompt_keys([prompt], [1]), 4)
        singles = [continuation(prompt, STEERING, keys[i : i + 1], [], 10) for i in range(4)]
        assert generation.token_ids.tolist() == max(singles, key=partial(rewarded, prompt))
        # the prompt is computed once, the last token of each response never
        sampled, cost = sum(map(len, singles)), generation.cost
        assert cost.model_tokens == len(prompt) + sampled - 4
        assert cost.model_forwards == sampled - 3
    few_at_once = best_of_n(PROMPTS, REWARD, 4, STEERING, seed=1, batch_size=5)
    assert tiny.tokens(few_at_once) == tiny.tokens(best)


def test_best_of_one_is_a_single_response():
    best = best_of_n(PROMPTS, REWARD, 4, STEERING, seed=1)
    one = best_of_n(PROMPTS, REWARD, 1, STEERING, seed=1)
    plain = tiny.generate(MODEL, PROMPTS, STEERING, seed=1, max_new_tokens=10)
    assert tiny.tokens(one) == tiny.tokens(plain)
    for a, b in zip(one, plain, strict=True):
        np.testing.assert_allclose(a.kl, b.kl, atol=1e-5)
    gains = [b.reward - a.reward for a, b in zip(one, best, strict=True)]
    assert min(gains) >= 0 < max(gains)
    costs = [np.array([astuple(g.cost) for g in generations]) for generations in (one, best)]
    assert (costs[0] <= costs[1]).all()


def test_every_setting_of_a_search_matters():
    def tokens(reward=REWARD, **changed):
        usual = {"width": 2, "expansions": 2, "chunk": 3, "steering": STEERING, "seed": 0}
        return str(tiny.tokens(search(PROMPTS, reward, **(usual | changed))))

    by_values = tokens(VALUES)
    responses = [
        tokens(),
        by_values,
        tokens(width=1),
        tokens(expansions=3),
        tokens(chunk=5),
        tokens(steering=None),
        tokens(steering=replace(STEERING, gate=RandomGate(0.3))),
        tokens(seed=1),
        tokens(temperature=0.5),
        tokens(value_prompts=[[9, 8]] * 5),
        tokens(reward_prompts=[[9, 8]] * 5),
    ]
    assert len(set(responses)) == len(responses)
    # a RolloutScorer rates whole responses as its reward does
    assert tokens(RolloutScorer(MODEL, VALUES, 2)) == by_values


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
        (lambda: best_of_n([[7]], REWARD, 0), "n must be a whole number of at least 1, got 0"),
        (
            lambda: search([[7]], REWARD, width=0, expansions=2, chunk=3),
            "width must be a whole number of at least 1, got 0",
        ),
        (
            lambda: search([[7]], REWARD, width=2, expansions=0, chunk=3),
            "expansions must be a whole number of at least 1, got 0",
        ),
        (
            lambda: search([[7]], REWARD, width=2, expansions=2, chunk=0),
            "chunk must be a whole number of at least 1, got 0",
        ),
        (
            lambda: best_of_n([[7]], REWARD, 2, temperature=0.0),
            "temperature must be above 0 in a search: greedy samples of a prompt are all the same",
        ),
        (
            lambda: best_of_n([[7]], REWARD.model, 2),
            "reward must be a RewardScorer, a ValueModel or the like, "
            "got Qwen3ForSequenceClassification",
        ),
        (
            lambda: best_of_n([[7]], REWARD, 2, reward_prompts=[]),
            "reward_prompts must be as many as prompts: expected 1, got 0",
        ),
        (lambda: best_of_n([[7]], tiny.q_head(), 2), WHOLE + "QHead that values candidates alone"),
        (
            lambda: best_of_n([[7]], sia.VocabularyValueModel(MODEL.model, HEAD), 2),
            WHOLE + "VocabularyValueModel that values candidates alone",
        ),
        (
            lambda: best_of_n([[7]], REWARD + tiny.q_head(), 2),
            WHOLE + "SumScorer that values candidates alone",
        ),
        (
            lambda: best_of_n([[7], [8]], REWARD, 2, reward_prompts=[[7], [60]]),
            "reward prompt 1: " + IDS,
        ),
        (
            lambda: sia.best_of_n(
                tiny.language_model("qwen3", vocabulary=64), TOKENIZER, [[7], [60]], REWARD, 2
            ),
            "reward prompt 1: " + IDS,
        ),
        (
            lambda: best_of_n([[7], [8]], REWARD, 2, STEERING, value_prompts=[[7], [60]]),
            "value prompt 1: " + IDS,
        ),
        (lambda: best_of_n([[7], [60]], REWARD, 2), "prompt 1: " + IDS),
        (
            lambda: best_of_n([[7]], RewardScorer(tiny.reward_model("qwen3", vocabulary=50)), 2),
            "model and reward must share a vocabulary, padding of at most 1024 rows aside: "
            "the model has 60 tokens, the reward 50, and the tokenizer 60",
        ),
    ],
)
def test_searches_refuse_invalid_arguments_before_they_decode(call, message, monkeypatch):
    monkeypatch.setattr(Decoding, "run", lambda *_: pytest.fail("a batch was decoded"))
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message


def test_the_only_sample_may_be_greedy():
    best = best_of_n([[7, 8]], REWARD, 1, temperature=0, max_new_tokens=4)
    greedy = tiny.generate(MODEL, [[7, 8]], temperature=0, max_new_tokens=4)
    assert tiny.tokens(best) == tiny.tokens(greedy)


def test_costs_do_not_depend_on_the_batch():
    """A prompt of one token has nothing to compute ahead of its samples."""
    values, prompts = tiny.value_model("qwen3"), [[7], [8, 9, 10, 11, 12]]
    alone, together = (
        [g.cost for g in best_of_n(prompts, values, 3, max_new_tokens=6, batch_size=size)]
        for size in (1, 64)
    )
    assert alone == together


def test_bad_rewards_stop_with_step_and_prompt():
    reward = RewardScorer(tiny.reward_model("qwen3"))
    torch.nn.init.constant_(reward.model.score.weight, torch.nan)
    with pytest.raises(FloatingPointError, match="got nan at step 3 of prompt 1"):
        best_of_n([[7, 8, 9], [7, 8]], reward, 2, max_new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rewards_of_a_users_scorer_may_have_any_dtype(dtype):
    class Length:
        vocabulary_size, meters = tiny.VOCABULARY, ()

        def start_session(self, prompts, max_new_tokens, samples=1):
            return self

        def score_responses(self, rows, responses, lengths):
            return lengths.to(dtype)

    (best,) = best_of_n([[7, 8]], Length(), 4)
    assert best.reward == len(best.token_ids)


class Shaped:
    """A user's scorer and session, whose values have another shape than they should."""

    vocabulary_size, meters = tiny.VOCABULARY, ()

    def __init__(self, form):
        self.form = form

    def start_session(self, prompts, max_new_tokens, samples=1):
        return self

    def score(self, rows, responses, candidates):
        return self.form(candidates.float() / 10)

    def score_responses(self, rows, responses, lengths):
        return self.form(lengths[:, None].float())


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        (lambda values: values[:1], ("(1, 4)", "(1, 1)")),
        (lambda values: values[:, 0], ("(4,)", None)),
        (lambda values: values[:, :1], ("(4, 1)", "(4, 1)")),
    ],
)
def test_values_of_another_shape_are_refused(form, shapes):
    """Broadcast, they would steer a row by the values of others."""
    of_candidates, of_responses = (re.escape(f"got {shape}") for shape in shapes)
    steering = Steering(Shaped(form), EveryToken(), candidates=4)
    message = r"a session must return values of the shape \(4, 4\), " + of_candidates
    with pytest.raises(ValueError, match=message):
        tiny.generate(MODEL, tiny.prompts(4), steering)
    with pytest.raises(ValueError, match=message):
        log_likelihoods(MODEL, steering, tiny.prompts(4), [[7]] * 4)
    if shapes[1]:
        message = r"a session must return values of the shape \(4,\), " + of_responses
        with pytest.raises(ValueError, match=message):
            best_of_n([[7]], Shaped(form), 4)


def test_a_greedy_checkpoint_is_refused_as_a_greedy_call_is(monkeypatch):
    monkeypatch.setattr(MODEL.generation_config, "temperature", 0.0)
    with pytest.raises(ValueError, match="temperature must be above 0 in a search"):
        best_of_n([[7]], REWARD, 2)
