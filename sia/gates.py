"""Gates, which decide at each step whether to intervene.

A gate is a frozen dataclass without state, so that it is also its own description. Gates combine:
`a & b`, `a | b` and `~a`. The named ones are in `GATES`: the six gating strategies of figure 1 of
the paper (arXiv 2602.21215), dense steering and none. To add one, subclass `Gate` and name it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from sia import _sampling
from sia._checkpoints import read_checkpoint, refuse_other_content, write_checkpoint
from sia._model_identity import ModelIdentity
from sia._numbers import as_number, finite_number, whole_number
from sia.generation import Generation
from sia.junctions import JunctionPredictor
from sia.signals import Attention, Divergence, Entropy, PredictedDivergence, Signal

GATES: dict[str, "type[Gate]"] = {}
GATE_FILE = "junction_gate"


@dataclass(frozen=True)
class Step:
    """The view that a gate has of `rows` sequences at one decoding step.

    Attributes:
        index: Number of response tokens before this one.
        entropy: Entropy over the K candidates in nats, float32 `(rows,)`.
        logits: Logits of the whole vocabulary, float32 `(rows, vocabulary)`.
        keys: Keys of (seed, prompt, step) for noise of the gate's own, int64 `(rows,)`. This
            noise is independent of that of the candidates.
        signals: The signals that the gate asks for, float32 `(rows,)` each.
        previous: The same signals at the step before; NaN at the first step.
    """

    index: int
    entropy: Tensor
    logits: Tensor
    keys: Tensor
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    previous: Mapping[Signal, Tensor] = field(default_factory=dict)


class Gate(ABC):
    """Base class of gates. A subclass with a `name` is registered in `GATES`.

    Attributes:
        name: Identifier in tables and on command lines.
        label: Name in figures.
        calibrated: Whether `calibrate` can choose the setting.
        setting: Name of the field that says how far the gate opens.
    """

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""
    calibrated: ClassVar[bool] = False
    setting: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" in vars(cls):
            GATES[cls.name] = cls

    @classmethod
    def from_setting(cls, value: float) -> Self:
        """Build a gate from the value of its `setting`; classes without a setting ignore it."""
        return cls(**{cls.setting: value}) if cls.setting else cls()

    @classmethod
    def fit(cls, generations: Sequence[Generation], ratio: float, **settings: Any) -> Self:
        """Build the gate whose setting opens it on `ratio` of the tokens, for `calibrate`."""
        raise NotImplementedError(f"{cls.__name__} has no setting to calibrate")

    @property
    def setting_value(self) -> float:
        """Value of the field that `setting` names."""
        return float(vars(self)[self.setting])

    @property
    def signals(self) -> frozenset[Signal]:
        """The signals that decoding must compute at every step for this gate."""
        return frozenset()

    @abstractmethod
    def opens(self, step: Step) -> Tensor:
        """Return for each row whether to intervene, bool `(rows,)`."""

    def __and__(self, other: "Gate") -> "Gate":
        return Both(self, other) if isinstance(other, Gate) else NotImplemented

    def __or__(self, other: "Gate") -> "Gate":
        return Either(self, other) if isinstance(other, Gate) else NotImplemented

    def __invert__(self) -> "Gate":
        return Not(self)


@dataclass(frozen=True)
class Pair(Gate):
    """Base class of combinations of two gates."""

    first: Gate
    second: Gate

    @property
    @override
    def signals(self) -> frozenset[Signal]:
        return self.first.signals | self.second.signals


class Both(Pair):
    """Open where both gates open: `first & second`."""

    @override
    def opens(self, step: Step) -> Tensor:
        return self.first.opens(step) & self.second.opens(step)


class Either(Pair):
    """Open where at least one of two gates opens: `first | second`."""

    @override
    def opens(self, step: Step) -> Tensor:
        return self.first.opens(step) | self.second.opens(step)


@dataclass(frozen=True)
class Not(Gate):
    """Open where the gate does not open: `~gate`."""

    gate: Gate

    @property
    @override
    def signals(self) -> frozenset[Signal]:
        return self.gate.signals

    @override
    def opens(self, step: Step) -> Tensor:
        return ~self.gate.opens(step)


class UnreachableRatio(ValueError):
    """No threshold opens a gate on so many tokens.

    Attributes:
        most: Largest share that one opens it on.
    """

    most = 0.0


@dataclass(frozen=True)
class ThresholdGate(Gate):
    """Base class of gates that open where a signal, or its rise, is at least `threshold`."""

    calibrated = True
    setting = "threshold"
    minimum: ClassVar[float] = 0.0  # the smallest threshold that makes sense

    threshold: float

    def __post_init__(self) -> None:
        threshold = finite_number("threshold", self.threshold, self.minimum)
        object.__setattr__(self, "threshold", threshold)
        hash(self.signal)  # the signal checks its own settings

    @property
    @abstractmethod
    def signal(self) -> Signal:
        """The signal that is compared with the threshold."""

    @property
    @override
    def signals(self) -> frozenset[Signal]:
        return frozenset([self.signal])

    def level(self, current: Tensor, previous: Tensor) -> Tensor:
        """Return the quantity to compare, given the signal at this step and the one before."""
        return current

    @override
    def opens(self, step: Step) -> Tensor:
        level = self.level(step.signals[self.signal], step.previous[self.signal])
        return level >= self.threshold

    @classmethod
    @override
    def fit(cls, generations: Sequence[Generation], ratio: float, **settings: Any) -> Self:
        """Choose the largest threshold that opens on at least `ratio` of the tokens."""
        gate = cls(threshold=0.0, **settings)
        levels = []
        for generation in generations:
            current = torch.from_numpy(generation.signal(gate.signal))
            previous = torch.cat([current.new_full((1,), math.nan), current])[:-1]
            levels.append(gate.level(current, previous))
        # without a level (a rise at the first token) the gate stays closed
        level = torch.cat(levels).nan_to_num(nan=-math.inf, neginf=-math.inf)
        level = level.sort(descending=True).values
        opened = max(1, math.ceil(ratio * len(level) - 1e-9))
        threshold = float(level[opened - 1])
        if math.isinf(threshold):
            most = int(level.isfinite().sum()) / len(level)
            error = UnreachableRatio(
                f"no threshold opens {cls.__name__} on {ratio:.0%} of these tokens, "
                f"the most it can be is {most:.1%}"
            )
            error.most = most  # set so, an error can be sent to another process
            raise error
        return replace(gate, threshold=threshold)


@dataclass(frozen=True)
class EntropyGate(ThresholdGate):
    """Open where the base model's entropy is at least `threshold` nats (τ): H(s) ≥ τ."""

    name = "entropy"
    label = "entropy"

    over: Literal["candidates", "vocabulary"] = "candidates"

    @property
    @override
    def signal(self) -> Entropy:
        return Entropy(self.over)


