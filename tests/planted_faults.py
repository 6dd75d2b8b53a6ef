"""Faults that the tests must catch, planted one at a time.

A pytest plugin: `PLANTED_FAULT="β negated" pytest -p tests.planted_faults FILES` runs tests with a
fault. `test_planted_faults.py` shows that each is caught, and that docs/testing.md says by what.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sia import _decoding, _prefix_cache, _sampling, gates, steering
from sia.scorers import base

REFERENCE = "tests/sia/test_decoding.py::test_every_gate_matches_the_reference"
TEMPERATURE = "tests/sia/test_decoding.py::test_temperature_divides_after_the_tilt"
GOLDEN = "tests/golden/test_decoding.py"


@dataclass(frozen=True)
class Fault:
    """A function of a module or class, and its replacement, called with it and its arguments."""

    owner: Any
    name: str
    change: Callable
    caught_by: tuple[str, ...] = (REFERENCE, GOLDEN)  # tests, each of which fails

    def plant(self) -> None:
        """Replace the function for the rest of this process."""
        original = getattr(self.owner, self.name)

        def faulty(*arguments, **options):
            return self.change(original, *arguments, **options)

        setattr(self.owner, self.name, faulty)


def mask_of_another_row(original, self, cached, fresh, prefix, *arguments):
    return original(self, cached.roll(1).clamp(max=prefix), fresh, prefix, *arguments)


def value_before_the_candidate(original, self, rows, responses, branches, ends):
    lengths = torch.full_like(rows, responses.shape[1])
    return self.prefixes.last(rows, responses, lengths)[:, None].expand(-1, branches.shape[1])


def stale_cache(original, self, rows, totals, last, outputs=0, branches=None):
    """Keep the first candidate in the cache as the next token, instead of dropping all."""
    output = original(self, rows, totals, last, outputs, branches)
    self.cached[rows] = (totals + (branches is not None)).clamp(max=self.capacity - 1)
    return output


FAULTS = {
    "β negated": Fault(steering, "tilt", lambda tilt, p, v, beta: tilt(p, v, -beta)),
    "gate inverted": Fault(gates.ThresholdGate, "opens", lambda opens, *a: ~opens(*a)),
    "values of candidates shuffled": Fault(
        base.BranchSession, "score", lambda score, *a: score(*a).flip(1)
    ),
    "attention mask of another row": Fault(
        _prefix_cache.CachedPrefixes, "_mask", mask_of_another_row
    ),
    "entropy in bits": Fault(
        _decoding, "entropy", lambda entropy, logits: entropy(logits) / math.log(2)
    ),
    "value read one position early": Fault(
        base.CachedSession, "read_branches", value_before_the_candidate
    ),
    "temperature ignored": Fault(
        _sampling,
        "choose",
        lambda choose, logits, noise, _: choose(logits, noise, 1.0),
        (TEMPERATURE, GOLDEN),
    ),
    "stale cache after a junction": Fault(_prefix_cache.CachedPrefixes, "_catch_up", stale_cache),
}


def pytest_configure(config) -> None:
    """Plant the fault that the environment names."""
    if name := os.environ.get("PLANTED_FAULT"):
        FAULTS[name].plant()
