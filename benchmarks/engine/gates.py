"""Gates of cells by name, and one that only the benchmarks use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from benchmarks.spec.cells import Cell
from sia.calibration import calibrate
from sia.gates import GATES, EntropyGate, Gate, Step, UnreachableRatio
from sia.generation import Generation


@dataclass(frozen=True)
class InvertedEntropyGate(EntropyGate):
    """Open where the base model's entropy is below `threshold` nats: the control of SIA."""

    name = "inverted-entropy"
    label = "lowest entropies"

    def opens(self, step: Step) -> Tensor:
        """Return for each row whether the entropy is low, bool `(rows,)`."""
        return ~super().opens(step)

    @classmethod
    def fit(cls, generations: Sequence[Generation], ratio: float, **settings: Any) -> Self:
        """Return the gate that opens on the `ratio` of tokens with the lowest entropies."""
        return super().fit(generations, 1 - ratio, **settings)


def calibrated_gates() -> list[str]:
    """Return the names of the gates that have a setting to calibrate."""
    return [name for name, gate in GATES.items() if gate.calibrated]


def gate_of(cell: Cell, objective: str) -> Gate:
    """Return the gate of a cell with its setting for an objective."""
    gate = GATES[cell.gate]
    return gate.from_setting(cell.threshold(objective) if gate.calibrated else cell.target_ratio)


def calibrated_setting(gate: str, generations: Sequence[Generation], ratio: float) -> float:
    """Return the setting that opens a gate on about `ratio` of the tokens of `generations`.

    Where none does (a rise has no first token), that which opens it on the most tokens; 0 where
    these responses do not open it at all.
    """
    try:
        return calibrate(GATES[gate], generations, ratio).setting_value
    except UnreachableRatio as error:
        most = error.most
        return calibrate(GATES[gate], generations, most).setting_value if most else 0.0
