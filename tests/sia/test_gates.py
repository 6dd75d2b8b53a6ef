"""Gates: what they look at, how they combine, and calibration of each that has a threshold."""

import math
import pickle
from dataclasses import dataclass
from operator import and_, or_

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sia import (
    Attention,
    AttentionGate,
    AttentionRiseGate,
    DivergenceGate,
    Entropy,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Gate,
    Generation,
    Never,
    PositionGate,
    RandomGate,
    Steering,
    calibrate,
)
from sia._attention import OBSERVED, observe_attention
from sia.gates import GATES, Step, ThresholdGate, UnreachableRatio
from sia.steering import entropy, signal_entropy
from tests.helpers import tiny

MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
PROMPTS = tiny.prompts(30)
CALIBRATED = {
    "entropy": (EntropyGate, {}),
    "entropy over vocabulary": (EntropyGate, {"over": "vocabulary"}),
    "entropy rise": (EntropyRiseGate, {}),
    "entropy rise over vocabulary": (EntropyRiseGate, {"over": "vocabulary"}),
    "attention": (AttentionGate, {}),
    "attention of some": (AttentionGate, {"layers": (1,), "heads": (0, 2)}),
    "attention rise": (AttentionRiseGate, {"heads": (3,)}),
}
SIGNALS = [Entropy("vocabulary"), Attention(), Attention((1,), (0, 2)), Attention(heads=(3,))]


def respond(steering=None, prompts=PROMPTS, **options):
    return tiny.generate(MODEL, prompts, steering, **options)


BASE = respond(observe=SIGNALS)


@pytest.mark.parametrize("kind", CALIBRATED)
@pytest.mark.parametrize("ratio", [0.15, 0.6])
def test_a_calibrated_gate_opens_on_the_requested_share(kind, ratio):
    """With β = 0 the gate meets the very signals that it was calibrated on."""
    gate_class, options = CALIBRATED[kind]
    gate = calibrate(gate_class, BASE, ratio, **options)
    assert type(gate) is gate_class
    generations = respond(Steering(VALUES, gate, beta=0.0))
    steered = np.concatenate([g.steered for g in generations])
    assert tiny.tokens(generations) == tiny.tokens(BASE)
    assert abs(steered.sum() - math.ceil(ratio * steered.size)) <= 1  # a last bit may differ
    again = calibrate(gate_class, generations, ratio, **options)  # a gate leaves its signal
    assert again.threshold == pytest.approx(gate.threshold, rel=1e-5)


def with_signals(entropies):
    """A generation whose attention has the same numbers as its entropy."""
    levels = np.array(entropies, np.float32)
    off, ids = np.zeros(len(levels), bool), np.arange(len(levels))
    return Generation(None, ids, levels, off, ids, levels, True, signals={Attention(): levels})


@settings(max_examples=100)
@given(
    st.lists(st.floats(0.125, 9, width=32), min_size=1, max_size=60, unique=True),
    st.floats(0.01, 1),
)
def test_levels_and_their_rises_open_on_the_requested_share(levels, ratio):
    requested = math.ceil(ratio * len(levels) - 1e-9)
    gates = [
        calibrate(EntropyGate, [with_signals(levels[:3]), with_signals(levels[3:])], ratio),
        calibrate(AttentionGate, [with_signals(levels)], ratio),
    ]
    for gate in gates:
        assert (np.array(levels, np.float32) >= gate.threshold).sum() == requested
    rises = np.array(levels[1:], np.float32) / np.array(levels[:-1], np.float32)
    if requested <= len(rises):
        gate = calibrate(AttentionRiseGate, [with_signals(levels)], ratio)
        opened = (rises >= gate.threshold).sum()
        assert opened >= requested
        assert opened == requested or len(set(rises.tolist())) < len(rises)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_a_calibrated_position_gate_comes_closest_to_the_requested_share(ratio):
    lengths = np.array([len(g.token_ids) for g in BASE])
    distances = [abs(np.minimum(n, lengths).sum() / lengths.sum() - ratio) for n in range(13)]
    assert calibrate(PositionGate, BASE, ratio).tokens == np.argmin(distances)


def test_rises_are_closed_at_the_first_step_and_have_a_largest_ratio():
    largest = 1 - len(BASE) / sum(len(g.token_ids) for g in BASE)
    message = (
        f"no threshold opens EntropyRiseGate on 100% of these tokens, the most .* {largest:.1%}"
    )
    with pytest.raises(UnreachableRatio, match=message) as caught:
        calibrate(EntropyRiseGate, BASE, 1.0)
    # also in another process, which workers send it to
    assert pickle.loads(pickle.dumps(caught.value)).most == pytest.approx(largest)
    for generation in respond(Steering(VALUES, EntropyRiseGate(-100.0), beta=0.0)):
        assert not generation.steered[0]
        assert generation.steered[1:].all()


