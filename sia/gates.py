"""When to intervene. A gate sees one `Step` of the rows being decoded and says for each row whether it opens.

Gates are frozen dataclasses without state, so that a gate is also its own description. `calibrate` picks a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical

from sia import sampling

if TYPE_CHECKING:
    from sia.trace import Generation


@dataclass(frozen=True)
class Step:
    """What a gate may look at: `rows` sequences at one decoding step.

    number: how many response tokens come before this one.
    entropy: nats over the K candidates, float32 `(rows,)`.
    logits: of the whole vocabulary, float32 `(rows, vocabulary)`.
    row_keys: int64 `(rows,)`, noise keys of (seed, prompt).
    """

    number: int
    entropy: Tensor
    logits: Tensor
    row_keys: Tensor


@runtime_checkable
class Gate(Protocol):
    """Anything with `opens(step) → bool (rows,)`."""

    def opens(self, step: Step) -> Tensor: ...


@dataclass(frozen=True)
class EntropyGate:
    """Opens where the base model's entropy is at least `threshold` nats (τ): H(s) ≥ τ.

    over: "candidates", the K of the steering (at most ln K nats), or "vocabulary".
    """

    threshold: float
    over: Literal["candidates", "vocabulary"] = "candidates"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"threshold must be a finite entropy of at least 0 nats, got {self.threshold}")
        if self.over not in ("candidates", "vocabulary"):
            raise ValueError(f'over must be "candidates" or "vocabulary", got {self.over!r}')

    def opens(self, step: Step) -> Tensor:
        if self.over == "candidates":
            return step.entropy >= self.threshold
        return Categorical(logits=step.logits, validate_args=False).entropy() >= self.threshold


@dataclass(frozen=True)
class RandomGate:
    """Opens with probability `ratio` at every token, by noise keyed with `seed`, the prompt and the step."""

    ratio: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio}")

    def opens(self, step: Step) -> Tensor:
        # -1 is no token id, so this noise meets that of no candidate
        keys = sampling.mix(sampling.mix(sampling.mix(step.row_keys, step.number), -1), self.seed)
        return sampling.uniform(keys) < self.ratio


@dataclass(frozen=True)
class EveryToken:
    """Always open: dense steering."""

    def opens(self, step: Step) -> Tensor:
        return torch.ones_like(step.row_keys, dtype=torch.bool)


@dataclass(frozen=True)
class Never:
    """Always closed: plain decoding from the top K candidates."""

    def opens(self, step: Step) -> Tensor:
        return torch.zeros_like(step.row_keys, dtype=torch.bool)


def calibrate(gate_class: type[EntropyGate], generations: Sequence[Generation], ratio: float) -> EntropyGate:
    """A gate whose threshold opens it on `ratio` of the tokens of `generations`.

    The threshold is the largest at which at least that share of the tokens is steered. Steering changes what
    follows: for a realised ratio close to the target, calibrate on generations that were steered.
    """
    if gate_class is not EntropyGate:
        raise TypeError(f"only a gate with a threshold can be calibrated (EntropyGate), got {gate_class!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be greater than 0 and at most 1, got {ratio}")
    signal = np.concatenate([generation.entropy for generation in generations] or [np.empty(0)])
    if signal.size == 0:
        raise ValueError("calibration needs at least one generated token, got none")
    count = math.ceil(ratio * signal.size - 1e-9)
    return EntropyGate(threshold=float(np.partition(signal, signal.size - count)[signal.size - count]))
