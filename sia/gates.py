"""When to intervene. A gate sees one `Step` of the rows being decoded and says for each row whether it opens.

Gates are frozen dataclasses without state, so that a gate is also its own description; `a & b` opens where both do, `~a` where
`a` does not. Four of them compare a signal of the step with a threshold, which `calibrate` can pick. Definitions: the six gating
strategies of figure 1 of the paper (arXiv 2602.21215).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from sia import _sampling
from sia._attention import Attention

if TYPE_CHECKING:
    from sia.generation import Generation


@dataclass(frozen=True)
class Entropy:
    """The signal H(s) in nats, over the K candidates of the steering (at most ln K) or over the whole vocabulary."""

    over: Literal["candidates", "vocabulary"] = "candidates"

    def __post_init__(self) -> None:
        if self.over not in ("candidates", "vocabulary"):
            raise ValueError(f'over must be "candidates" or "vocabulary", got {self.over!r}')


Signal = Entropy | Attention


@dataclass(frozen=True)
class Step:
    """What a gate may look at: `rows` sequences at one decoding step.

    number: how many response tokens come before this one.
    entropy: nats over the K candidates, float32 `(rows,)`.
    logits: of the whole vocabulary, float32 `(rows, vocabulary)`.
    keys: int64 `(rows,)`, keys of (seed, prompt, step) for a gate's own noise, which meets that of no candidate.
    signals: those that the gate asks for, float32 `(rows,)` each; last: the same at the step before, NaN at the first.
    """

    number: int
    entropy: Tensor
    logits: Tensor
    keys: Tensor
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    last: Mapping[Signal, Tensor] = field(default_factory=dict)


class Gate:
    """Base of all gates: `opens(step)` → bool `(rows,)`. `signals` names what the steps must offer."""

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset()

    def opens(self, step: Step) -> Tensor:
        raise NotImplementedError

    def __and__(self, other: Gate) -> Gate:
        return Both(self, other) if isinstance(other, Gate) else NotImplemented

    def __invert__(self) -> Gate:
        return Not(self)


@dataclass(frozen=True)
class Both(Gate):
    """Opens where both gates do: `first & second`."""

    first: Gate
    second: Gate

    @property
    def signals(self) -> frozenset[Signal]:
        return self.first.signals | self.second.signals

    def opens(self, step: Step) -> Tensor:
        return self.first.opens(step) & self.second.opens(step)


@dataclass(frozen=True)
class Not(Gate):
    """Opens where the gate does not: `~gate`."""

    gate: Gate

    @property
    def signals(self) -> frozenset[Signal]:
        return self.gate.signals

    def opens(self, step: Step) -> Tensor:
        return ~self.gate.opens(step)


@dataclass(frozen=True)
class ThresholdGate(Gate):
    """Opens where the level of a signal is at least `threshold`."""

    threshold: float
    lowest: ClassVar[float] = 0.0  # threshold that makes sense

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not (number and math.isfinite(self.threshold) and self.threshold >= self.lowest):
            least = "" if math.isinf(self.lowest) else f" of at least {self.lowest:g}"
            raise ValueError(f"threshold must be a finite number{least}, got {self.threshold!r}")
        hash(self.signal)  # the signal checks its own settings

    @property
    def signal(self) -> Signal:
        raise NotImplementedError

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset([self.signal])

    def level(self, now: Tensor, last: Tensor) -> Tensor:
        """What is compared with the threshold, from the signal at this step and at the one before."""
        return now

    def opens(self, step: Step) -> Tensor:
        return self.level(step.signals[self.signal], step.last[self.signal]) >= self.threshold


@dataclass(frozen=True)
class EntropyGate(ThresholdGate):
    """Opens where the base model's entropy is at least `threshold` nats (τ): H(s) ≥ τ."""

    over: Literal["candidates", "vocabulary"] = "candidates"

    @property
    def signal(self) -> Entropy:
        return Entropy(self.over)


@dataclass(frozen=True)
class EntropyRiseGate(ThresholdGate):
    """Opens where the log of the ratio of this step's entropy to the last one's is at least `threshold`: ln(H_t / H_{t−1}).

    Closed at the first step, which has none before it.
    """

    over: Literal["candidates", "vocabulary"] = "candidates"
    lowest: ClassVar[float] = -math.inf

    @property
    def signal(self) -> Entropy:
        return Entropy(self.over)

    def level(self, now: Tensor, last: Tensor) -> Tensor:
        return (now / last).log()


