"""Gates: what they ask for, how they combine, and calibration of each that has a threshold."""

from __future__ import annotations

import math
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
    generate,
)
from sia._attention import OBSERVED, observe_attention
from sia.gates import GATES, Step, ThresholdGate
from tests.helpers import tiny

TOKENIZER = tiny.tokenizer()
MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
PROMPTS = tiny.prompts(30)
KINDS = {
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
    return generate(
        MODEL, TOKENIZER, prompts, steering, max_new_tokens=12, progress=False, **options
    )


BASE = respond(observe=SIGNALS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.15, 0.6])
def test_a_calibrated_gate_opens_on_the_asked_share(kind, ratio):
    """With β = 0 steering changes no token, so that the gate meets the very signals that it was calibrated on."""
    gate_class, further = KINDS[kind]
    gate = calibrate(gate_class, BASE, ratio, **further)
    assert type(gate) is gate_class
    found = respond(Steering(VALUES, gate, beta=0.0))
    steered = np.concatenate([g.steered for g in found])
    assert [g.token_ids.tolist() for g in found] == [g.token_ids.tolist() for g in BASE]
    assert abs(steered.sum() - math.ceil(ratio * steered.size)) <= 1  # a last bit may differ
    again = calibrate(
        gate_class, found, ratio, **further
    )  # a gate leaves its signal in the generations
    assert again.threshold == pytest.approx(gate.threshold, rel=1e-5)


def test_rises_are_closed_at_the_first_step_and_have_a_largest_ratio():
    first = sum(1 for _ in BASE) / sum(len(g.token_ids) for g in BASE)
    with pytest.raises(
        ValueError,
        match=f"no threshold opens EntropyRiseGate on 100% of these tokens, the most it can be is {1 - first:.1%}",
    ):
        calibrate(EntropyRiseGate, BASE, 1.0)
    found = respond(Steering(VALUES, EntropyRiseGate(-100.0), beta=0.0))
    assert not any(g.steered[0] for g in found)
    assert all(g.steered[1:].all() for g in found)


def test_signals_that_nobody_observed_are_named():
    with pytest.raises(
        ValueError,
        match=r"do not have the signal Attention\(layers=None, heads=None\): make them with observe=",
    ):
        calibrate(AttentionGate, respond(), 0.2)
    assert BASE[0].signal(Entropy()) is BASE[0].entropy


def test_observing_changes_no_token_and_leaves_the_model_as_it_was():
    assert [g.token_ids.tolist() for g in respond()] == [g.token_ids.tolist() for g in BASE]
    assert MODEL.config._attn_implementation == "sdpa"
    with observe_attention(MODEL, [Attention()]):
        assert MODEL.config._attn_implementation == OBSERVED["sdpa"]
    broken = Steering(VALUES, AttentionGate(0.0), candidates=61)
    with pytest.raises(ValueError, match="candidates must be at most"):
        respond(broken)
    assert MODEL.config._attn_implementation == "sdpa"


def test_attention_costs_nothing_unless_it_is_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr("sia._attention._newest_row", lambda *a: calls.append(1))
    respond(Steering(VALUES, EntropyGate(1.5)), prompts=PROMPTS[:2])
    assert calls == []


def test_attention_of_a_layer_is_computed_only_where_it_is_wanted():
    seen = []
    with observe_attention(MODEL, [Attention(layers=(1,))]) as observer, torch.no_grad():
        MODEL(torch.tensor([[7, 8, 9]]))
        seen = sorted(observer.rows)
        assert observer.rows[1].shape == (1, 4, 3)  # one row of each head, not a matrix
    assert seen == [1]


STEP = Step(3, torch.tensor([0.5, 1.5]), torch.zeros(2, 5), torch.tensor([1, 2]))


@given(st.lists(st.booleans(), min_size=4, max_size=4))
@settings(max_examples=16)
def test_combinations_are_those_of_logic(opens):
    @dataclass(frozen=True)
    class Fixed(Gate):
        answer: tuple[bool, ...]

        def opens(self, step):
            return torch.tensor(self.answer)

    a, b = Fixed(tuple(opens[:2])), Fixed(tuple(opens[2:]))
    assert (a & b).opens(STEP).tolist() == [
        x and y for x, y in zip(opens[:2], opens[2:], strict=True)
    ]
    assert (~a).opens(STEP).tolist() == [not x for x in opens[:2]]
    assert (a | b).opens(STEP).tolist() == [
        x or y for x, y in zip(opens[:2], opens[2:], strict=True)
    ]
    assert (~~a & ~b).opens(STEP).tolist() == [
        x and not y for x, y in zip(opens[:2], opens[2:], strict=True)
    ]


def test_layers_may_be_a_list():
    assert AttentionGate(1.0, layers=[0, 1]).signal == Attention((0, 1))
    assert AttentionGate(1.0, layers=1).signal == Attention((1,))
    assert respond(Steering(VALUES, AttentionGate(2.0, layers=[1]), 4.0))[0].signals.keys() == {
        Attention((1,))
    }


def test_a_subclass_of_a_model_with_eager_attention_can_be_watched():
    class Mine(type(MODEL)):
        pass

    model = Mine(MODEL.config).eval()
    model.load_state_dict(MODEL.state_dict())
    model.set_attn_implementation("eager")
    found = generate(
        model, TOKENIZER, PROMPTS[:3], observe=[Attention()], max_new_tokens=4, progress=False
    )
    expected = generate(
        MODEL, TOKENIZER, PROMPTS[:3], observe=[Attention()], max_new_tokens=4, progress=False
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.signals[Attention()], b.signals[Attention()], atol=1e-5)


