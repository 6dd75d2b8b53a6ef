"""Cells: what is measured. A cell is one way to answer all prompts of a split; a shard is a cell on the prompts
of one objective, or some of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from benchmarks.spec.profile import digest

OBJECTIVES = ("harmlessness", "helpfulness", "honesty")
CALIBRATED = (
    "entropy",
    "inverted-entropy",
    "entropy-rise",
    "attention",
    "attention-rise",
    "position",
)  # gates whose threshold is found
ARGS, ROLLOUT, AUTOREGRESSIVE = "reward", "rollout", "autoregressive-reward"
SCORERS = {
    ARGS: "args",
    ROLLOUT: "transfer-q",
    AUTOREGRESSIVE: "genarm",
}  # what values candidates, besides value models → its method


@dataclass(frozen=True)
class Cell:
    """A cell as a figure asks for it, or (`thresholds`, `beta`) as it is measured.

    family, model: base, instruct, instruct-reward, or base-SIZE, base@WORLD. value_model: what values candidates: the kind of a value
    model, or one of SCORERS; empty where nothing steers. gate: never, every, random or one of CALIBRATED.
    target_ratio: share of tokens to steer. threshold: one that is asked for (τ, nats), the same for all objectives.
    thresholds: by objective, as found by calibration. beta: strength; tuned: the best on validation prompts instead.
    floor: base probability that candidates need on steered steps. search: best-of (of 1, 2, 4 … `responses`) or beams (`responses`
    at once), by the reward model. prompts: only so many of each objective; 0: all.
    """

    replicate: int
    family: str
    split: str = "test"
    model: str = "base"
    value_model: str = ""
    gate: str = "never"
    target_ratio: float = 0.0
    threshold: float | None = None
    thresholds: tuple[float, ...] = ()
    beta: float = 0.0
    tuned: bool = False
    floor: float = 0.0
    search: str = ""
    responses: int = 1
    prompts: int = 0

    @property
    def method(self) -> str:
        """The name it goes by in tables and figures."""
        if self.search == "beams":
            return "beams"
        if self.gate == "never":
            return self.model.partition("@")[0].removesuffix("-small").removesuffix("-large")
        if self.gate == "every":
            return SCORERS.get(self.value_model, "dense")
        return "sia" if self.gate == "entropy" else self.gate

    @property
    def calibrated(self) -> bool:
        """Whether its thresholds have to be found."""
        return self.gate in CALIBRATED and self.threshold is None

    @property
    def work(self) -> float:
        """How long a response takes, in about the time of a plain one."""
        rollouts = 30 if self.value_model == ROLLOUT else 1
        size = 2.5 if "large" in self.model + self.value_model else 1.0
        return (
            self.responses
            * size
            * (1 + (self.gate != "never") * rollouts * (0.7 + 3 * self.target_ratio))
        )


@dataclass(frozen=True)
class Shard:
    """prompts: numbers of those of the objective that it has; empty: all."""

    cell: Cell
    objective: str
    prompts: range = range(0)

    def key(self, *decisive: object) -> str:
        """Digest of everything that changes its numbers: the cell, the objective, its prompts, and what else is `decisive`."""
        cell = self.cell
        description = asdict(cell) | {"beta": "inf" if math.isinf(cell.beta) else cell.beta}
        description["thresholds"] = (
            cell.thresholds[OBJECTIVES.index(self.objective)] if cell.thresholds else None
        )
        part = [[self.prompts.start, self.prompts.stop]] if self.prompts else []
        return digest(decisive, description, self.objective, *part)
