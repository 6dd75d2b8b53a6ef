"""The pure equations: laws that hold for any numbers, and plain oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from sia import (
    EntropyGate,
    EveryToken,
    Generation,
    Never,
    RandomGate,
    Steering,
    ValueModel,
    _sampling,
    calibrate,
)
from sia.steering import drop_improbable, entropy, kl_divergence, tilt
from tests.helpers import tiny

ROWS = st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=1, max_size=5)
VALUES = st.lists(st.floats(-5, 5), min_size=4, max_size=4)


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


@given(ROWS)
def test_entropy_lies_between_0_and_ln_k(rows):
    h = entropy(tensor(rows))
    assert (h >= -1e-12).all()
    assert (h <= math.log(4) + 1e-12).all()


def test_entropy_of_known_distributions():
    assert entropy(torch.zeros(1, 10)).item() == pytest.approx(math.log(10))
    assert entropy(torch.tensor([[0.0, -math.inf]])).item() == 0
    assert entropy(torch.log(torch.tensor([[0.9, 0.1]]))).item() == pytest.approx(
        -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    )


@given(ROWS, VALUES, st.floats(0, 10))
def test_tilt_is_the_optimum_of_the_regularised_objective(rows, values, beta):
    """π* ∝ π·exp(β·V), by its probabilities; a constant added to the values changes nothing."""
    base, v = tensor(rows), tensor([values]).expand(len(rows), 4)
    steered = tilt(base, v, beta).softmax(-1)
    weights = base.softmax(-1) * torch.exp(beta * (v - v.max()))
    torch.testing.assert_close(
        steered, weights / weights.sum(-1, keepdim=True), atol=1e-9, rtol=1e-6
    )
    torch.testing.assert_close(tilt(base, v + 3.0, beta).softmax(-1), steered, atol=1e-9, rtol=1e-6)


@given(ROWS, VALUES)
def test_infinite_beta_leaves_the_values_alone(rows, values):
    v = tensor([values]).expand(len(rows), 4)
    assert torch.equal(tilt(tensor(rows), v, math.inf), v)
    assert torch.equal(tilt(tensor(rows), v, 0.0), tensor(rows))


@given(ROWS, VALUES)
def test_kl_is_a_divergence(rows, values):
    p, q = tensor(rows), tensor([values]).expand(len(rows), 4)
    expected = [
        scipy_stats.entropy(a, b)
        for a, b in zip(q.softmax(-1).numpy(), p.softmax(-1).numpy(), strict=True)
    ]
    np.testing.assert_allclose(kl_divergence(q, p).numpy(), expected, atol=1e-9, rtol=1e-6)
    assert (kl_divergence(p, p) < 1e-12).all()


def test_kl_counts_impossible_candidates_as_nothing():
    p = torch.tensor([[0.0, 0.0, -math.inf]])
    assert kl_divergence(p, p).item() == 0
    assert kl_divergence(torch.tensor([[0.0, -math.inf, -math.inf]]), p).item() == pytest.approx(
        math.log(2)
    )


@given(ROWS, VALUES, st.floats(0, 0.99))
def test_floor_drops_the_improbable_and_never_all(rows, values, floor):
    base = tensor(rows)
    kept = drop_improbable(tensor([values]).expand(len(rows), 4).clone(), base, floor).isfinite()
    p = base.softmax(-1)
    assert torch.equal(kept, (p >= floor) | (p == p.amax(-1, keepdim=True)))
    assert kept.any(-1).all()


def test_keyed_noise_is_gumbel_and_independent():
    keys = _sampling.prompt_keys([[i] for i in range(200)], [0] * 200)
    tokens = torch.arange(50).expand(200, 50)
    noise = torch.stack([_sampling.gumbel(keys, step, tokens) for step in range(10)]).numpy()
    assert scipy_stats.kstest(noise.ravel(), "gumbel_r").pvalue > 0.001
    for other in (np.roll(noise, 1, axis=0), np.roll(noise, 1, axis=1), np.roll(noise, 1, axis=2)):
        assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.02  # steps, prompts, tokens


def test_noise_depends_on_seed_prompt_step_and_token_alone():
    def noise(prompt, seed, step, token, others=()):
        keys = _sampling.prompt_keys([prompt, *others], [seed] * (1 + len(others)))
        return _sampling.gumbel(keys, step, torch.tensor([[token]] * len(keys)))[0].item()

    usual = noise([7, 8], 1, 2, 3)
    assert usual == noise([7, 8], 1, 2, 3, others=[[1, 2, 3, 4], [9]])
    different = [
        noise([7, 8], 2, 2, 3),
        noise([8, 7], 1, 2, 3),
        noise([7, 8, 0], 1, 2, 3),
        noise([7, 8], 1, 3, 3),
        noise([7, 8], 1, 2, 4),
    ]
    assert len({usual, *different}) == 6
    assert noise([7, 8], -1, 0, 0) != noise([7, 8], 2**63, 0, 0)


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9),
    st.integers(-(2**63), 2**63 - 1),
)
def test_mixing_is_that_of_plain_integers(keys, value):
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def plain(key, value):
        x = ((key & mask) ^ (value & mask) * golden & mask) + golden & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
        return x - 2**64 if x >= 2**63 else x

    found, expected = torch.tensor(keys), [plain(key, value) for key in keys]
    assert _sampling.mix(found, value).tolist() == expected
    assert _sampling.mix(found, torch.tensor([value])).tolist() == expected
    assert found.tolist() == keys  # nothing is changed in place


def test_gumbel_max_samples_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -math.inf]]).expand(20_000, 4)
    keys = _sampling.prompt_keys([[i] for i in range(20_000)], [0] * 20_000)
    noise = _sampling.gumbel(keys, 0, torch.arange(4).expand(20_000, 4))
    for temperature in (1.0, 0.5):
        counts = torch.bincount(_sampling.choose(logits, noise, temperature), minlength=4).numpy()
        expected = (logits[0].double() / temperature).softmax(0).numpy() * 20_000
        assert counts[3] == expected[3] == 0
        assert scipy_stats.chisquare(counts[:3], expected[:3]).pvalue > 0.001
    assert _sampling.choose(logits, noise, 0.0).eq(0).all()


def generation(entropies):
    n = len(entropies)
    return Generation(
        None,
        np.arange(n),
        np.array(entropies, np.float32),
        np.zeros(n, bool),
        np.arange(n),
        np.zeros(n, np.float32),
        True,
    )


@settings(max_examples=50)
@given(
    st.lists(
        st.floats(0, 2.25, width=32, allow_subnormal=False), min_size=1, max_size=60, unique=True
    ),
    st.floats(0.01, 1),
)
def test_calibrate_opens_on_the_asked_share(entropies, ratio):
    gate = calibrate(EntropyGate, [generation(entropies[:3]), generation(entropies[3:])], ratio)
    opened = sum(h >= gate.threshold for h in np.array(entropies, np.float32))
    assert opened == math.ceil(ratio * len(entropies) - 1e-9)


def test_generation_properties():
    one = Generation(
        "w6",
        np.array([5, 6]),
        np.ones(2),
        np.array([True, False]),
        np.array([4, 6]),
        np.zeros(2),
        False,
    )
    assert one.intervention_ratio == 0.5
    assert one.shifted.tolist() == [True, False]
    assert math.isnan(generation([]).intervention_ratio)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EntropyGate(-0.1), "threshold must be a finite number of at least 0, got -0.1"),
        (lambda: EntropyGate(math.nan), "threshold must be a finite number of at least 0, got nan"),
        (
            lambda: EntropyGate(1.0, over="words"),
            'over must be "candidates" or "vocabulary", got \'words\'',
        ),
        (lambda: RandomGate(1.2), "ratio must lie between 0 and 1, got 1.2"),
        (
            lambda: calibrate(EntropyGate, [], 0.2),
            "calibration needs at least one generated token, got none",
        ),
        (
            lambda: calibrate(EntropyGate, [generation([1.0])], 0),
            "ratio must be greater than 0 and at most 1, got 0",
        ),
        (
            lambda: calibrate(RandomGate, [generation([1.0])], 0.2),
            "only a gate with a threshold can be calibrated",
        ),
    ],
)
def test_gates_refuse_what_they_cannot_mean(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"beta": -1.0}, "beta must be 0 to 1e+09, or math.inf (values alone), got -1.0"),
        ({"beta": "4"}, "beta must be 0 to 1e+09, or math.inf (values alone), got '4'"),
        ({"beta": 1e39}, "beta must be 0 to 1e+09, or math.inf (values alone), got 1e+39"),
        ({"beta": math.nan}, "beta must be 0 to 1e+09, or math.inf (values alone), got nan"),
        ({"candidates": 0}, "candidates must be a whole number of at least 1, got 0"),
        ({"candidates": 2.5}, "candidates must be a whole number of at least 1, got 2.5"),
        ({"min_probability": 1.0}, "min_probability must be at least 0 and less than 1, got 1.0"),
        ({"gate": 1.0}, "gate must be a gate such as EntropyGate(threshold=1.0), got 1.0"),
        (
            {"gate": EveryToken},
            "gate must be a gate such as EntropyGate(threshold=1.0), got <class 'sia.gates.EveryToken'>",
        ),
        (
            {"scorer": None},
            "scorer must offer start_session(prompts, max_new_tokens), as a ValueModel does, got NoneType",
        ),
    ],
)
def test_steering_refuses_what_it_cannot_mean(settings_, message):
    with pytest.raises((ValueError, TypeError)) as error:
        Steering(**({"scorer": tiny.value_model("qwen3"), "gate": EveryToken()} | settings_))
    assert str(error.value) == message


def test_defaults_are_the_papers():
    steering = Steering(tiny.value_model("qwen3"), Never())
    assert isinstance(steering.scorer, ValueModel)
    assert (steering.beta, steering.candidates, steering.min_probability) == (1.0, 10, 0.0)
