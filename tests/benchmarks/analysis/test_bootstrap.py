"""Bootstrap weights and intervals against a plain loop and simulated coverage."""

import numpy as np
import pytest

from benchmarks.analysis.bootstrap import bootstrap_weights, interval


def slow_bootstrap(values, rng, resamples):
    """Means of resamples, drawn one by one: replicates, then prompts of each objective."""
    replicates, objectives, prompts, _ = values.shape
    means = []
    for _ in range(resamples):
        drawn = []
        for r in rng.integers(replicates, size=replicates):
            for o in range(objectives):
                for p in rng.integers(prompts, size=prompts):
                    drawn += [*values[r, o, p]]
        means.append(np.mean(drawn))
    return np.array(means)


def test_bootstrap_weights_resample_like_the_plain_loop():
    rng = np.random.default_rng(0)
    values = (
        rng.normal(size=(3, 2, 6, 4))
        + rng.normal(size=(3, 1, 1, 1))
        + rng.normal(size=(3, 2, 6, 1))
    )
    weights = bootstrap_weights(values.shape, 3000, rng)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    means, slow = weights @ values.ravel(), slow_bootstrap(values, rng, 3000)
    np.testing.assert_allclose(
        np.quantile(means, [0.025, 0.5, 0.975]), np.quantile(slow, [0.025, 0.5, 0.975]), atol=0.12
    )
    assert means.std() == pytest.approx(slow.std(), rel=0.08)


def test_objectives_are_strata():
    values = np.zeros((1, 2, 10, 3))
    values[:, 1] = 100
    estimate, low, high = interval(
        values.reshape(-1, 1), bootstrap_weights(values.shape, 200, np.random.default_rng(0)), 0.95
    )
    assert [estimate[0], low[0], high[0]] == pytest.approx([50, 50, 50], abs=1e-4)


@pytest.mark.parametrize(
    ("replicates", "spread", "expected"),
    [(1, 0.0, (0.90, 0.98)), (3, 0.0, (0.95, 1.0)), (3, 0.5, (0.65, 0.88))],
)
def test_coverage_is_what_the_module_says(replicates, spread, expected):
    """Of 95% intervals; samples of a prompt vary more than prompts, `spread` is between worlds."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        values = spread * rng.normal(size=(replicates, 1, 1, 1))
        values = values + 0.5 * rng.normal(size=(replicates, 1, 40, 1))
        values = values + rng.normal(size=(replicates, 1, 40, 4))
        weights = bootstrap_weights(values.shape, 300, rng)
        _, low, high = interval(values.reshape(-1, 1), weights, 0.95)
        hits += low[0] <= 0 <= high[0]
    assert expected[0] <= hits / 200 <= expected[1]