@dataclass(frozen=True)
class EntropyRiseGate(EntropyGate):
    """Open where entropy rises from the step before: ln(H_t / H_{t−1}) ≥ `threshold`.

    Closed at the first step, which has none before it.
    """

    name = "entropy-rise"
    label = "entropy rise"
    minimum = -math.inf

    @override
    def level(self, current: Tensor, previous: Tensor) -> Tensor:
        return (current / previous).log()


@dataclass(frozen=True)
class AttentionGate(ThresholdGate):
    """Open where the newest token looks back far: its attention signal is at least `threshold`.

    Attributes:
        threshold: Mean distance in tokens to which it looks, 0 to 10 (farther counts as 10).
        layers: Layers to average over, numbered from 0; None for all.
        heads: Heads to average over, numbered from 0; None for all.
    """

    name = "attention"
    label = "attention"

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    @property
    @override
    def signal(self) -> Attention:
        return Attention(self.layers, self.heads)


@dataclass(frozen=True)
class AttentionRiseGate(AttentionGate):
    """Open where attention rises: its ratio to the step before is at least `threshold`.

    Closed at the first step.
    """

    name = "attention-rise"
    label = "attention rise"

    @override
    def level(self, current: Tensor, previous: Tensor) -> Tensor:
        return current / previous


