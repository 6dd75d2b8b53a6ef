"""Equations of steering: laws that hold for any numbers, and plain oracles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sia import EveryToken, Never, Steering
from sia.steering import drop_improbable, entropy, kl_divergence, tilt
from tests.helpers import tiny

SCORER = tiny.value_model("qwen3")
ROWS = st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=1, max_size=5).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64)
)
VALUES = st.lists(st.floats(-5, 5), min_size=4, max_size=4).map(
    lambda row: torch.tensor([row], dtype=torch.float64)
)


@given(ROWS)
def test_entropy_is_that_of_scipy(rows):
    expected = stats.entropy(rows.softmax(-1).numpy(), axis=1)
    np.testing.assert_allclose(entropy(rows).numpy(), expected, atol=1e-9)


def test_impossible_candidates_add_nothing():
    p, q = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, -math.inf, -math.inf]])
    assert entropy(q).item() == kl_divergence(p, p).item() == 0
    assert kl_divergence(q, p).item() == pytest.approx(math.log(2))


@given(ROWS, VALUES, st.floats(0, 10))
def test_tilt_is_the_optimum_of_the_regularised_objective(base, values, beta):
    """π* ∝ π·exp(β·V), by its probabilities; a constant added to the values changes nothing."""
    weights = base.softmax(-1) * torch.exp(beta * (values - values.max()))
    expected = weights / weights.sum(-1, keepdim=True)
    for shifted in (values, values + 3.0):
        policy = tilt(base, shifted, beta).softmax(-1)
        torch.testing.assert_close(policy, expected, atol=1e-9, rtol=1e-6)


@given(ROWS, VALUES)
def test_extremes_of_beta_leave_the_values_or_the_base_alone(base, values):
    values = values.expand_as(base)
    assert torch.equal(tilt(base, values, math.inf), values)
    assert torch.equal(tilt(base, values, 0.0), base)


@given(ROWS, VALUES)
def test_kl_divergence_is_that_of_scipy(p, q):
    q = q.expand_as(p)
    expected = stats.entropy(q.softmax(-1).numpy(), p.softmax(-1).numpy(), axis=1)
    np.testing.assert_allclose(kl_divergence(q, p).numpy(), expected, atol=1e-9, rtol=1e-6)


@given(ROWS, VALUES, st.floats(0, 0.99))
def test_floor_drops_the_improbable_and_never_all(base, values, floor):
    kept = drop_improbable(values.repeat(len(base), 1), base, floor).isfinite()
    p = base.softmax(-1)
    assert torch.equal(kept, (p >= floor) | (p == p.amax(-1, keepdim=True)))


BETA = "beta must be 0 to 1e+09, or math.inf (values alone), got "
CANDIDATES = "candidates must be a whole number of at least 1, got "
GATE = "gate must be a gate such as EntropyGate(threshold=1.0), got "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, BETA + "-1.0"),
        ({"beta": "4"}, BETA + "'4'"),
        ({"beta": 1e39}, BETA + "1e+39"),
        ({"beta": math.nan}, BETA + "nan"),
        ({"candidates": 0}, CANDIDATES + "0"),
        ({"candidates": 2.5}, CANDIDATES + "2.5"),
        ({"min_probability": 1.0}, "min_probability must be at least 0 and less than 1, got 1.0"),
        ({"gate": 1.0}, GATE + "1.0"),
        ({"gate": EveryToken}, GATE + "<class 'sia.gates.EveryToken'>"),
        (
            {"scorer": None},
            "scorer must offer start_session(prompts, max_new_tokens), as a ValueModel does, "
            "got NoneType",
        ),
    ],
)
def test_steering_refuses_invalid_arguments(settings, message):
    with pytest.raises((ValueError, TypeError)) as error:
        Steering(**({"scorer": SCORER, "gate": EveryToken()} | settings))
    assert str(error.value) == message


def test_defaults_are_the_papers():
    assert Steering(SCORER, Never()) == Steering(
        SCORER, Never(), 1.0, candidates=10, min_probability=0.0
    )
