"""The fast loop against the slow reference, and the promises about batches and noise."""

import math
from functools import partial

import numpy as np
import pytest
from torch import no_grad

from sia import (
    AttentionGate,
    AttentionRiseGate,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Never,
    PositionGate,
    RandomGate,
    Steering,
    _sampling,
)
from tests.helpers import tiny
from tests.helpers.reference import decode as reference
from tests.helpers.reference import whole_values

MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
generate = partial(tiny.generate, MODEL)


def rises(levels, least):
    """Return whether the last level is at least `least` times the previous; False at the first."""
    if len(levels) == 1 or levels[-1] == levels[-2] == 0:
        return False
    return levels[-2] == 0 or levels[-1] / levels[-2] >= least


def coin(look, seed):
    """The uniform noise of a gate that opens at random."""
    key = _sampling.mix(_sampling.mix(look.key, look.step), -1)
    return _sampling.uniform(_sampling.mix(key, seed)).item()


GATES = {
    "entropy": (EntropyGate(1.85), lambda looks: looks[-1].entropy >= 1.85),
    "entropy over vocabulary": (
        EntropyGate(2.6, over="vocabulary"),
        lambda looks: looks[-1].vocabulary_entropy >= 2.6,
    ),
    "entropy rise": (
        EntropyRiseGate(0.05),
        lambda looks: rises([look.entropy for look in looks], math.exp(0.05)),
    ),
    "entropy rise over vocabulary": (
        EntropyRiseGate(-0.02, over="vocabulary"),
        lambda looks: rises([look.vocabulary_entropy for look in looks], math.exp(-0.02)),
    ),
    "attention": (AttentionGate(3.0), lambda looks: looks[-1].attention() >= 3.0),
    "attention of some": (
        AttentionGate(2.9, layers=(1,), heads=(0, 3)),
        lambda looks: looks[-1].attention([1], [0, 3]) >= 2.9,
    ),
    "attention rise": (
        AttentionRiseGate(1.05),
        lambda looks: rises([look.attention() for look in looks], 1.05),
    ),
    "position": (PositionGate(3), lambda looks: looks[-1].step < 3),
    "random": (RandomGate(0.4, seed=5), lambda looks: coin(looks[-1], 5) < 0.4),
    "every": (EveryToken(), lambda looks: True),
    "never": (Never(), lambda looks: False),
    "both": (
        EntropyGate(1.5) & ~PositionGate(2),
        lambda looks: looks[-1].entropy >= 1.5 and looks[-1].step >= 2,
    ),
}


def assert_matches_the_reference(family, gate, beta=1.0, *, value_prompts=None, **options):
    """Padded batches, whose responses end at different steps, against the slow loop on each prompt.

    Args:
        options: Of `generate`, or `candidates` or `min_probability` of the steering.

    Returns:
        Generations of the fast loop.
    """
    model, scorer, prompts = tiny.language_model(family), tiny.value_model(family), tiny.prompts(8)
    opened, opens = GATES[gate]
    settings = {name: options[name] for name in options if name in Steering.__dataclass_fields__}
    generations = tiny.generate(
        model,
        prompts,
        Steering(scorer, opened, beta, **settings),
        value_prompts=value_prompts,
        **{name: value for name, value in options.items() if name not in settings},
    )
    for prompt, value_prompt, generation in zip(
        prompts, value_prompts or prompts, generations, strict=True
    ):
        expected = reference(
            model,
            partial(whole_values, scorer),
            prompt,
            opens,
            beta=beta,
            value_prompt=value_prompt,
            attentive="attention" in gate,
            **options,
        )
        for name, column in expected.items():
            tolerance = {"entropy": 1e-5, "kl": 1e-4}.get(name, 0)
            np.testing.assert_allclose(
                getattr(generation, name), column, atol=tolerance, err_msg=name
            )
    return generations


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_matches_the_reference(gate):
    generations = assert_matches_the_reference("qwen3", gate, candidates=8, seed=3)
    share = np.concatenate([generation.steered for generation in generations]).mean()
    assert share == {"every": 1, "never": 0}.get(gate, pytest.approx(0.5, abs=0.45))
    # rows left the batch at different steps
    assert gate != "never" or len({len(tokens) for tokens in tiny.tokens(generations)}) > 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("gate", ["entropy", "attention", "every"])
def test_every_family_matches_the_reference(family, gate):
    assert_matches_the_reference(family, gate, candidates=8, seed=3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 4.0, math.inf])
def test_every_strength_matches_the_reference(beta):
    assert_matches_the_reference("llama", "entropy", beta, candidates=8)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_temperature_divides_after_the_tilt(temperature):
    assert_matches_the_reference("qwen3", "every", temperature=temperature)


def test_min_probability_and_value_prompts():
    options = {"min_probability": 0.1, "value_prompts": tiny.prompts(8, seed=9, longest=20)}
    both = assert_matches_the_reference("llama", "every", 2.0, **options)
    for name in options:
        one = assert_matches_the_reference("llama", "every", 2.0, **{name: options[name]})
        assert tiny.tokens(one) != tiny.tokens(both)


def test_a_response_does_not_depend_on_its_batch():
    prompts, steering = tiny.prompts(60, seed=4), Steering(VALUES, EntropyGate(1.5), 2.0)
    batch = generate(prompts, steering, batch_size=25)
    alone = [generate([prompt], steering)[0] for prompt in prompts]
    reversed_order = generate(prompts[::-1], steering, batch_size=25)[::-1]
    assert tiny.tokens(batch) == tiny.tokens(alone) == tiny.tokens(reversed_order)
    assert [generation.cost for generation in batch] == [generation.cost for generation in alone]
    entropies = [np.concatenate([g.entropy for g in generations]) for generations in (batch, alone)]
    np.testing.assert_allclose(*entropies, atol=1e-5)


