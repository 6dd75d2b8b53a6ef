"""Gates of cells: their settings, and calibration of these."""

import numpy as np
import pytest

from benchmarks.engine.gates import (
    InvertedEntropyGate,
    calibrated_gates,
    calibrated_setting,
    gate_of,
)
from benchmarks.spec.cells import Cell
from sia import (
    Attention,
    AttentionGate,
    AttentionRiseGate,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Never,
    PositionGate,
    RandomGate,
    generate,
)
from tests.helpers import tiny

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
        assert gate_of(cell, "honesty") == gate
    entropy = Cell(0, "qwen3", gate="entropy", thresholds=(0.5, 1.0, 3.0))
    assert gate_of(entropy, "harmlessness") == EntropyGate(0.5)


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
