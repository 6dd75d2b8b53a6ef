"""Calibration of gates: the setting at which a gate opens on a given share of the tokens."""

from collections.abc import Sequence
from typing import Any, TypeVar

from sia._numbers import as_number
from sia.gates import GATES, Gate
from sia.generation import Generation

GateT = TypeVar("GateT", bound=Gate)


def calibrate(
    gate_class: type[GateT], generations: Sequence[Generation], ratio: float, **settings: Any
) -> GateT:
    """Return a gate that opens on `ratio` of the tokens of `generations`.

    Steering changes what follows: for a realised ratio close to the target, calibrate on
    generations that were steered.

    Args:
        gate_class: A gate class that can be calibrated, such as `EntropyGate`.
        generations: Responses that hold the gate's signal: made with such a gate, or with
            `observe=[signal]`. The entropy over the candidates is always there.
        ratio: Share of the tokens to steer, above 0 and at most 1.
        **settings: Other fields of the gate (`over`, or `layers` and `heads`).

    Raises:
        TypeError: If the class cannot be calibrated.
        ValueError: If no setting opens the gate on so many tokens, or a signal is missing.
    """
    if not (
        isinstance(gate_class, type) and issubclass(gate_class, Gate) and gate_class.calibrated
    ):
        names = ", ".join(known.__name__ for known in GATES.values() if known.calibrated)
        raise TypeError(f"calibrate needs one of the gates {names}, got {gate_class!r}")
    share = as_number(ratio)
    if not 0 < share <= 1:
        raise ValueError(f"ratio must be greater than 0 and at most 1, got {ratio}")
    if not isinstance(generations, Sequence):
        raise TypeError(f"generations must be a list of them, got {type(generations).__name__}")
    others = [type(one).__name__ for one in generations if not isinstance(one, Generation)]
    if others:
        raise TypeError(f"generations must be a list of them, got one with a {others[0]}")
    if not any(len(generation.token_ids) for generation in generations):
        raise ValueError("calibration needs at least one generated token, got none")
    return gate_class.fit(generations, share, **settings)