@dataclass(frozen=True)
class AttentionGate(ThresholdGate):
    """Opens where the newest token's attention, weighted by distance, is at least `threshold` (0 to 10).

    layers, heads: whose attention is averaged, by number; None: all. See `sia._attention`.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    @property
    def signal(self) -> Attention:
        return Attention(self.layers, self.heads)


@dataclass(frozen=True)
class AttentionRiseGate(AttentionGate):
    """Opens where the ratio of that attention to the last step's is at least `threshold`. Closed at the first step."""

    def level(self, now: Tensor, last: Tensor) -> Tensor:
        return now / last


@dataclass(frozen=True)
class PositionGate(Gate):
    """Open for the first `tokens` tokens of the response."""

    tokens: int

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 0:
            raise ValueError(f"tokens must be a whole number of at least 0, got {self.tokens!r}")

    def opens(self, step: Step) -> Tensor:
        return torch.full_like(step.keys, step.number < self.tokens, dtype=torch.bool)


@dataclass(frozen=True)
class RandomGate(Gate):
    """Opens with probability `ratio` at every token, by noise keyed with `seed`, the prompt and the step."""

    ratio: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, (int, float)) or not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio!r}")

    def opens(self, step: Step) -> Tensor:
        return _sampling.uniform(_sampling.mix(step.keys, self.seed)) < self.ratio


@dataclass(frozen=True)
class EveryToken(Gate):
    """Always open: dense steering."""

    def opens(self, step: Step) -> Tensor:
        return torch.ones_like(step.keys, dtype=torch.bool)


@dataclass(frozen=True)
class Never(Gate):
    """Always closed: plain decoding from the top K candidates."""

    def opens(self, step: Step) -> Tensor:
        return torch.zeros_like(step.keys, dtype=torch.bool)


THRESHOLD_GATES: dict[str, type[ThresholdGate]] = {
    "entropy": EntropyGate,
    "entropy-rise": EntropyRiseGate,
    "attention": AttentionGate,
    "attention-rise": AttentionRiseGate,
}
GateT = TypeVar("GateT", bound=ThresholdGate)


def calibrate(
    gate_class: type[GateT], generations: Sequence[Generation], ratio: float, **settings
) -> GateT:
    """A gate whose threshold opens it on `ratio` of the tokens of `generations`.

    settings: of the gate besides its threshold (`over`, or `layers` and `heads`). Attention, and the entropy over the
    vocabulary, are in the generations if they were made with such a gate, or with `observe=[signal]`.
    The threshold is the largest at which at least that share of the tokens is steered. Steering changes what
    follows: for a realised ratio close to the target, calibrate on generations that were steered.
    """
    if (
        not isinstance(gate_class, type)
        or not issubclass(gate_class, ThresholdGate)
        or gate_class is ThresholdGate
    ):
        kinds = ", ".join(kind.__name__ for kind in THRESHOLD_GATES.values())
        raise TypeError(
            f"only a gate with a threshold can be calibrated ({kinds}), got {gate_class!r}"
        )
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be greater than 0 and at most 1, got {ratio}")
    if not isinstance(generations, Sequence):
        raise TypeError(f"generations must be a list of them, got {type(generations).__name__}")
    gate = gate_class(threshold=0.0, **settings)
    levels = []
    for generation in generations:
        now = torch.from_numpy(generation.signal(gate.signal))
        levels.append(gate.level(now, torch.cat([now.new_full((1,), math.nan), now])[:-1]))
    level = torch.cat([*levels, torch.empty(0)])
    if len(level) == 0:
        raise ValueError("calibration needs at least one generated token, got none")
    # where there is no level (a rise at the first token) the gate stays closed
    level = level.nan_to_num(nan=-math.inf, neginf=-math.inf).sort(descending=True).values
    threshold = float(level[math.ceil(ratio * len(level) - 1e-9) - 1])
    if math.isinf(threshold):
        most = float(level.isfinite().float().mean())
        raise ValueError(
            f"no threshold opens {gate_class.__name__} on {ratio:.0%} of these tokens, the most it can be is {most:.1%}"
        )
    return replace(gate, threshold=threshold)
