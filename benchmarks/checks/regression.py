"""Whether metrics have changed, or only noise: the statistical half of `make check`.

Two runs answered the same prompts under the same noise. Numbers that are the same to the last digit need no test. Where they differ
(another processor rounds otherwise, and training and sampling amplify that), each metric of each cell has one paired difference for
each prompt. A sign-flip permutation test asks whether their mean is further from zero than the tolerance: what training again on
another processor does to all prompts in common, measured beforehand. Holm's correction keeps the chance of any false alarm in a
build below LEVEL. Beside each pass stands the smallest difference that the test would have seen with POWER.

References: Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005, chapter 3; Holm, "A simple sequentially
rejective multiple test procedure", 1979.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.01  # chance of a false alarm in a build
POWER = 0.8
FLIPS, BLOCK = 2**16, 2**14  # sign patterns for every test; those that these reject meet more
FEW = 20  # patterns as extreme as the data, from which a p-value is known well enough


@dataclass(frozen=True)
class Tests:
    """One entry per test. difference: mean over prompts. p: of the sign flips; NaN where there are too few prompts to ever reject.
    rejected: by Holm at LEVEL over the others. visible: the smallest difference that would have been seen with POWER; NaN as p."""

    difference: np.ndarray
    p: np.ndarray
    rejected: np.ndarray
    visible: np.ndarray


def run(
    differences: np.ndarray, spread: np.ndarray, tolerance: np.ndarray, rng: np.random.Generator
) -> Tests:
    """differences: `(tests, prompts)`, NaN where a test has no such prompt. spread, tolerance: `(tests,)`, standard deviation of a prompt's
    difference between independent runs, and what counts as no change."""
    counts = np.isfinite(differences).sum(1)
    judged = counts >= fewest_prompts(len(differences))
    mean = np.nanmean(differences, 1)
    p = np.full(len(differences), np.nan)
    p[judged] = sign_flip(differences[judged], tolerance[judged], rng)
    rejected = np.zeros(len(differences), bool)
    rejected[judged] = holm(p[judged], LEVEL)
    noise, normal = np.maximum(np.nanstd(differences, 1), spread), NormalDist()
    critical, power = normal.inv_cdf(1 - LEVEL / max(1, judged.sum()) / 2), normal.inv_cdf(POWER)
    # flipped signs of shifted data spread by √(shift² + noise²), so that √n·shift over it can reach no more than √n
    with np.errstate(invalid="ignore"):
        shift = noise * (critical / np.sqrt(counts - critical**2) + power / np.sqrt(counts))
    return Tests(mean, p, rejected, np.where(judged, tolerance + shift, np.nan))


def fewest_prompts(tests: int) -> int:
    """So many prompts have enough sign patterns that all of one sign can be rejected among so many tests."""
    return int(np.ceil(np.log2(2 * max(1, tests) / LEVEL)))


def sign_flip(
    differences: np.ndarray, tolerance: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """p-values `(tests,)` that the mean of `(tests, prompts)` lies no further from zero than `tolerance`, by random sign patterns, the same
    for all tests: FLIPS, and where these say little as many as Holm's smallest bound takes. Prompts that are NaN do not take part."""
    mean = np.nanmean(differences, 1)
    shifted = np.nan_to_num(differences - (np.sign(mean) * tolerance)[:, None]) * np.isfinite(
        differences
    )
    sums, beyond, patterns = (
        np.abs(shifted.sum(1)),
        np.zeros(len(differences)),
        np.zeros(len(differences)),
    )
    outside = np.abs(mean) > tolerance
    wanted = max(FLIPS, int(FEW * len(differences) / LEVEL))
    for done in range(0, wanted, BLOCK):
        open_ = np.flatnonzero(outside & ((beyond < FEW) if done >= FLIPS else True))
        if len(open_) == 0:
            break
        signs = (
            rng.integers(2, size=(BLOCK, differences.shape[1]), dtype=np.int8) * np.float32(2) - 1
        )
        found = np.abs(signs @ shifted[open_].T.astype(np.float32))
        beyond[open_] += (found >= sums[open_] * (1 - 1e-5)).sum(0)
        patterns[open_] += BLOCK
    return np.where(outside, (1 + beyond) / (1 + patterns), 1.0)


def holm(p: np.ndarray, level: float) -> np.ndarray:
    """Which of these hypotheses are rejected with a family-wise error of at most `level`, bool `(tests,)`."""
    order = np.argsort(p, kind="stable")
    bounds = level / np.arange(len(p), 0, -1)
    passed = p[order] > bounds
    count = int(passed.argmax()) if passed.any() else len(p)
    rejected = np.zeros(len(p), bool)
    rejected[order[:count]] = True
    return rejected
