"""Logits processors before the candidates, warpers after the tilt, by whatever way they come."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import sia
from sia import (
    EntropyGate,
    EveryToken,
    RewardScorer,
    SteeredGenerate,
    Steering,
    best_of_n,
    calibrate,
    steered_generate,
)
from tests.helpers import tiny
from tests.helpers.reference import decode as reference
from tests.helpers.reference import whole_values

VALUES = tiny.value_model("qwen3")
PROMPTS = tiny.prompts(6)
GATES = {
    "candidates": (EntropyGate(1.6), lambda looks: looks[-1].entropy >= 1.6),
    "vocabulary": (
        EntropyGate(2.2, over="vocabulary"),
        lambda looks: looks[-1].vocabulary_entropy >= 2.2,
    ),
    "every": (EveryToken(), lambda looks: True),
}
# settings of a checkpoint, and the same by transformers' classes: processors, then warpers
CHECKPOINTS = {
    "repetition": ({"repetition_penalty": 1.8}, lambda n: [RepetitionPenaltyLogitsProcessor(1.8)]),
    "n-grams": ({"no_repeat_ngram_size": 1}, lambda n: [NoRepeatNGramLogitsProcessor(1)]),
    "bad words": ({"bad_words_ids": [[9], [7, 8]]}, lambda n: [bad_words([[9], [7, 8]])]),
    "suppressed": (
        {"suppress_tokens": list(range(20, 60))},
        lambda n: [SuppressTokensLogitsProcessor(list(range(20, 60)))],
    ),
    "at the beginning": (
        {"begin_suppress_tokens": list(range(30))},
        lambda n: [SuppressTokensAtBeginLogitsProcessor(list(range(30)), n)],
    ),
    "shortest": (
        {"min_new_tokens": 12},
        lambda n: [MinNewTokensLengthLogitsProcessor(n, 12, torch.tensor([tiny.EOS]))],
    ),
    "shortest of all tokens": (
        {"min_length": 16},
        lambda n: [MinLengthLogitsProcessor(16, torch.tensor([tiny.EOS]))],
    ),
    "temperature": ({"temperature": 0.4}, lambda n: [TemperatureLogitsWarper(0.4)]),
    "top-p": ({"top_p": 0.4}, lambda n: [TopPLogitsWarper(0.4)]),
    "top-k": ({"top_k": 2}, lambda n: [TopKLogitsWarper(2)]),
    "min-p": ({"min_p": 0.4}, lambda n: [MinPLogitsWarper(0.4)]),
    "typical": ({"typical_p": 0.3}, lambda n: [TypicalLogitsWarper(0.3)]),
    "chat": (
        {"repetition_penalty": 1.1, "temperature": 0.7, "top_k": 5, "top_p": 0.8},
        lambda n: [
            RepetitionPenaltyLogitsProcessor(1.1),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(5),
            TopPLogitsWarper(0.8),
        ],
    ),
}


def bad_words(words):
    return NoBadWordsLogitsProcessor(words, torch.tensor([tiny.EOS]))


def checkpoint(**settings):
    """A model whose generation_config has these settings."""
    model = tiny.language_model("qwen3")
    model.generation_config.update(**settings)
    return model


def split(processors):
    is_warper = [type(p).__name__.endswith("Warper") for p in processors]
    return {
        "process": [p for p, warper in zip(processors, is_warper, strict=True) if not warper],
        "warp": [p for p, warper in zip(processors, is_warper, strict=True) if warper],
    }


def assert_matches(generations, opens, processors_of, prompts=PROMPTS, beta=2.0, **options):
    """Generations of a padded batch against the slow loop on each prompt alone."""
    for prompt, generation in zip(prompts, generations, strict=True):
        expected = reference(
            tiny.language_model("qwen3"),
            partial(whole_values, VALUES),
            prompt,
            opens,
            beta=beta,
            **split(processors_of(len(prompt))),
            **options,
        )
        for name, column in expected.items():
            tolerance = {"entropy": 1e-5, "kl": 1e-4}.get(name, 0)
            np.testing.assert_allclose(
                getattr(generation, name), column, atol=tolerance, err_msg=name
            )


@pytest.mark.parametrize("gate", ["candidates", "vocabulary"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoints_settings_are_heeded(kind, gate):
    """The same by `generate`, by transformers' own and by the slow loop."""
    (settings, processors_of), (opened, opens) = CHECKPOINTS[kind], GATES[gate]
    steering, model = Steering(VALUES, opened, 2.0), checkpoint(**settings)
    generations = tiny.generate(model, PROMPTS, steering, seed=3)
    assert_matches(generations, opens, processors_of, seed=3)
    input_ids = torch.tensor([PROMPTS[0]])
    sequences = model.generate(
        input_ids, custom_generate=SteeredGenerate(steering, seed=3), do_sample=True,
        max_new_tokens=12,
    )  # fmt: skip
    assert sequences[0, input_ids.shape[1] :].tolist() == generations[0].token_ids.tolist()
    plain = tiny.generate(tiny.language_model("qwen3"), PROMPTS, steering, seed=3)
    assert tiny.tokens(plain) != tiny.tokens(generations)


