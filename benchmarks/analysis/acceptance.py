"""Acceptance of the lab's base models, before anything is steered.

What share of the tokens is uncertain decides what a share of steered tokens means. A profile states
in which ranges measures of its base models must lie, as those of real models do.
"""

from collections.abc import Mapping

import pandas as pd

from benchmarks.analysis.labels import METRICS


def check_acceptance(quality: pd.DataFrame, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Check that every base model of the usual size and world lies in the ranges.

    Args:
        quality: Table of the quality of the models, of all replicates.
        ranges: Lowest and highest value that is accepted, by metric.

    Raises:
        ValueError: If one does not, with all that do not.
    """
    bases = quality[(quality["model"] == "base") & quality["metric"].isin(ranges)]
    misses = [
        f"{METRICS[row.metric].label} of {row.family} {row.model} (replicate {row.replicate}) is "
        f"{row.estimate:.3g}, expected {ranges[row.metric][0]:g} to {ranges[row.metric][1]:g}"
        for row in bases.itertuples()
        if not ranges[row.metric][0] <= row.estimate <= ranges[row.metric][1]
    ]
    if misses:
        text = "; ".join(misses)
        raise ValueError(f"the base models are not accepted, nothing is steered: {text}")