@dataclass(frozen=True)
class DivergenceGate(ThresholdGate):
    """Open where the divergence KL(π‖π*) of the tilt is at least `threshold` nats: the oracle.

    It asks the scorer at every step, and so costs as much as dense steering: for analysis.
    """

    name = "divergence"
    label = "divergence (oracle)"

    @property
    @override
    def signal(self) -> Divergence:
        return Divergence()


@dataclass(frozen=True)
class JunctionGate(ThresholdGate):
    """Open where a predictor expects a divergence KL(π‖π*) of at least `threshold` nats.

    `sia.fit_junction_gate` fits the predictor to a language model and a scorer.

    Attributes:
        threshold: In nats.
        predictor: Reads the hidden states of one language model; others are refused.
    """

    predictor: JunctionPredictor

    @property
    @override
    def signal(self) -> PredictedDivergence:
        return PredictedDivergence(self.predictor)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the gate into a folder: weights (safetensors), threshold and model (JSON)."""
        settings = {"threshold": self.threshold, "model": asdict(self.predictor.model)}
        write_checkpoint(path, GATE_FILE, self.predictor.weights, settings)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, subfolder: str = "", revision: str | None = None
    ) -> Self:
        """Read what `save_pretrained` wrote.

        Args:
            path: Local folder or Hub id.
            subfolder: Folder within `path`.
            revision: Revision of the Hub repository.

        Raises:
            FileNotFoundError: If there is no such folder or a file is missing.
            ValueError: If a file is damaged or of other content.
        """
        weights, settings = read_checkpoint(path, GATE_FILE, subfolder, revision)
        with refuse_other_content(path, GATE_FILE):
            model = ModelIdentity.from_settings(**settings["model"])
            return cls(settings["threshold"], JunctionPredictor.from_weights(weights, model))


@dataclass(frozen=True)
class PositionGate(Gate):
    """Open at the first `tokens` tokens of the response."""

    name = "position"
    label = "first tokens"
    calibrated = True
    setting = "tokens"

    tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", whole_number("tokens", self.tokens, 0))

    @classmethod
    @override
    def from_setting(cls, value: float) -> Self:
        tokens = int(value) if as_number(value) % 1 == 0 else value
        return cls(whole_number("tokens", tokens, 0))

    @classmethod
    @override
    def fit(cls, generations: Sequence[Generation], ratio: float, **settings: Any) -> Self:
        """Choose the number of tokens whose share of all tokens comes closest to `ratio`."""
        lengths = np.array([len(generation.token_ids) for generation in generations])
        steered = [np.minimum(tokens, lengths).sum() for tokens in range(lengths.max() + 1)]
        shares = np.array(steered) / lengths.sum()
        return cls(int(np.abs(shares - ratio).argmin()), **settings)

    @override
    def opens(self, step: Step) -> Tensor:
        return torch.full_like(step.keys, step.index < self.tokens, dtype=torch.bool)


@dataclass(frozen=True)
class RandomGate(Gate):
    """Open with probability `ratio` at every token.

    Attributes:
        ratio: Probability from 0 to 1.
        seed: Key of the gate's noise, together with the prompt, its seed and the step.
    """

    name = "random"
    label = "random gate"
    setting = "ratio"

    ratio: float
    seed: int = 0

    def __post_init__(self) -> None:
        ratio = as_number(self.ratio)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must lie between 0 and 1, got {self.ratio!r}")
        object.__setattr__(self, "ratio", ratio)
        object.__setattr__(self, "seed", whole_number("seed", self.seed))

    @override
    def opens(self, step: Step) -> Tensor:
        return _sampling.uniform(_sampling.mix(step.keys, self.seed)) < self.ratio


@dataclass(frozen=True)
class EveryToken(Gate):
    """Open at every token: dense steering."""

    name = "every"
    label = "every token"

    @override
    def opens(self, step: Step) -> Tensor:
        return torch.ones_like(step.keys, dtype=torch.bool)


@dataclass(frozen=True)
class Never(Gate):
    """Never open: plain decoding from the K candidates."""

    name = "never"
    label = "never"

    @override
    def opens(self, step: Step) -> Tensor:
        return torch.zeros_like(step.keys, dtype=torch.bool)
