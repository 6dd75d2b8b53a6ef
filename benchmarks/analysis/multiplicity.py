"""Many verdicts at once: p values from intervals, Holm's step-down test, fixed sequences.

A p value is two-sided, of an estimate against its margin. Its standard error is that of the
interval: over several replicates the interval is a t interval, of a single one it is read as a
normal one of the same width. A claim of several rows holds where its weakest row does
(intersection-union: no correction), and fails where any row fails (Bonferroni over the rows).

References: Holm, "A simple sequentially rejective multiple test procedure", 1979; Berger,
"Multiparameter hypothesis testing and acceptance sampling", 1982.
"""

from collections.abc import Iterable

import numpy as np
from scipy import stats


def t_statistic(
    excess: float, width: float, replicates: float, level: float
) -> tuple[float, float]:
    """Return an estimate's distance from its margin in standard errors, and degrees of freedom.

    Args:
        excess: Estimate minus margin.
        width: Full width of the interval.
        replicates: Replicates that the interval is over; NaN or 1: it is a bootstrap interval.
        level: Confidence level of the interval.
    """
    freedom = replicates - 1 if replicates > 1 else np.inf
    error = width / (2 * stats.t.ppf((1 + level) / 2, freedom))
    return excess / error, freedom


def p_value(distance: float, freedom: float, rows: int = 1) -> float:
    """Return the two-sided p value of a claim from the statistic of its weakest row.

    Args:
        distance: As `t_statistic` returns it; positive where the claim holds.
        freedom: Degrees of freedom.
        rows: How many rows must hold; that one of them fails is found by searching all.
    """
    p = 2 * stats.t.sf(abs(distance), freedom)
    return float(min(1.0, p if distance > 0 else p * rows))


def needed_distances(level: float, rows: int, replicates: int) -> tuple[float, float]:
    """Return how many standard errors beyond its margin an estimate must lie to be decided.

    Args:
        level: Confidence level of the intervals.
        rows: Rows of all claims that Holm's test corrects for.
        replicates: Replicates that the intervals are over, at least 2.

    Returns:
        By its interval alone; by Holm's test too, as the first of all rows.
    """
    alone, first = stats.t.isf(np.array([1, 1 / rows]) * (1 - level) / 2, replicates - 1)
    return float(alone), float(first)


def holm(p_values: Iterable[float]) -> np.ndarray:
    """Return Holm's adjusted p values, in the given order."""
    p = np.asarray(list(p_values), np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def smallest_passing(passed: Iterable[tuple[float, bool]]) -> float | None:
    """Return the smallest share that passes with all larger ones, tested from the largest down.

    Each test has the full level: the first that fails ends the sequence, so that a wrong share is
    named with at most the probability of one wrong test. None where the largest share fails.

    Args:
        passed: Shares, in any order, and whether each passes its own test.
    """
    smallest = None
    for share, passes in sorted(passed, reverse=True):
        if not passes:
            break
        smallest = share
    return smallest
