"""Intervals against a plain bootstrap, the textbook's t interval, and simulated coverage."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.analysis.intervals import (
    bootstrap_interval,
    bootstrap_weights,
    interval_kind,
    t_interval,
)


def slow_bootstrap(values, rng, resamples):
    """Means of resamples, drawn one by one: prompts of each objective with their samples."""
    objectives, prompts, _ = values.shape
    means = []
    for _ in range(resamples):
        drawn = [
            values[o, p] for o in range(objectives) for p in rng.integers(prompts, size=prompts)
        ]
        means.append(np.mean(drawn))
    return np.array(means)


def test_bootstrap_weights_resample_like_the_plain_loop():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 6, 4)) + rng.normal(size=(2, 6, 1))
    weights = bootstrap_weights(values.shape, 3000, rng)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    means, slow = weights @ values.ravel(), slow_bootstrap(values, rng, 3000)
    np.testing.assert_allclose(
        np.quantile(means, [0.025, 0.5, 0.975]), np.quantile(slow, [0.025, 0.5, 0.975]), atol=0.05
    )
    assert means.std() == pytest.approx(slow.std(), rel=0.08)


def test_objectives_are_strata():
    values = np.zeros((2, 10, 3))
    values[1] = 100
    weights = bootstrap_weights(values.shape, 200, np.random.default_rng(0))
    assert bootstrap_interval(values.reshape(-1, 1), weights, 0.95)[:, 0] == pytest.approx(
        [50, 50, 50], abs=1e-4
    )


def test_t_interval_leaves_out_replicates_without_an_estimate():
    estimates = np.array([[1.0, 4.0, np.nan], [2.0, np.nan, np.nan], [6.0, 5.0, 7.0]])
    columns = [estimates[np.isfinite(estimates[:, i]), i] for i in range(2)]
    expected = [
        (x.mean(), *stats.t.interval(0.9, len(x) - 1, x.mean(), stats.sem(x))) for x in columns
    ]
    bounds = t_interval(estimates, 0.9)
    np.testing.assert_allclose(bounds[:, :2].T, expected)
    np.testing.assert_array_equal(bounds[:, 2], [7, np.nan, np.nan])


@pytest.mark.parametrize("spread", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("replicates", [1, 3, 8])
def test_95_percent_intervals_cover_the_truth_in_95_percent(replicates, spread):
    """`spread` is between worlds; one world's mean is 0.08 off. One replicate knows no other."""
    rng, trials = np.random.default_rng(1), 400
    hits = 0
    for _ in range(trials):
        worlds = spread * rng.normal(size=(replicates, 1, 1, 1))
        values = worlds + 0.4 * rng.normal(size=(replicates, 1, 40, 1))
        values = values + rng.normal(size=(replicates, 1, 40, 4))
        if replicates == 1:
            weights = bootstrap_weights(values.shape[1:], 300, rng)
            _, low, high = bootstrap_interval(values.reshape(-1, 1), weights, 0.95) - worlds.item()
        else:
            _, low, high = t_interval(values.reshape(replicates, -1).mean(1, keepdims=True), 0.95)
        hits += low[0] <= 0 <= high[0]
    assert 0.925 <= hits / trials <= 0.98


def test_captions_name_the_kind_of_interval():
    assert interval_kind(0.95, 3) == "95% t intervals over replicates"
    assert interval_kind(0.9, 1, "states") == "90% bootstrap intervals over states"