@pytest.mark.parametrize("over", ["candidates", "vocabulary"])
def test_a_rise_from_certainty_is_the_largest(over):
    signal, gate = Entropy(over), EntropyRiseGate(100.0, over=over)
    levels = [
        signal_entropy(signal, logits, entropy(logits))
        for logits in (torch.tensor([[0.0, -200.0, -300.0]]), torch.zeros(1, 3))
    ]
    step = Step(
        1, levels[1], torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64),
        {signal: levels[1]}, {signal: levels[0]},
    )  # fmt: skip
    assert gate.opens(step).item()


def test_unobserved_signals_are_named():
    with pytest.raises(
        ValueError,
        match=r"do not have the signal Attention\(layers=None, heads=None\): "
        "make them with observe=",
    ):
        calibrate(AttentionGate, respond(), 0.2)
    assert BASE[0].signal(Entropy()) is BASE[0].entropy


def test_observing_changes_no_token_and_leaves_the_model_as_it_was():
    assert tiny.tokens(respond()) == tiny.tokens(BASE)
    assert MODEL.config._attn_implementation == "sdpa"
    with observe_attention(MODEL, [Attention()]):
        assert MODEL.config._attn_implementation == OBSERVED["sdpa"]
    with pytest.raises(ValueError, match="candidates must be at most"):
        respond(Steering(VALUES, AttentionGate(0.0), candidates=61))
    assert MODEL.config._attn_implementation == "sdpa"


def test_attention_is_computed_only_where_it_is_requested(monkeypatch):
    with observe_attention(MODEL, [Attention(layers=(1,))]) as observer, torch.no_grad():
        MODEL(torch.tensor([[7, 8, 9]]))
        shapes = {layer: row.shape for layer, row in observer.rows.items()}
    assert shapes == {1: (1, 4, 3)}  # one row of each head, not a matrix
    monkeypatch.delattr("sia._attention._newest_row")  # would fail
    respond(Steering(VALUES, EntropyGate(1.5)), prompts=PROMPTS[:2])


@given(st.lists(st.booleans(), min_size=4, max_size=4).map(np.array))
@settings(max_examples=16)
def test_combinations_are_those_of_logic(opens):
    @dataclass(frozen=True)
    class Fixed(Gate):
        answer: tuple[bool, ...]

        def opens(self, step):
            return torch.tensor(self.answer)

    step = Step(3, torch.tensor([0.5, 1.5]), torch.zeros(2, 5), torch.tensor([1, 2]))
    x, y = opens[:2], opens[2:]
    a, b = Fixed(tuple(x)), Fixed(tuple(y))
    for gate, expected in ((a & b, x & y), (a | b, x | y), (~a, ~x), (~~a & ~b, x & ~y)):
        assert gate.opens(step).tolist() == expected.tolist()


def test_layers_may_be_a_list():
    assert AttentionGate(1.0, layers=[0, 1]).signal == Attention((0, 1))
    assert AttentionGate(1.0, layers=1).signal == Attention((1,))
    (generation,) = respond(Steering(VALUES, AttentionGate(2.0, layers=[1]), 4.0), PROMPTS[:1])
    assert generation.signals.keys() == {Attention((1,))}


def test_a_subclass_of_a_model_with_eager_attention_can_be_watched():
    class Subclass(type(MODEL)):
        pass

    model = Subclass(MODEL.config).eval()
    model.load_state_dict(MODEL.state_dict())
    model.set_attn_implementation("eager")
    generations = tiny.generate(model, PROMPTS[:3], observe=[Attention()])
    for generation, expected in zip(generations, BASE, strict=False):
        levels, expected = generation.signals[Attention()], expected.signals[Attention()]
        np.testing.assert_allclose(levels, expected, atol=1e-5)


def test_combinations_look_at_the_signals_of_both():
    gate = EntropyGate(1.0, over="vocabulary") & ~(AttentionGate(2.0) & PositionGate(3))
    assert gate.signals == (PositionGate(3) | gate).signals == {Entropy("vocabulary"), Attention()}
    assert repr(EntropyGate(1.0) & ~Never()) == (
        "Both(first=EntropyGate(threshold=1.0, over='candidates'), second=Not(gate=Never()))"
    )
    for combine in (and_, or_):
        with pytest.raises(TypeError, match="unsupported operand"):
            combine(EntropyGate(1.0), 3)


