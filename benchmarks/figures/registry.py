"""Every figure and table, by the name of its target."""

from __future__ import annotations

from benchmarks.figures import (
    best_of_n,
    cost,
    entropy,
    figure1,
    figure2,
    figure3,
    figure4,
    figure5,
    junctions,
    mechanism,
    table1,
    theory,
    threshold,
    value_error,
)

FIGURES = {
    "figure1": figure1,
    "figure2": figure2,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "best-of-n": best_of_n,
    "cost": cost,
    "table1": table1,
    "entropy": entropy,
    "theory": theory,
    "mechanism": mechanism,
    "value-error": value_error,
    "threshold": threshold,
    "junctions": junctions,
}