def test_combinations_ask_for_the_signals_of_both():
    gate = EntropyGate(1.0, over="vocabulary") & ~(AttentionGate(2.0) & PositionGate(3))
    assert gate.signals == (PositionGate(3) | gate).signals == {Entropy("vocabulary"), Attention()}
    assert repr(EntropyGate(1.0) & ~Never()) == (
        "Both(first=EntropyGate(threshold=1.0, over='candidates'), second=Not(gate=Never()))"
    )
    for combine in (and_, or_):
        with pytest.raises(TypeError, match="unsupported operand"):
            combine(EntropyGate(1.0), 3)
    found = respond(Steering(VALUES, ~EntropyGate(1.7), beta=0.0))
    for generation in found:
        assert (generation.steered == (generation.entropy < 1.7)).all()


def test_a_gate_of_ones_own_works():
    class EveryOther(Gate):
        def opens(self, step):
            return torch.full_like(step.keys, step.index % 2 == 1, dtype=torch.bool)

    for generation in respond(Steering(VALUES, EveryOther())):
        assert generation.steered.tolist() == [
            bool(i % 2) for i in range(len(generation.token_ids))
        ]


def test_named_gates_are_registered_with_their_one_setting():
    gates = {name: gate_class.from_setting(1.0) for name, gate_class in GATES.items()}
    assert gates["entropy-rise"] == EntropyRiseGate(1.0)
    assert gates["position"] == PositionGate(1)
    assert gates["random"] == RandomGate(1.0)
    assert gates["every"] == EveryToken()
    assert gates["never"] == Never()
    assert all(gate.setting_value == 1.0 for gate in gates.values() if gate.setting)
    assert all(gate.label for gate in gates.values())
    with pytest.raises(NotImplementedError, match="RandomGate has no setting to calibrate"):
        RandomGate.fit(BASE, 0.2)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
def test_a_calibrated_position_gate_comes_closest_to_the_asked_share(ratio):
    lengths = np.array([len(g.token_ids) for g in BASE])
    distances = [abs(np.minimum(n, lengths).sum() / lengths.sum() - ratio) for n in range(13)]
    assert calibrate(PositionGate, BASE, ratio).tokens == np.argmin(distances)


def flat(signal):
    n = len(signal)
    signals = {Attention(): np.array(signal, np.float32)}
    return Generation(
        None,
        np.arange(n),
        np.ones(n, np.float32),
        np.zeros(n, bool),
        np.arange(n),
        np.zeros(n, np.float32),
        True,
        signals=signals,
    )


@settings(max_examples=50)
@given(
    st.lists(st.floats(0.125, 9, width=32), min_size=2, max_size=40, unique=True),
    st.floats(0.01, 0.9),
)
def test_attention_and_its_rise_open_on_the_asked_share(signal, ratio):
    generations = [flat(signal)]
    gate = calibrate(AttentionGate, generations, ratio)
    assert sum(np.float32(s) >= gate.threshold for s in signal) == math.ceil(
        ratio * len(signal) - 1e-9
    )
    rises = np.array(signal[1:], np.float32) / np.array(signal[:-1], np.float32)
    wanted = math.ceil(ratio * len(signal) - 1e-9)
    if wanted <= len(rises):
        opened = (rises >= calibrate(AttentionRiseGate, generations, ratio).threshold).sum()
        assert opened >= wanted
        assert opened == wanted or len(set(rises.tolist())) < len(rises)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyGate("1"), "threshold must be a finite number of at least 0, got '1'"),
        (lambda: RandomGate("a"), "ratio must lie between 0 and 1, got 'a'"),
        (lambda: calibrate(EntropyGate, BASE[0], 0.2), "generations must be a list of them, got Generation"),
        (lambda: EntropyRiseGate(math.inf), "threshold must be a finite number, got inf"),
        (lambda: AttentionGate(-1.0), "threshold must be a finite number of at least 0, got -1.0"),
        (lambda: AttentionGate(1.0, layers=()), "layers must be different numbers from 0, at least one, or None for all, got ()"),
        (lambda: AttentionGate(1.0, heads=(1, 1)), "heads must be different numbers from 0, at least one, or None for all, got (1, 1)"),
        (lambda: PositionGate(-1), "tokens must be a whole number of at least 0, got -1"),
        (lambda: PositionGate(2.5), "tokens must be a whole number of at least 0, got 2.5"),
        (lambda: calibrate(ThresholdGate, BASE, 0.2), "Can't instantiate abstract class ThresholdGate"),
        (lambda: calibrate(RandomGate, BASE, 0.2), "calibrate needs one of the gates EntropyGate, EntropyRiseGate,"),
        (lambda: calibrate(RandomGate, BASE, 0.2), ", got <class 'sia.gates.RandomGate'>"),
        (lambda: respond(Steering(VALUES, AttentionGate(1.0, layers=(2,)))),
         "layers of the attention signal must be below 2 for this model, got 2"),
        (lambda: respond(Steering(VALUES, AttentionGate(1.0, heads=(4,)))),
         "heads of the attention signal must be below 4 for this model, got 4"),
    ],
)  # fmt: skip
def test_gates_refuse_what_they_cannot_mean(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert message in str(error.value)


def test_other_attention_implementations_are_refused():
    model = tiny.language_model("qwen3")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(
        ValueError,
        match="attention gates need a model with attn_implementation sdpa or eager, got flex_attention",
    ):
        generate(model, TOKENIZER, [[7]], observe=[Attention()], progress=False)
