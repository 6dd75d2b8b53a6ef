"""The fast loop against the slow reference, and the promises about batches, noise and steering that is off."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from sia import (
    AttentionGate,
    AttentionRiseGate,
    Entropy,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Never,
    PositionGate,
    RandomGate,
    Steering,
    _sampling,
    steered_generate,
)
from sia import generate as sia_generate
from tests.helpers import tiny
from tests.helpers.reference import decode as reference
from tests.helpers.reference import whole_values

TOKENIZER = tiny.tokenizer()


def ratio(levels, least):
    """Whether the last level stands to the one before as `least` at least; never at the first."""
    if len(levels) == 1 or levels[-1] == levels[-2] == 0:
        return False
    return levels[-2] == 0 or levels[-1] / levels[-2] >= least


GATES = {
    "entropy": (EntropyGate(1.85), lambda looks: looks[-1].entropy >= 1.85),
    "entropy over vocabulary": (
        EntropyGate(2.6, over="vocabulary"),
        lambda looks: looks[-1].vocabulary_entropy >= 2.6,
    ),
    "entropy rise": (
        EntropyRiseGate(0.05),
        lambda looks: ratio([look.entropy for look in looks], math.exp(0.05)),
    ),
    "entropy rise over vocabulary": (
        EntropyRiseGate(-0.02, over="vocabulary"),
        lambda looks: ratio([look.vocabulary_entropy for look in looks], math.exp(-0.02)),
    ),
    "attention": (AttentionGate(3.0), lambda looks: looks[-1].attention() >= 3.0),
    "attention of some": (
        AttentionGate(2.9, layers=(1,), heads=(0, 3)),
        lambda looks: looks[-1].attention([1], [0, 3]) >= 2.9,
    ),
    "attention rise": (
        AttentionRiseGate(1.05),
        lambda looks: ratio([look.attention() for look in looks], 1.05),
    ),
    "position": (PositionGate(3), lambda looks: looks[-1].step < 3),
    "random": (
        RandomGate(0.4, seed=5),
        lambda looks: (
            _sampling.uniform(
                _sampling.mix(_sampling.mix(_sampling.mix(looks[-1].key, looks[-1].step), -1), 5)
            ).item()
            < 0.4
        ),
    ),
    "every": (EveryToken(), lambda looks: True),
    "never": (Never(), lambda looks: False),
    "both": (
        EntropyGate(1.5) & ~PositionGate(2),
        lambda looks: looks[-1].entropy >= 1.5 and looks[-1].step >= 2,
    ),
}


def generate(model, prompts, steering=None, **options):
    options = {"max_new_tokens": 16, "progress": False} | options
    return sia_generate(model, TOKENIZER, prompts, steering, **options)


def assert_same(generation, expected):
    tokens, entropy, steered, base_token, kl = expected
    assert generation.token_ids.tolist() == tokens
    assert generation.steered.tolist() == steered
    assert generation.base_token.tolist() == base_token
    np.testing.assert_allclose(generation.entropy, entropy, atol=1e-5)
    np.testing.assert_allclose(generation.kl, kl, atol=1e-4)


def assert_matches_the_reference(family, gate, beta, *, scorer=None, values=None, **options):
    """Padded batches, whose responses end at different steps, against the slow loop on each prompt alone."""
    model, prompts = tiny.language_model(family), tiny.prompts(8)
    if scorer is None:
        scorer = tiny.value_model(family)
        values = partial(whole_values, scorer)
    opened, opens = GATES[gate]
    found = generate(
        model, prompts, Steering(scorer, opened, beta, candidates=8), seed=3, max_new_tokens=12
    )
    for prompt, generation in zip(prompts, found, strict=True):
        expected = reference(
            model, values, prompt, opens, beta=beta, candidates=8, max_new_tokens=12, temperature=1.0, seed=3, eos=tiny.EOS,
            attentive="attention" in gate, **options,
        )  # fmt: skip
        assert_same(generation, expected)
    if gate not in ("every", "never"):
        assert 0.05 < np.concatenate([g.steered for g in found]).mean() < 0.95
    if gate == "never":
        assert len({len(g.token_ids) for g in found}) > 2  # rows left the batch at different steps


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_matches_the_reference(gate):
    assert_matches_the_reference("qwen3", gate, 1.0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("gate", ["entropy", "attention", "every"])
def test_every_family_matches_the_reference(family, gate):
    assert_matches_the_reference(family, gate, 1.0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 4.0, math.inf])
def test_every_strength_matches_the_reference(beta):
    assert_matches_the_reference("llama", "entropy", beta)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_temperature_divides_after_the_tilt(temperature):
    model, values, prompts = (
        tiny.language_model("qwen3"),
        tiny.value_model("qwen3"),
        tiny.prompts(4),
    )
    found = generate(model, prompts, Steering(values, EveryToken(), 1.0), temperature=temperature)
    for prompt, generation in zip(prompts, found, strict=True):
        settings = {
            "beta": 1.0,
            "candidates": 10,
            "max_new_tokens": 16,
            "temperature": temperature,
            "seed": 0,
            "eos": tiny.EOS,
        }
        assert_same(
            generation,
            reference(model, partial(whole_values, values), prompt, GATES["every"][1], **settings),
        )


def test_min_probability_and_value_prompts():
    model, values, prompts = (
        tiny.language_model("llama"),
        tiny.value_model("llama"),
        tiny.prompts(5),
    )
    value_prompts = tiny.prompts(5, seed=9, longest=20)
    found = generate(
        model,
        prompts,
        Steering(values, EveryToken(), 2.0, min_probability=0.1),
        value_prompts=value_prompts,
    )
    plain = generate(
        model, prompts, Steering(values, EveryToken(), 2.0), value_prompts=value_prompts
    )
    same_prompts = generate(
        model, prompts, Steering(values, EveryToken(), 2.0, min_probability=0.1)
    )
    settings = {
        "beta": 2.0,
        "candidates": 10,
        "max_new_tokens": 16,
        "temperature": 1.0,
        "seed": 0,
        "eos": tiny.EOS,
    }
    for prompt, value_prompt, generation in zip(prompts, value_prompts, found, strict=True):
        expected = reference(
            model,
            partial(whole_values, values),
            prompt,
            GATES["every"][1],
            value_prompt=value_prompt,
            min_probability=0.1,
            **settings,
        )
        assert_same(generation, expected)
    assert any(
        a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(found, plain, strict=True)
    )
    assert any(
        a.token_ids.tolist() != b.token_ids.tolist()
        for a, b in zip(found, same_prompts, strict=True)
    )


def mismatches(found, expected):
    """Numbers of the prompts whose tokens differ."""
    return [
        i
        for i, (a, b) in enumerate(zip(found, expected, strict=True))
        if a.token_ids.tolist() != b.token_ids.tolist()
    ]


def test_a_response_does_not_depend_on_its_batch():
    model, values, prompts = (
        tiny.language_model("qwen3"),
        tiny.value_model("qwen3"),
        tiny.prompts(200, seed=4),
    )
    steering = Steering(values, EntropyGate(1.5), 2.0)
    batch = generate(model, prompts, steering, batch_size=64)
    alone = [generate(model, [prompt], steering)[0] for prompt in prompts]
    reversed_order = generate(model, prompts[::-1], steering, batch_size=64)[::-1]
    assert mismatches(batch, alone) == []
    assert mismatches(batch, reversed_order) == []
    for a, b in zip(batch, alone, strict=True):
        np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-5)
        assert a.cost == b.cost


def test_steering_off_is_plain_top_k_decoding():
    model, values, prompts = (
        tiny.language_model("llama"),
        tiny.value_model("llama"),
        tiny.prompts(20),
    )
    plain = generate(model, prompts)
    never = generate(model, prompts, Steering(values, Never(), 3.0))
    zero = generate(model, prompts, Steering(values, EveryToken(), 0.0))
    for other in (never, zero):
        assert mismatches(plain, other) == []
    assert all(g.cost.value_forwards == 0 and not g.steered.any() for g in never)
    assert all(g.steered.all() and not g.shifted.any() and g.kl.max() == 0 for g in zero)
    steered = generate(model, prompts, Steering(values, EveryToken(), 3.0))
    assert mismatches(plain, steered) != []
    assert any(g.shifted.any() for g in steered)


def test_every_setting_changes_the_output():
    model, values, prompts = (
        tiny.language_model("qwen3"),
        tiny.value_model("qwen3"),
        tiny.prompts(20),
    )
    usual = generate(model, prompts, Steering(values, EntropyGate(1.5)))
    for changed in (
        generate(model, prompts, Steering(values, EntropyGate(1.9))),
        generate(model, prompts, Steering(values, EntropyGate(1.5, over="vocabulary"))),
        generate(model, prompts, Steering(values, EntropyGate(1.5), beta=2.0)),
        generate(model, prompts, Steering(values, EntropyGate(1.5), candidates=5)),
        generate(model, prompts, Steering(values, EntropyGate(1.5)), seed=1),
        generate(model, prompts, Steering(values, EntropyGate(1.5)), temperature=0.7),
        generate(model, prompts, Steering(values, EntropyGate(1.5)), max_new_tokens=3),
        generate(model, prompts, Steering(values, RandomGate(0.5))),
    ):
        assert mismatches(usual, changed) != []
    random = generate(model, prompts, Steering(values, RandomGate(0.5)))
    assert (
        mismatches(random, generate(model, prompts, Steering(values, RandomGate(0.5, seed=1))))
        != []
    )


def test_one_value_forward_per_junction_step():
    model, values, prompts = (
        tiny.language_model("qwen3"),
        tiny.value_model("qwen3"),
        tiny.prompts(1),
    )
    for gate in (EveryToken(), RandomGate(0.3)):
        calls = []
        hook = values.backbone.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        (generation,) = generate(model, prompts, Steering(values, gate))
        hook.remove()
        junctions = int(generation.steered.sum())
        assert len(calls) == generation.cost.value_forwards == junctions > 0
        last = int(generation.steered.nonzero()[0][-1])
        assert generation.cost.value_tokens == len(prompts[0]) + last + 10 * junctions
        assert generation.cost.model_tokens == len(prompts[0]) + len(generation.token_ids) - 1


def test_finished_tells_the_end_from_the_length():
    model, prompts = tiny.language_model("qwen3"), tiny.prompts(30)
    for generation in generate(model, prompts, max_new_tokens=12):
        assert generation.finished == (generation.token_ids[-1] == tiny.EOS)
        assert generation.finished or len(generation.token_ids) == 12
        assert tiny.EOS not in generation.token_ids[:-1]
        assert "<eos>" not in generation.text


def test_random_gate_opens_at_its_ratio():
    model, values, prompts = (
        tiny.language_model("qwen3"),
        tiny.value_model("qwen3"),
        tiny.prompts(60),
    )
    steered = np.concatenate(
        [g.steered for g in generate(model, prompts, Steering(values, RandomGate(0.3)))]
    )
    assert abs(steered.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / steered.size)


def inputs(prompts):
    texts = TOKENIZER.decode(prompts)
    return TOKENIZER(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def test_transformers_generate_steers_the_same():
    model, values, prompts = (
        tiny.language_model("qwen3"),
        tiny.value_model("qwen3"),
        tiny.prompts(6),
    )
    steering = Steering(values, EntropyGate(1.5), 2.0)
    expected = generate(model, prompts, steering, temperature=0.7, seed=11, max_new_tokens=10)
    batch = inputs(prompts)
    out = model.generate(
        **batch, custom_generate=steered_generate, steering=steering, seed=11, do_sample=True, temperature=0.7, max_new_tokens=10,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert mismatches(out.generations, expected) == []
    assert {g.text for g in out.generations} == {None}
    length = batch.input_ids.shape[1]
    assert torch.equal(out.sequences[:, :length], batch.input_ids)
    for row, generation in zip(out.sequences, expected, strict=True):
        count = len(generation.token_ids)
        assert row[length : length + count].tolist() == generation.token_ids.tolist()
        assert set(row[length + count :].tolist()) <= {0}


def test_transformers_generate_greedy_and_samples():
    model, values, prompts = (
        tiny.language_model("llama"),
        tiny.value_model("llama"),
        tiny.prompts(3),
    )
    steering = Steering(values, EveryToken(), 2.0)
    greedy = model.generate(
        **inputs(prompts),
        custom_generate=steered_generate,
        steering=steering,
        do_sample=False,
        max_new_tokens=8,
    )
    expected = generate(model, prompts, steering, temperature=0, max_new_tokens=8)
    length = inputs(prompts).input_ids.shape[1]
    for row, generation in zip(greedy, expected, strict=True):
        assert row[length:][: len(generation.token_ids)].tolist() == generation.token_ids.tolist()
    out = model.generate(
        **inputs(prompts), custom_generate=steered_generate, steering=steering, seed=4, do_sample=True, num_return_sequences=3,
        max_new_tokens=8, return_dict_in_generate=True,
    )  # fmt: skip
    for sample in range(3):
        assert (
            mismatches(
                out.generations[sample::3],
                generate(model, prompts, steering, seed=4 + sample, max_new_tokens=8),
            )
            == []
        )


def test_transformers_seed_and_processors():
    model, prompts = tiny.language_model("qwen3"), tiny.prompts(8)
    common = {"custom_generate": steered_generate, "do_sample": True, "max_new_tokens": 8}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = model.generate(**inputs(prompts), **common)
        other = model.generate(**inputs(prompts), **common)
        torch.manual_seed(1)
        again = model.generate(**inputs(prompts), **common)
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    one = model.generate(**inputs(prompts), **common, top_k=1)
    greedy = model.generate(
        **inputs(prompts), custom_generate=steered_generate, do_sample=False, max_new_tokens=8
    )
    assert torch.equal(one, greedy)
    length = inputs(prompts).input_ids.shape[1]
    without_end = model.generate(**inputs(prompts), **common, min_new_tokens=8)
    assert without_end.shape[1] == length + 8
    assert not (without_end[:, length:-1] == tiny.EOS).any()


def test_decoding_without_a_steering_names_its_candidates():
    model, prompts = tiny.language_model("qwen3"), tiny.prompts(20)
    usual = generate(model, prompts)
    assert mismatches(usual, generate(model, prompts, candidates=10)) == []
    few = generate(model, prompts, candidates=3)
    assert mismatches(usual, few) != []
    never = Steering(tiny.value_model("qwen3"), Never(), candidates=3)
    assert mismatches(few, generate(model, prompts, never)) == []


MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
STEERING = Steering(VALUES, EveryToken())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: generate(MODEL, ["w7", ""]), "a prompt needs at least one token, number 1 is empty"),
        (lambda: generate(MODEL, [[7], []]), "a prompt needs at least one token, number 1 is empty"),
        (lambda: generate(MODEL, [7, 8]), "a prompt must be a text or a list of token ids (apply chat templates first), number 0 is int"),
        (lambda: generate(MODEL, [[{"role": "user"}]]),
         "a prompt must be a text or a list of token ids (apply chat templates first), number 0 is a list of other things"),
        (lambda: sia_generate(TOKENIZER, MODEL, ["w7"]),
         "generate(model, tokenizer, …) takes the model first, got a model as the tokenizer"),
        (lambda: generate(MODEL, [[-3]]), "token ids must be at least 0 and below the vocabulary of 60 tokens, got -3"),
        (lambda: generate(MODEL, [[7]], VALUES), "steering must be a Steering(scorer, gate, …), got ValueModel"),
        (lambda: generate(MODEL, [[7]], observe=["entropy"]), "observe must be a list of signals, such as [Attention()], got ['entropy']"),
        (lambda: generate(MODEL, [[7]], observe=Entropy()),
         "observe must be a list of signals, such as [Attention()], got Entropy(over='candidates')"),
        (lambda: generate(MODEL, "w7"), "prompts must be a list of prompts, got a single text"),
        (lambda: generate(MODEL, [[7, 60]]), "token ids must be at least 0 and below the vocabulary of 60 tokens, got 60"),
        (lambda: generate(MODEL, [[7]], STEERING, value_prompts=[[99]]),
         "token ids must be at least 0 and below the vocabulary of 60 tokens, got 99"),
        (lambda: generate(MODEL, [[7], [8]], value_prompts=[[7]]), "value_prompts must be as many as prompts: expected 2, got 1"),
        (lambda: generate(MODEL, [[7]], Steering(VALUES, Never(), candidates=61)),
         "candidates must be at most the vocabulary of 60 tokens, got 61"),
        (
            lambda: generate(MODEL, [[7]], Steering(tiny.value_model("qwen3", vocabulary=70), Never())),
            "model and scorer must share a vocabulary: the model has 60 tokens, the scorer 70",
        ),
        (lambda: generate(MODEL, [[7]], temperature=-1.0), "temperature must be 0 (greedy) or a finite number above it, got -1.0"),
        (lambda: generate(MODEL, [[7]], temperature=math.nan), "temperature must be 0 (greedy) or a finite number above it, got nan"),
        (lambda: generate(MODEL, [[7]], max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (lambda: generate(MODEL, [[7]], batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: generate(MODEL, [[7]], candidates=0), "candidates must be a whole number of at least 1, got 0"),
        (lambda: generate(MODEL, [[7]], STEERING, candidates=5),
         "candidates is for decoding without a steering, which has its own: expected Steering(…, candidates=5), "
         "got candidates=5 beside a Steering"),
        (
            lambda: MODEL.generate(torch.tensor([[7]]), custom_generate=steered_generate, num_beams=3, max_new_tokens=2),
            "steered_generate samples or decodes greedily, got num_beams=3",
        ),
        (
            lambda: MODEL.generate(torch.tensor([[7]]), custom_generate=steered_generate, value_prompts=[[7], [8]], max_new_tokens=2),
            "value_prompts must be one per row: expected 1, got 2",
        ),
        (
            lambda: MODEL.generate(
                torch.tensor([[7, 0]]), attention_mask=torch.tensor([[1, 0]]), custom_generate=steered_generate, max_new_tokens=2
            ),
            'prompts must be padded on the left (tokenizer.padding_side = "left"), got padding on the right',
        ),
        (
            lambda: MODEL.generate(
                torch.tensor([[7]]), custom_generate=steered_generate, suppress_tokens=list(range(60)), max_new_tokens=2
            ),
            "the logits processors ruled out all 10 candidates of a row: ask for more candidates",
        ),
    ],
)  # fmt: skip
def test_bad_input_gets_one_clear_sentence(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message


def test_prompts_may_be_tensors():
    (found,) = generate(MODEL, torch.tensor([[7, 8]]), max_new_tokens=4)
    assert (
        found.token_ids.tolist()
        == generate(MODEL, [[7, 8]], max_new_tokens=4)[0].token_ids.tolist()
    )


def test_no_prompts_give_no_generations():
    assert generate(MODEL, []) == []


def test_a_prompt_is_sampled_again_under_another_seed():
    """One seed for each prompt: the same as that many calls, in whatever batch."""
    model, prompts = tiny.language_model("qwen3"), tiny.prompts(3)
    together = sia_generate(
        model,
        TOKENIZER,
        prompts * 2,
        max_new_tokens=8,
        seed=[5, 5, 5, 6, 6, 6],
        batch_size=4,
        progress=False,
    )
    apart = [
        g
        for seed in (5, 6)
        for g in sia_generate(
            model, TOKENIZER, prompts, max_new_tokens=8, seed=seed, progress=False
        )
    ]
    assert [g.token_ids.tolist() for g in together] == [g.token_ids.tolist() for g in apart]
    assert [g.token_ids.tolist() for g in together[:3]] != [
        g.token_ids.tolist() for g in together[3:]
    ]
    with pytest.raises(
        ValueError, match="seed must be one number, or one for each of the 3 prompts, got 2"
    ):
        sia_generate(model, TOKENIZER, prompts, seed=[1, 2], progress=False)