def test_steering_off_is_plain_top_k_decoding():
    prompts = tiny.prompts(20)
    plain = generate(prompts)
    never = generate(prompts, Steering(VALUES, Never(), 3.0))
    zero = generate(prompts, Steering(VALUES, EveryToken(), 0.0))
    steered = generate(prompts, Steering(VALUES, EveryToken(), 3.0))
    assert tiny.tokens(plain) == tiny.tokens(never) == tiny.tokens(zero) != tiny.tokens(steered)
    assert all(g.cost.value_forwards == 0 and not g.steered.any() for g in never)
    assert all(g.steered.all() and not g.shifted.any() and g.kl.max() == 0 for g in zero)
    assert any(g.shifted.any() for g in steered)


def test_decoding_without_a_steering_names_its_candidates():
    prompts = tiny.prompts(20)
    few = tiny.tokens(generate(prompts, candidates=3))
    assert few == tiny.tokens(generate(prompts, Steering(VALUES, Never(), candidates=3)))
    usual = tiny.tokens(generate(prompts))
    assert usual == tiny.tokens(generate(prompts, candidates=10)) != few


def test_every_setting_changes_the_output():
    def tokens(gate, steering_options=None, **options):
        steering = Steering(VALUES, gate, **(steering_options or {}))
        return str(tiny.tokens(generate(tiny.prompts(20), steering, **options)))

    responses = [
        tokens(EntropyGate(1.5)),
        tokens(EntropyGate(1.9)),
        tokens(EntropyGate(1.5, over="vocabulary")),
        tokens(EntropyGate(1.5), {"beta": 2.0}),
        tokens(EntropyGate(1.5), {"candidates": 5}),
        tokens(EntropyGate(1.5), seed=1),
        tokens(EntropyGate(1.5), temperature=0.7),
        tokens(EntropyGate(1.5), max_new_tokens=3),
        tokens(RandomGate(0.5)),
        tokens(RandomGate(0.5, seed=1)),
    ]
    assert len(set(responses)) == len(responses)


@pytest.mark.parametrize("gate", [EveryToken(), RandomGate(0.3)])
def test_one_value_forward_per_junction(gate):
    passes, (prompt,) = [], tiny.prompts(1)
    hook = VALUES.backbone.register_forward_hook(lambda *_: passes.append(1))
    (generation,) = generate([prompt], Steering(VALUES, gate))
    hook.remove()
    (junctions,), cost = generation.steered.nonzero(), generation.cost
    assert len(passes) == cost.value_forwards == len(junctions) > 0
    assert cost.value_tokens == len(prompt) + junctions[-1] + 10 * len(junctions)
    assert cost.model_tokens == len(prompt) + len(generation.token_ids) - 1


def test_finished_tells_the_end_from_the_length():
    for generation in generate(tiny.prompts(30)):
        *before, last = generation.token_ids
        assert generation.finished == (last == tiny.EOS)
        assert generation.finished or len(generation.token_ids) == 12
        assert tiny.EOS not in before
        assert "<eos>" not in generation.text


def test_random_gate_opens_at_its_ratio():
    generations = generate(tiny.prompts(60), Steering(VALUES, RandomGate(0.3)))
    steered = np.concatenate([generation.steered for generation in generations])
    assert abs(steered.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / steered.size)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_language_model_that_gives_no_numbers_is_named(number):
    model = tiny.language_model("qwen3")
    with no_grad():
        model.lm_head.weight[5] = number
    message = (
        "logits must be numbers, the language model gave NaN or infinity at step 0 of prompt 0"
    )
    with pytest.raises(FloatingPointError, match=message):
        tiny.generate(model, [[7]])


def test_responses_of_one_token_and_without_an_end():
    """Every token ends a response, or none does."""
    model = tiny.language_model("qwen3")
    prompts, steering = tiny.prompts(6), Steering(VALUES, EveryToken(), 2.0)
    model.generation_config.eos_token_id = list(range(tiny.VOCABULARY))
    at_once = tiny.generate(model, prompts, steering)
    assert all(g.finished and len(g.token_ids) == 1 for g in at_once)
    model.generation_config.eos_token_id = None
    one = tiny.generate(model, prompts, steering, max_new_tokens=1)
    assert tiny.tokens(one) == tiny.tokens(at_once)


def test_one_row_without_numbers_is_named():
    """A value that is NaN for one token alone stops decoding where it first counts."""
    values = tiny.value_model("qwen3")
    with no_grad():
        values.backbone.embed_tokens.weight[33] = math.nan
    gate = PositionGate(9) & ~PositionGate(2)  # closed at first
    message = r"values must be finite and at most ±1e.28, got nan at step 2 of prompt 0"
    with pytest.raises(FloatingPointError, match=message):
        generate([[33], [7, 33, 8], [33, 9]], Steering(values, gate))
    broken = tiny.language_model("qwen3")
    with no_grad():
        broken.model.embed_tokens.weight[33] = math.nan
    with pytest.raises(FloatingPointError, match="gave NaN or infinity at step 0 of prompt 1"):
        tiny.generate(broken, [[7], [33], [9]], max_new_tokens=1)
