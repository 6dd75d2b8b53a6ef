"""The signals that a gate may look at, one number per step: entropy, attention and divergence."""

from dataclasses import dataclass
from typing import Literal

from sia._numbers import python_value, whole_number
from sia.junctions import JunctionPredictor


@dataclass(frozen=True)
class Entropy:
    """Entropy H(s) of the next token, in nats.

    Attributes:
        over: "candidates" for the K candidates of the steering (at most ln K), or "vocabulary".
    """

    over: Literal["candidates", "vocabulary"] = "candidates"

    def __post_init__(self) -> None:
        if self.over not in ("candidates", "vocabulary"):
            raise ValueError(f'over must be "candidates" or "vocabulary", got {self.over!r}')


@dataclass(frozen=True)
class Attention:
    """Attention of the newest token, weighted by distance (definition in `sia._attention`).

    Attributes:
        layers: Layers to average over, numbered from 0; None for all.
        heads: Heads to average over, numbered from 0; None for all.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, numbers in (("layers", self.layers), ("heads", self.heads)):
            if numbers is None:
                continue
            listed = python_value(numbers)
            listed = (listed,) if isinstance(listed, int) else listed
            numbers = tuple(whole_number(f"each of the {name}", number) for number in listed)
            object.__setattr__(self, name, numbers)  # a list is as good, but has no hash
            if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
                raise ValueError(
                    f"{name} must be different numbers from 0, at least one, or None for all, "
                    f"got {numbers}"
                )


@dataclass(frozen=True)
class Divergence:
    """KL(π‖π*) over the candidates in nats: what leaving the step unsteered costs, times β.

    The scorer is asked at every step (Lemma 2.1 of the paper).
    """


@dataclass(frozen=True)
class PredictedDivergence:
    """KL(π‖π*) in nats as predicted from the language model's hidden state.

    Attributes:
        predictor: Fitted to this language model.
    """

    predictor: JunctionPredictor


Signal = Entropy | Attention | Divergence | PredictedDivergence
