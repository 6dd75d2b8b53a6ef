"""Cells: one way to respond to all prompts of a split, as figures request it and as it is measured.

A figure requests cells whose thresholds, and strength where it is tuned, are open
(`CellRequest`). Calibration resolves a request to a `Cell`, which is measured in shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple, Self

from benchmarks.spec.methods import method_of_scorer
from benchmarks.spec.model_kinds import BASE, JUNCTION, ModelKind
from benchmarks.spec.profile import digest

OBJECTIVES = ("harmlessness", "helpfulness", "honesty")
ROUNDS = 2 * len(OBJECTIVES)  # of timing; each is of one objective, and another one warms up
TIMED_PROMPTS = 32  # of a round, at most
LARGE_WORK = 2.5  # times the work of the usual size
DIVERGENCE = "divergence"  # the gate that asks the scorer at every step
# gates by what a scorer says, or is expected to say; responses under another one do not hold that
DIVERGENCE_GATES = (JUNCTION, DIVERGENCE)


@dataclass(frozen=True)
class Condition:
    """Settings that a requested and a measured cell have in common.

    Args:
        replicate: Number of the replicate.
        family: Family of models, as the profile names it.
        split: "test" or "validation".
        model: Language model that responds.
        scorer: What scores candidates: a value model, or the scorer of a baseline; None where
            nothing steers.
        gate: "never", "every", "junction" (its predictor is fitted to values by the scorer's loss),
            or the name of a gate in `sia.gates.GATES`.
        target_ratio: Share of tokens to steer.
        beta: Strength of steering.
        search: "best-of" (the best of 1, 2, 4, … `responses`) or "beams" (`responses` at once),
            by the reward model.
        responses: Responses among which a search chooses.
        prompts: Number of prompts of each objective; 0 for all.
    """

    replicate: int
    family: str
    split: str = "test"
    model: ModelKind = BASE
    scorer: ModelKind | None = None
    gate: str = "never"
    target_ratio: float = 0.0
    beta: float = 0.0
    search: str = ""
    responses: int = 1
    prompts: int = 0

    @property
    def method(self) -> str:
        """The identifier of the method in tables and figures."""
        if self.search == "beams":
            return "beams"
        scorer = method_of_scorer(self.scorer)
        if self.gate == "every":
            return scorer.name if scorer else "dense"
        if self.gate == JUNCTION and scorer:
            return f"{self.gate}-{scorer.name}"
        return {"never": self.model.name, "entropy": "sia"}.get(self.gate, self.gate)

    @property
    def predictor(self) -> ModelKind | None:
        """The kind of the junction gate's predictor; None where nothing predicts."""
        predicts = self.scorer is not None and self.gate in ("never", JUNCTION)
        return ModelKind(JUNCTION, self.scorer.loss) if predicts else None

    @property
    def work(self) -> float:
        """Approximate time per response, in units of a plain response."""
        sizes = (self.model.size, self.scorer.size if self.scorer else "")
        size = LARGE_WORK if "large" in sizes else 1.0
        baseline = method_of_scorer(self.scorer)
        scoring = baseline.scoring_work if baseline else 1.0
        scored_share = self.target_ratio if self.gate not in ("never", DIVERGENCE) else 1.0
        steering = scoring * (0.7 + 3 * scored_share) if self.scorer else 0.0
        return self.responses * size * (1 + steering)


@dataclass(frozen=True)
class CellRequest(Condition):
    """A cell as a figure requests it.

    Args:
        tau: Fixed threshold for all objectives; None where calibration chooses thresholds.
        tuned: Whether validation prompts choose β; `beta` is ignored then.
    """

    tau: float | None = None
    tuned: bool = False

    def resolve(self, beta: float, thresholds: Sequence[float] = ()) -> Cell:
        """Return the cell with this strength and these thresholds, or the requested one."""
        shared = {field.name: getattr(self, field.name) for field in fields(Condition)}
        fixed = () if self.tau is None else (self.tau,) * len(OBJECTIVES)
        return Cell(**shared | {"beta": beta}, thresholds=tuple(thresholds) or fixed)

    def labels(self) -> dict[str, object]:
        """Return the columns that identify this cell in tables, as they are requested."""
        return {
            "replicate": self.replicate,
            "family": self.family,
            "model": str(self.model),
            "value_model": str(self.scorer or ""),
            "method": self.method,
            "gate": self.gate,
            "target_ratio": self.target_ratio,
            "threshold": self.tau,
            "beta": self.beta,
            "tuned": self.tuned,
            "search": self.search,
        }


@dataclass(frozen=True)
class Cell(Condition):
    """A cell as it is measured.

    Args:
        thresholds: Setting of the gate for each objective; empty for gates without one.
    """

    thresholds: tuple[float, ...] = ()

    def threshold(self, objective: str) -> float | None:
        """Return the setting of the gate for an objective, if it has one."""
        return self.thresholds[OBJECTIVES.index(objective)] if self.thresholds else None


@dataclass(frozen=True)
class Shard:
    """A cell on the prompts of one objective, or on a range of them.

    Args:
        prompts: Indices within the prompts of the objective; an empty range means all.
    """

    cell: Cell
    objective: str
    prompts: range = range(0)

    def key(self, *decisive: object) -> str:
        """Return a digest of everything that changes its rows; `decisive`: what else does."""
        beta = "inf" if math.isinf(self.cell.beta) else self.cell.beta
        threshold = self.cell.threshold(self.objective)
        description = asdict(self.cell) | {"beta": beta, "thresholds": threshold}
        return digest(
            decisive, description, self.objective, [self.prompts.start, self.prompts.stop]
        )


class FigureCells(NamedTuple):
    """Cells that a figure needs.

    Args:
        cells: Requests whose rows (one per prompt and sample) are needed.
        traces: Requests whose tokens are needed (`benchmarks.engine.traces.trace_tokens`).
        rollouts: Requests whose candidates are rolled out (`…traces.rollout_values`).
        views: Requests whose candidates are shown (`…traces.candidate_table`).
        timed: Requests whose responses are timed in ROUNDS (`…engine.timing`).
    """

    cells: Sequence[CellRequest] = ()
    traces: Sequence[CellRequest] = ()
    rollouts: Sequence[CellRequest] = ()
    views: Sequence[CellRequest] = ()
    timed: Sequence[CellRequest] = ()

    @classmethod
    def union(cls, needs: Iterable[FigureCells]) -> Self:
        """Return what several figures or replicates need together."""
        needs = list(needs)
        return cls(*([cell for need in needs for cell in need[i]] for i in range(len(cls._fields))))

    @property
    def requests(self) -> list[CellRequest]:
        """All requests, of whichever measurement."""
        return [request for requests in self for request in requests]