def test_arguments_override_the_checkpoint():
    model, plain = checkpoint(temperature=0.3), tiny.language_model("qwen3")
    for temperature in (0.0, 1.0):
        by_argument = tiny.generate(model, PROMPTS, temperature=temperature)
        assert tiny.tokens(by_argument) == tiny.tokens(
            tiny.generate(plain, PROMPTS, temperature=temperature)
        )


def test_searches_heed_a_checkpoint_too():
    allowed = list(range(2, 14))
    model = checkpoint(
        suppress_tokens=sorted(set(range(60)) - set(allowed)), repetition_penalty=1.3
    )
    reward = RewardScorer(tiny.reward_model("qwen3"))
    best = best_of_n(model, tiny.tokenizer(), PROMPTS, reward, 4, max_new_tokens=6, progress=False)
    assert all(set(tokens) <= set(allowed) for tokens in tiny.tokens(best))
    first = best_of_n(model, tiny.tokenizer(), PROMPTS, reward, 1, max_new_tokens=6, progress=False)
    single = tiny.generate(model, PROMPTS, max_new_tokens=6)
    assert tiny.tokens(first) == tiny.tokens(single)


def test_stop_strings_of_a_checkpoint_end_a_response():
    tokenizer = tiny.letters()
    respond = partial(sia.generate, tokenizer=tokenizer, prompts=[[7, 8]], progress=False)
    (whole,) = respond(checkpoint())
    text = tokenizer.decode(whole.token_ids[2:4])
    (stopped,) = respond(checkpoint(stop_strings=[text]))
    assert stopped.token_ids.tolist() == whole.token_ids[:4].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "steered decoding samples or decodes greedily, got num_beams=3"),
        (
            {"penalty_alpha": 0.6},
            "steered decoding has no contrastive search, got penalty_alpha=0.6",
        ),
        (
            {"dola_layers": "high"},
            "steered decoding has no decoding by contrasting layers, got dola_layers='high'",
        ),
        (
            {"forced_bos_token_id": 5},
            "steered decoding forces no first token, got forced_bos_token_id=5",
        ),
    ],
)
def test_checkpoint_settings_that_steering_cannot_honour_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        tiny.generate(checkpoint(**settings), [[7]])


def test_a_penalty_on_the_prompt_does_not_reach_the_padding_of_a_batch():
    model, prompts = checkpoint(encoder_repetition_penalty=3.0), [[7, 8, 9], [10, 11], [12]]
    alone = [tiny.tokens(tiny.generate(model, [prompt]))[0] for prompt in prompts]
    assert tiny.tokens(tiny.generate(model, prompts)) == alone
    assert tiny.tokens(tiny.generate(tiny.language_model("qwen3"), prompts)) != alone


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_temperature_among_processors_samples_only_where_sampling_was_asked_for(do_sample):
    warm = LogitsProcessorList([TemperatureLogitsWarper(3.0)])
    responses = [
        tiny.language_model("qwen3").generate(
            torch.tensor([PROMPTS[0]]), custom_generate=steered_generate, seed=seed,
            do_sample=do_sample, logits_processor=warm, max_new_tokens=6,
        ).tolist()
        for seed in range(2)
    ]  # fmt: skip
    assert (responses[0] == responses[1]) is not do_sample


