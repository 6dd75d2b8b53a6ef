"""Gates of cells by name, and one that only the benchmarks use.

A cell's gate is "junction", whose predictor is of the cell's models, or one of `sia.gates.GATES`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from benchmarks.engine.loading import fitted
from benchmarks.spec.cells import DIVERGENCE_GATES, Cell
from benchmarks.spec.model_kinds import JUNCTION
from benchmarks.subjects.base import Subject
from sia.calibration import calibrate
from sia.gates import GATES, EntropyGate, Gate, JunctionGate, Step, UnreachableRatio
from sia.generation import Generation
from sia.junctions import JunctionPredictor


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


def is_calibrated(gate: str) -> bool:
    """Return whether a gate has a setting to calibrate."""
    return gate == JUNCTION or GATES[gate].calibrated


def calibrated_gates() -> list[str]:
    """Return the names of the gates whose setting plain responses give, asked by no scorer."""
    return [name for name in GATES if is_calibrated(name) and name not in DIVERGENCE_GATES]


def predictor_of(subject: Subject, cell: Cell) -> JunctionPredictor | None:
    """Return the predictor of divergence by the values of a cell; None where it has none."""
    return fitted(subject, cell.predictor, cell.family).predictor if cell.predictor else None


def gate_of(subject: Subject, cell: Cell, objective: str) -> Gate:
    """Return the gate of a cell with its setting for an objective."""
    if cell.gate == JUNCTION:
        return JunctionGate(cell.threshold(objective), predictor_of(subject, cell))
    gate = GATES[cell.gate]
    return gate.from_setting(cell.threshold(objective) if gate.calibrated else cell.target_ratio)


def calibrated_setting(
    gate: str,
    generations: Sequence[Generation],
    ratio: float,
    predictor: JunctionPredictor | None = None,
) -> float:
    """Return the setting that opens a gate on about `ratio` of the tokens of `generations`.

    Where none does (a rise has no first token), that which opens it on the most tokens; 0 where
    these responses do not open it at all.

    Args:
        gate: Its name.
        generations: Responses that hold the gate's signal.
        ratio: Share of the tokens.
        predictor: Predictor of the junction gate.
    """
    gate_class = JunctionGate if gate == JUNCTION else GATES[gate]
    settings = {"predictor": predictor} if gate == JUNCTION else {}
    try:
        return calibrate(gate_class, generations, ratio, **settings).setting_value
    except UnreachableRatio as error:
        most = error.most
        return calibrate(gate_class, generations, most, **settings).setting_value if most else 0.0
