"""Cells: what is measured. A cell is one way to answer all prompts of a split; a shard is a cell under one sampling seed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from benchmarks.profile import digest

OBJECTIVES = ("harmlessness", "helpfulness", "honesty")
VALUE_LOSSES = {"value-mean": "mean", "value-token": "token"}  # value model → the loss it is trained by


@dataclass(frozen=True)
class Cell:
    """model: base, instruct or instruct-reward. value_model: value-mean or value-token, empty where nothing steers.
    gate: never, entropy, random or every. threshold: of the entropy gate, nats. target_ratio: share of tokens to steer.
    best_of: how many responses the reward model chooses from."""

    replicate: int
    family: str
    split: str
    model: str = "base"
    value_model: str = ""
    gate: str = "never"
    target_ratio: float = 0.0
    threshold: float | None = None
    beta: float = 0.0
    best_of: int = 1

    @property
    def method(self) -> str:
        """The name it goes by in tables and figures."""
        if self.gate != "never":
            return {"entropy": "sia", "random": "random", "every": "dense"}[self.gate]
        return "best-of-n" if self.best_of > 1 else self.model


@dataclass(frozen=True)
class Shard:
    cell: Cell
    seed: int

    def key(self, *decisive: object) -> str:
        """Digest of everything that changes its numbers: the cell, the seed, and what else is `decisive`."""
        description = asdict(self.cell) | {"beta": "inf" if math.isinf(self.cell.beta) else self.cell.beta}
        return digest(decisive, description, self.seed)

    @property
    def work(self) -> float:
        """How long it takes, in about the time of one plain response."""
        return self.cell.best_of * (1 + 3 * self.cell.target_ratio + (self.cell.gate != "never"))
