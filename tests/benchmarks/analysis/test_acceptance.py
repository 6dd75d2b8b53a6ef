"""Base models outside the ranges of a profile stop a run before anything is steered."""

import re

import pandas as pd
import pytest

from benchmarks.analysis.acceptance import check_acceptance

RANGES = {"sure_steps": (0.45, 1.0), "entropy_p80": (0.5, 1.0)}


def quality(**estimates):
    rows = [("base", "sure_steps", 0.5), ("base", "entropy_p80", 0.7), ("base", "judge", 9.0)]
    rows += [("base-small", "sure_steps", 0.1), ("base@odd", "sure_steps", 0.1)]
    return pd.DataFrame(
        [
            {"replicate": 0, "family": "qwen3", "model": model, "metric": metric,
             "estimate": estimates.get(metric, value)}
            for model, metric, value in rows
        ]
    )  # fmt: skip


def test_models_inside_the_ranges_are_accepted():
    check_acceptance(quality(), RANGES)
    check_acceptance(quality(sure_steps=0.1), {})


def test_all_values_outside_the_ranges_are_named():
    message = (
        "the base models are not accepted, nothing is steered: share of steps below 0.01 nats of "
        "qwen3 base (replicate 0) is 0.44, expected 0.45 to 1; 80th percentile of the entropy "
        "(nats) of qwen3 base (replicate 0) is 1.2, expected 0.5 to 1"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_acceptance(quality(sure_steps=0.44, entropy_p80=1.2), RANGES)
