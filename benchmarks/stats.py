"""Uncertainty: a hierarchical bootstrap as one matrix of weights, so that every quantity meets the same resamples.

Replicates are drawn with replacement, prompts within each drawn replicate and objective, sampling seeds within each drawn
prompt (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8). A difference of two methods is
taken per prompt and seed before it is resampled, which makes it paired.
"""

from __future__ import annotations

import numpy as np

METHOD = "percentile bootstrap over replicates, prompts within replicate and objective, seeds within prompt"


def bootstrap_weights(shape: tuple[int, int, int, int], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How much each observation counts in each resample: float32 `(resamples, replicates·objectives·prompts·seeds)`, rows sum to 1.

    shape: (replicates, objectives, prompts per objective, seeds per prompt). Objectives are strata: never resampled.
    """
    replicates, objectives, prompts, seeds = shape
    weights = np.zeros((resamples, *shape), dtype=np.float32)
    for resample in range(resamples):
        for replicate in rng.integers(replicates, size=replicates):
            for objective in range(objectives):
                drawn = rng.integers(prompts, size=prompts)
                counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=prompts)
                np.add.at(weights[resample, replicate, objective], drawn, counts)
    return weights.reshape(resamples, -1) / np.prod(shape)


def interval(values: np.ndarray, weights: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lower and upper end of the `level` interval of each column: three arrays `(columns,)`.

    values: `(replicates·objectives·prompts·seeds, columns)`, in the order of the weights.
    """
    resampled = weights @ values.astype(np.float32)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return values.mean(0), low, high