def test_a_custom_gate_works():
    class EveryOther(Gate):
        def opens(self, step):
            return torch.full_like(step.keys, step.index % 2 == 1, dtype=torch.bool)

    for generation in respond(Steering(VALUES, EveryOther())):
        assert generation.steered.tolist() == [i % 2 == 1 for i in range(len(generation.steered))]


def test_named_gates_are_registered_with_their_one_setting():
    gates = {
        name: gate_class.from_setting(1.0)
        for name, gate_class in GATES.items()
        if gate_class.__module__ == "sia.gates"  # whatever other tests register
    }
    assert gates == {
        "entropy": EntropyGate(1.0),
        "entropy-rise": EntropyRiseGate(1.0),
        "attention": AttentionGate(1.0),
        "attention-rise": AttentionRiseGate(1.0),
        "divergence": DivergenceGate(1.0),
        "position": PositionGate(1),
        "random": RandomGate(1.0),
        "every": EveryToken(),
        "never": Never(),
    }
    assert all(gate.setting_value == 1.0 for gate in gates.values() if gate.setting)
    assert all(gate.label for gate in gates.values())
    with pytest.raises(NotImplementedError, match="RandomGate has no setting to calibrate"):
        RandomGate.fit(BASE, 0.2)


THRESHOLD = "threshold must be a finite number of at least 0, got "
NUMBERS = "must be different numbers from 0, at least one, or None for all, got "
TOKENS = "tokens must be a whole number of at least 0, got "


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EntropyGate(-0.1), THRESHOLD + "-0.1"),
        (lambda: EntropyGate(math.nan), THRESHOLD + "nan"),
        (lambda: EntropyGate("1"), THRESHOLD + "'1'"),
        (lambda: AttentionGate(-1.0), THRESHOLD + "-1.0"),
        (lambda: EntropyRiseGate(10**400), "threshold must be a finite number, got 1000"),
        (lambda: EntropyRiseGate(math.inf), "threshold must be a finite number, got inf"),
        (
            lambda: EntropyGate(1.0, over="words"),
            'over must be "candidates" or "vocabulary", got \'words\'',
        ),
        (lambda: RandomGate(1.2), "ratio must lie between 0 and 1, got 1.2"),
        (lambda: RandomGate("a"), "ratio must lie between 0 and 1, got 'a'"),
        (lambda: AttentionGate(1.0, layers=()), f"layers {NUMBERS}()"),
        (lambda: AttentionGate(1.0, heads=(1, 1)), f"heads {NUMBERS}(1, 1)"),
        (lambda: PositionGate(-1), TOKENS + "-1"),
        (lambda: PositionGate(2.5), TOKENS + "2.5"),
        (
            lambda: calibrate(EntropyGate, BASE[0], 0.2),
            "generations must be a list of them, got Generation",
        ),
        (
            lambda: calibrate(EntropyGate, [*BASE, [7, 8]], 0.2),
            "generations must be a list of them, got one with a list",
        ),
        (
            lambda: calibrate(EntropyGate, [], 0.2),
            "calibration needs at least one generated token, got none",
        ),
        (
            lambda: calibrate(EntropyGate, BASE, 0),
            "ratio must be greater than 0 and at most 1, got 0",
        ),
        (
            lambda: calibrate(ThresholdGate, BASE, 0.2),
            "Can't instantiate abstract class ThresholdGate",
        ),
        (
            lambda: calibrate(RandomGate, BASE, 0.2),
            "calibrate needs one of the gates EntropyGate, EntropyRiseGate, AttentionGate, "
            "AttentionRiseGate, DivergenceGate, PositionGate",
        ),
        (
            lambda: respond(Steering(VALUES, AttentionGate(1.0, layers=(2,)))),
            "layers of the attention signal must be below 2 for this model, got 2",
        ),
        (
            lambda: respond(Steering(VALUES, AttentionGate(1.0, heads=(4,)))),
            "heads of the attention signal must be below 4 for this model, got 4",
        ),
    ],
)
def test_gates_refuse_invalid_arguments(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert message in str(error.value)


def test_other_attention_implementations_are_refused():
    model = tiny.language_model("qwen3")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        ValueError,
        match="attention gates need a model with attn_implementation sdpa or eager, "
        "got flex_attention",
    ):
        tiny.generate(model, [[7]], observe=[Attention()])


def test_generations_tell_their_shares():
    steered, base_token = np.array([True, False]), np.array([4, 6])
    zeros = np.zeros(2)
    generation = Generation("w6", np.array([5, 6]), zeros, steered, base_token, zeros, False)
    assert generation.intervention_ratio == 0.5
    assert generation.shifted.tolist() == [True, False]
    assert math.isnan(with_signals([]).intervention_ratio)