class Only:
    """A grammar that allows three next tokens after each token."""

    def __call__(self, input_ids, scores):
        allowed = torch.stack([(input_ids[:, -1] * step + step) % 57 + 3 for step in (1, 2, 3)], 1)
        return torch.full_like(scores, -math.inf).scatter(1, allowed, scores.gather(1, allowed))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("beta", [2.0, math.inf])
def test_a_grammar_with_fewer_tokens_than_candidates(gate, beta):
    """The candidates that it leaves are steered; the others get no probability."""
    opened, opens = GATES[gate]
    steering = Steering(VALUES, opened, beta)
    prompts = [prompt for prompt in PROMPTS if len(prompt) == len(PROMPTS[0])] + [PROMPTS[0][::-1]]
    out = tiny.language_model("qwen3").generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.int64),
        custom_generate=SteeredGenerate(steering, seed=4),
        logits_processor=LogitsProcessorList([Only()]),
        do_sample=True,
        max_new_tokens=12,
        return_dict_in_generate=True,
    )
    assert_matches(out.generations, opens, lambda n: [Only()], prompts, beta, seed=4)
    assert all(g.entropy.max() <= math.log(3) + 1e-6 for g in out.generations)
    assert all(np.isfinite(g.kl).all() for g in out.generations)


@pytest.mark.parametrize("steering", [None, Steering(VALUES, EveryToken(), math.inf)])
def test_one_allowed_token_leaves_no_choice(steering):
    out = tiny.language_model("qwen3").generate(
        torch.tensor([[7, 8]]),
        custom_generate=steered_generate,
        steering=steering,
        prefix_allowed_tokens_fn=lambda row, ids: [len(ids) + 7],
        max_new_tokens=4,
        return_dict_in_generate=True,
    )
    (generation,) = out.generations
    assert generation.token_ids.tolist() == [9, 10, 11, 12]
    assert generation.entropy.tolist() == generation.kl.tolist() == [0.0] * 4


def test_calibration_sees_the_distribution_that_is_sampled_from():
    """With β = 0 a gate opens on as many tokens as it was calibrated for, under a penalty too."""
    model = checkpoint(repetition_penalty=2.0, suppress_tokens=list(range(30, 60)))
    base = tiny.generate(model, tiny.prompts(20))
    gate = calibrate(EntropyGate, base, 0.25)
    steered = tiny.generate(model, tiny.prompts(20), Steering(VALUES, gate, beta=0.0))
    share = np.concatenate([generation.steered for generation in steered])
    assert abs(share.sum() - math.ceil(0.25 * share.size)) <= 1


@pytest.mark.parametrize(
    "setting",
    [{"min_new_tokens": 4}, {"min_length": 11}, {"encoder_no_repeat_ngram_size": 2}],
)
def test_padding_does_not_count(setting):
    """For lengths, and for the n-grams of a prompt."""
    model = checkpoint(eos_token_id=[*range(2, 60, 5)], **setting)
    prompts = [*tiny.prompts(12), *([token] for token in range(7, 27))]
    alone, together = (
        tiny.tokens(tiny.generate(model, prompts, candidates=50, batch_size=size))
        for size in (1, 64)
    )
    assert alone == together
    assert len({len(tokens) for tokens in alone}) > 3


def test_stop_strings_do_not_reach_into_padding():
    tokenizer, model = tiny.letters(), tiny.language_model("qwen3")
    decode = partial(
        sia.generate, model, tokenizer, [[1], [10, 11, 12, 13, 14]], max_new_tokens=8, seed=3,
        progress=False,
    )  # fmt: skip
    model.generation_config.eos_token_id = 59
    first = tiny.tokens(decode(batch_size=1))[0]
    begun = tokenizer.decode([0, 1, first[0]])  # as if padding were the token 0
    model.generation_config.stop_strings = [begun]
    assert tiny.tokens(decode(batch_size=64))[0] == first


def test_values_alone_do_not_bring_back_what_processors_rule_out():
    model = checkpoint(forced_eos_token_id=tiny.EOS, remove_invalid_values=True)
    for beta in (1.0, math.inf):
        generations = tiny.generate(model, PROMPTS, Steering(VALUES, EveryToken(), beta))
        assert all(generation.token_ids[-1] == tiny.EOS for generation in generations)
