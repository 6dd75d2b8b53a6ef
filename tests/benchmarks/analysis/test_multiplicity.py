"""Holm's test, p values and fixed sequences, held against their definitions."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.analysis import claims
from benchmarks.analysis.multiplicity import (
    holm,
    needed_distances,
    p_value,
    smallest_passing,
    t_statistic,
)

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


def closed_test(p: list[float], number: int) -> float:
    """Return the adjusted p value by the closure principle: the worst Bonferroni of any subset."""
    others = [i for i in range(len(p)) if i != number]
    subsets = [[number, *some] for size in range(len(p)) for some in combinations(others, size)]
    return max(min(1, len(subset) * min(p[i] for i in subset)) for subset in subsets)


@settings(deadline=None)
@given(P_VALUES)
def test_holm_is_the_closure_of_bonferroni(p):
    expected = [closed_test(p, number) for number in range(len(p))]
    np.testing.assert_allclose(holm(p), expected)


@pytest.mark.parametrize("replicates", [2, 8, 1, np.nan])
@pytest.mark.parametrize("excess", [0.5, -0.5])
def test_an_interval_that_ends_at_the_margin_has_p_of_its_level(excess, replicates):
    distance, freedom = t_statistic(excess, 1.0, replicates, 0.95)
    assert p_value(distance, freedom) == pytest.approx(0.05)
    assert freedom == (replicates - 1 if replicates > 1 else np.inf)


def test_p_values_are_those_of_a_t_test_over_replicates():
    estimates = np.array([0.3, 0.1, 0.4, 0.2])
    low, high = stats.t.interval(0.95, 3, estimates.mean(), stats.sem(estimates))
    expected = stats.ttest_1samp(estimates, -0.05).pvalue
    distance = t_statistic(estimates.mean() + 0.05, high - low, 4, 0.95)
    assert p_value(*distance) == pytest.approx(expected)


@pytest.mark.parametrize("replicates", [2, 5, 8])
def test_needed_distances_are_those_at_which_the_tests_pass(replicates):
    alone, first = needed_distances(0.95, 77, replicates)
    assert p_value(alone, replicates - 1) == pytest.approx(0.05)
    adjusted = holm([p_value(first, replicates - 1), *[1.0] * 76])
    assert adjusted[0] == pytest.approx(0.05)


def test_a_failing_row_is_corrected_for_the_number_of_rows():
    fails, holds = p_value(-3.0, np.inf, 4), p_value(3.0, np.inf, 4)
    assert fails == pytest.approx(4 * holds)
    assert p_value(-0.1, np.inf, 4) == 1


@pytest.mark.parametrize(
    ("passed", "smallest"),
    [
        ({0.8: True, 0.4: True, 0.2: False, 0.1: True}, 0.4),
        ({0.1: True, 0.8: True, 0.4: True}, 0.1),
        ({0.8: False, 0.4: True}, None),
        ({}, None),
    ],
)
def test_a_sequence_ends_with_the_first_share_that_fails(passed, smallest):
    assert smallest_passing(passed.items()) == smallest


def headline(estimates: list[float], half: float, test: str = "more") -> pd.DataFrame:
    """Return verdicts on as many headline claims, over eight replicates."""
    rows = [
        {"method": str(i), "replicate": "all", "estimate": estimate, "low": estimate - half,
         "high": estimate + half, "n": 800, "replicates": 8}
        for i, estimate in enumerate(estimates)
    ]  # fmt: skip
    asked = [
        claims.Claim(
            f"c{i}", "It holds.", "abstract", "figure1", "", {"": {"method": str(i)}}, test, 0.0,
            headline=1, title="It holds",
        )
        for i in range(len(estimates))
    ]  # fmt: skip
    return claims.verdicts({"figure1": pd.DataFrame(rows)}, asked, 0.95)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    st.floats(1e-3, 1),
    st.sampled_from(["more", "less", "at least"]),
)
def test_an_adjusted_verdict_is_never_bolder_than_the_interval(estimates, half, test):
    verdicts = headline(estimates, half, test)
    alone = [claims.decide(test, row.margin, row.low, row.high) for row in verdicts.itertuples()]
    assert all(
        verdict in (by_interval, "undecided")
        for verdict, by_interval in zip(verdicts["verdict"], alone, strict=True)
    )
    assert (verdicts["p_adjusted"] >= verdicts["p"]).all()
    sure = verdicts["p"] * len(estimates) < 0.05
    assert (verdicts.loc[sure, "verdict"] != "undecided").all()


def test_many_claims_are_decided_less_easily_than_one():
    assert headline([0.2], 0.19)["verdict"].tolist() == ["reproduced"]
    verdicts = headline([0.2, 5.0, -0.01], 0.19)
    assert verdicts["verdict"].tolist() == ["undecided", "reproduced", "undecided"]


def test_exact_numbers_are_decided_directly_and_do_not_count():
    exact, alone = headline([1e-9, 0.0], 0.0), headline([0.2], 0.19)
    assert exact["verdict"].tolist() == ["reproduced", "not reproduced"]
    assert exact["p"].isna().all()
    both = claims.apply_holm(pd.concat([exact, alone], ignore_index=True), 0.95)
    assert both["p_adjusted"].iloc[-1] == alone["p_adjusted"].iloc[0]
