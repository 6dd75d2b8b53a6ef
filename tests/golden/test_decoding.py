"""Tokens, gate positions and signals under every gate: these pin the sampling noise too."""

import pandas as pd
import pytest

import sia
from tests.golden.models import TOLERANCE, language_model, prompts, value_model
from tests.helpers import tiny

STEERING = {
    "attention": {"gate": sia.AttentionGate(4.0)},
    "attention-rise": {"gate": sia.AttentionRiseGate(1.02)},
    "dense": {"gate": sia.EveryToken(), "beta": 2.0},
    "entropy": {"gate": sia.EntropyGate(2.0)},
    "entropy-of-vocabulary": {"gate": sia.EntropyGate(3.0, over="vocabulary")},
    "entropy-rise": {"gate": sia.EntropyRiseGate(0.05)},
    "floor": {"gate": sia.EveryToken(), "beta": 2.0, "min_probability": 0.08},
    "inverted-entropy": {"gate": ~sia.EntropyGate(2.0)},
    "position": {"gate": sia.PositionGate(4)},
    "random": {"gate": sia.RandomGate(0.4, seed=3)},
    "unsteered": None,
}


@pytest.mark.parametrize("name", STEERING)
def test_decoding(name, dataframe_regression):
    settings = STEERING[name]
    steering = settings and sia.Steering(value_model("qwen3"), **settings)
    options = {"batch_size": 2, "seed": 1, "temperature": 0.8}
    generations = tiny.generate(language_model("qwen3"), prompts(3), steering, **options)
    frame = pd.concat(
        pd.DataFrame(
            {
                "prompt": number,
                "token": generation.token_ids,
                "steered": generation.steered.astype(int),
                "unsteered_token": generation.base_token,
                "entropy": generation.entropy.round(5),
                "kl": generation.kl.round(5),
            }
        )
        for number, generation in enumerate(generations)
    )
    assert (frame["steered"].max() > 0) == (steering is not None)
    dataframe_regression.check(
        frame.reset_index(drop=True), default_tolerance=TOLERANCE, basename=f"decoding_{name}"
    )
