"""Tokens, gate positions and signals under every gate: these pin the sampling noise too."""

import pandas as pd
import pytest

from sia import (
    AttentionGate,
    AttentionRiseGate,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    PositionGate,
    RandomGate,
    Steering,
    generate,
)
from tests.golden.models import TOLERANCE, language_model, prompts, tokenizer, value_model

STEERING = {
    "attention": {"gate": AttentionGate(4.0)},
    "attention-rise": {"gate": AttentionRiseGate(1.02)},
    "dense": {"gate": EveryToken(), "beta": 2.0},
    "entropy": {"gate": EntropyGate(2.0)},
    "entropy-of-vocabulary": {"gate": EntropyGate(3.0, over="vocabulary")},
    "entropy-rise": {"gate": EntropyRiseGate(0.05)},
    "floor": {"gate": EveryToken(), "beta": 2.0, "min_probability": 0.08},
    "inverted-entropy": {"gate": ~EntropyGate(2.0)},
    "position": {"gate": PositionGate(4)},
    "random": {"gate": RandomGate(0.4, seed=3)},
    "unsteered": None,
}


@pytest.mark.parametrize("name", STEERING)
def test_decoding(name, dataframe_regression):
    settings = STEERING[name]
    steering = settings and Steering(value_model("qwen3"), **settings)
    generations = generate(
        language_model("qwen3"),
        tokenizer(),
        prompts(3),
        steering,
        batch_size=2,
        max_new_tokens=12,
        seed=1,
        temperature=0.8,
        progress=False,
    )
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
