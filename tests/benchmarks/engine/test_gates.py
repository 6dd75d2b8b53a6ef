"""Gates of cells: their settings, and calibration of these."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.engine.gates import (
    InvertedEntropyGate,
    calibrated_gates,
    calibrated_setting,
    gate_of,
)
from benchmarks.engine.measure import calibrated_settings, observed_signals
from benchmarks.spec.cells import DIVERGENCE_GATES, OBJECTIVES, Cell
from benchmarks.spec.model_kinds import value_kind
from sia import (
    Attention,
    AttentionGate,
    AttentionRiseGate,
    Divergence,
    DivergenceGate,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    JunctionGate,
    Never,
    PositionGate,
    PredictedDivergence,
    RandomGate,
    Steering,
    generate,
)
from tests.helpers import tiny
from tests.helpers.fake import SMOKE

GATES = {
    "entropy": EntropyGate(3.0),
    "inverted-entropy": InvertedEntropyGate(3.0),
    "entropy-rise": EntropyRiseGate(3.0),
    "attention": AttentionGate(3.0),
    "attention-rise": AttentionRiseGate(3.0),
    "position": PositionGate(3),
}
OTHERS = {"random": RandomGate(0.2), "every": EveryToken(), "never": Never()}


def test_every_gate_has_the_setting_of_its_objective():
    assert set(calibrated_gates()) == set(GATES)
    for name, gate in (GATES | OTHERS).items():
        cell = Cell(0, "qwen3", gate=name, target_ratio=0.2, thresholds=(0.5, 1.0, 3.0))
        assert gate_of(None, cell, "honesty") == gate
    entropy = Cell(0, "qwen3", gate="entropy", thresholds=(0.5, 1.0, 3.0))
    assert gate_of(None, entropy, "harmlessness") == EntropyGate(0.5)


class Fitted:
    """A subject that has nothing but a predictor, of the per-token loss."""

    profile, models_kept = SMOKE, 1

    def fitted(self, kind, family):
        assert (kind, family) == ("junction-token", "qwen3")
        return JunctionGate(9.0, tiny.predictor(tiny.language_model("qwen3")))


def test_gates_by_divergences_are_calibrated_on_unsteered_responses_that_a_scorer_has_valued():
    subject = Fitted()
    predictor = subject.fitted("junction-token", "qwen3").predictor
    plain = Cell(0, "qwen3", "validation", scorer=value_kind("token"), beta=2.0)
    signals = observed_signals(subject, plain)
    assert signals == [Divergence(), PredictedDivergence(predictor)]
    generations = generate(
        tiny.language_model("qwen3"), tiny.tokenizer(), tiny.prompts(20),
        Steering(tiny.value_model("qwen3"), Never(), 2.0),
        max_new_tokens=10, observe=signals, progress=False,
    )  # fmt: skip
    settings = calibrated_settings(subject, plain, generations)
    assert list(settings) == list(DIVERGENCE_GATES)
    for gate, signal in zip(DIVERGENCE_GATES, reversed(signals), strict=True):
        level = np.concatenate([generation.signal(signal) for generation in generations])
        assert (level >= settings[gate]["0.2"]).mean() == pytest.approx(0.2, abs=0.02)
        steered = replace(plain, gate=gate, target_ratio=0.2, thresholds=(1.0, 2.0, 3.0))
        again = calibrated_settings(subject, steered, generations)
        assert again == {gate: {"0.2": settings[gate]["0.2"]}}
        expected = {"junction": JunctionGate(1.0, predictor), "divergence": DivergenceGate(1.0)}
        assert gate_of(subject, steered, OBJECTIVES[0]) == expected[gate]
        assert observed_signals(subject, steered) == []


def test_settings_open_on_the_requested_share():
    generations = generate(
        tiny.language_model("qwen3"), tiny.tokenizer(), tiny.prompts(30),
        max_new_tokens=20, observe=[Attention()], progress=False,
    )  # fmt: skip
    settings = {gate: calibrated_setting(gate, generations, 0.3) for gate in GATES}
    entropy = np.concatenate([g.entropy for g in generations])
    attention = np.concatenate([g.signal(Attention()) for g in generations])
    steered = [
        entropy >= settings["entropy"],
        entropy < settings["inverted-entropy"],
        attention >= settings["attention"],
    ]
    assert np.mean(steered, axis=1) == pytest.approx(0.3, abs=0.01)
    lengths = np.array([len(g.token_ids) for g in generations])
    shares = {n: np.minimum(n, lengths).sum() / lengths.sum() for n in range(21)}
    assert settings["position"] == min(shares, key=lambda n: abs(shares[n] - 0.3))
