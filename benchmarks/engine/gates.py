"""Gates that only the benchmarks use. Importing this module adds them to `GATES`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from sia.gates import GATES, EntropyGate, Step
from sia.generation import Generation

__all__ = ["GATES", "InvertedEntropyGate"]


@dataclass(frozen=True)
class InvertedEntropyGate(EntropyGate):
    """Open where the base model's entropy is below `threshold` nats: the control of SIA."""

    name = "inverted-entropy"
    label = "lowest entropies"

    def opens(self, step: Step) -> Tensor:
        return ~super().opens(step)

    @classmethod
    def fit(cls, generations: Sequence[Generation], ratio: float, **settings: Any) -> Self:
        return super().fit(generations, 1 - ratio, **settings)
