"""Calibration: thresholds and strengths that requests leave open, from validation prompts.

1. Unsteered responses give initial thresholds.
2. Responses steered with these show the two best β.
3. Of these two, thresholds are calibrated again on the steered responses where the ratio of an
   objective is far from its target, for steering changes what follows.
4. The better β after that is chosen, and its thresholds from what both runs did.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from benchmarks.engine.gates import is_calibrated
from benchmarks.spec.cells import (
    DIVERGENCE,
    DIVERGENCE_GATES,
    OBJECTIVES,
    Cell,
    CellRequest,
    Shard,
)
from benchmarks.spec.profile import Profile

RATIO_TOLERANCE = 0.02  # difference of a ratio from its target up to which a threshold is kept


def needs_thresholds(request: CellRequest) -> bool:
    """Return whether calibration has to choose the thresholds of a request."""
    return is_calibrated(request.gate) and request.tau is None


def unsteered(cell: Cell | CellRequest) -> Cell:
    """Return the validation cell whose responses give initial thresholds.

    It keeps the scorer for gates by divergences, and its β for that of this very β; predictors are
    fitted at β = 1.
    """
    plain = Cell(cell.replicate, cell.family, "validation", cell.model)
    if cell.gate not in DIVERGENCE_GATES:
        return plain
    return replace(plain, scorer=cell.scorer, beta=cell.beta if cell.gate == DIVERGENCE else 1.0)


def choose_threshold(
    target: float, thresholds: Sequence[float], ratios: Sequence[float], following: float
) -> float:
    """Choose a threshold from two runs with their realised ratios.

    Returns:
        The threshold whose ratio is close to the target; else one interpolated between both if
        the target lies between their ratios; else `following`, that of the second run's signals.
    """
    distances = [abs(ratio - target) for ratio in ratios]
    if min(distances) <= RATIO_TOLERANCE:
        return thresholds[distances.index(min(distances))]
    if min(ratios) < target < max(ratios):
        (low, at_low), (high, at_high) = sorted(zip(ratios, thresholds, strict=True))
        return at_low + (at_high - at_low) * (target - low) / (high - low)
    return following


@dataclass(frozen=True)
class Calibrator:
    """Resolves requests by the rows of their validation cells.

    Args:
        read: Rows of a validation shard; their `attrs` hold the thresholds that its responses
            give, by gate and target ratio.
    """

    profile: Profile
    read: Callable[[Shard], pd.DataFrame]

    def validation_requests(self, request: CellRequest) -> list[CellRequest]:
        """Return the steered validation requests that decide on this one, one for each β."""
        if request.gate == "never" or not (needs_thresholds(request) or request.tuned):
            return []
        betas = self.profile.sweep.tuning if request.tuned else [request.beta]
        # a search is calibrated without searching
        plain = replace(request, split="validation", tuned=False, search="", responses=1)
        return [replace(plain, beta=beta) for beta in betas]

    def stages(self, requests: Iterable[CellRequest]) -> tuple[list[Cell], list[CellRequest]]:
        """Return unsteered validation cells and steered validation requests, each once."""
        steered = [v for request in requests for v in self.validation_requests(request)]
        steered = list(dict.fromkeys(steered))
        first = dict.fromkeys(unsteered(v) for v in steered if needs_thresholds(v))
        return list(first), steered

    def initial_cell(self, request: CellRequest) -> Cell:
        """Return the validation cell of a request, its thresholds from unsteered responses."""
        if not needs_thresholds(request):
            return request.resolve(request.beta)
        measured = self._measured_thresholds(unsteered(request), request)
        return request.resolve(request.beta, measured)

    def recalibrated(self, cell: Cell) -> Cell:
        """Return a measured validation cell with new thresholds where its ratio is off target."""
        if not is_calibrated(cell.gate):
            return cell
        measured = self._measured_thresholds(cell, cell)
        runs = zip(cell.thresholds, measured, self.ratios(cell), strict=True)
        thresholds = tuple(
            new if abs(ratio - cell.target_ratio) > RATIO_TOLERANCE else old
            for old, new, ratio in runs
        )
        return replace(cell, thresholds=thresholds)

    def best_two_betas(self, request: CellRequest) -> list[Cell]:
        """Return the measured validation cells of the two β that score best, the best first.

        New thresholds move scores too little to bring up another: of the 36 tuned cells of a lab
        replicate none was chosen otherwise.
        """
        cells = [self.initial_cell(v) for v in self.validation_requests(request)]
        return sorted(cells, key=self.score, reverse=True)[:2]

    def resolve(self, request: CellRequest) -> Cell:
        """Return the cell to measure, once its validation cells have been measured."""
        candidates = self.best_two_betas(request)
        if not candidates:
            return request.resolve(request.beta)
        best = max(candidates, key=lambda cell: self.score(self.recalibrated(cell)))
        if not needs_thresholds(request):
            return request.resolve(best.beta)
        again = self.recalibrated(best)
        following = self._measured_thresholds(again, again)
        thresholds = zip(best.thresholds, again.thresholds, strict=True)
        ratios = zip(self.ratios(best), self.ratios(again), strict=True)
        chosen = [
            choose_threshold(request.target_ratio, *run)
            for run in zip(thresholds, ratios, following, strict=True)
        ]
        whole = request.gate == "position"  # its setting is a number of tokens
        return request.resolve(best.beta, [round(t) if whole else t for t in chosen])

    def ratios(self, cell: Cell) -> list[float]:
        """Return the share of steered tokens of a measured validation cell by objective."""
        frames = [self.read(Shard(cell, objective)) for objective in OBJECTIVES]
        return [float(rows["steered"].sum() / rows["tokens"].sum()) for rows in frames]

    def score(self, cell: Cell) -> float:
        """Return the profile's score of a measured validation cell, summed over objectives."""
        frames = [self.read(Shard(cell, objective)) for objective in OBJECTIVES]
        return sum(rows[self.profile.score].mean() for rows in frames)

    def _measured_thresholds(self, source: Cell, target: Cell | CellRequest) -> list[float]:
        """Return the thresholds that the responses of `source` give, by objective."""
        frames = [self.read(Shard(source, objective)) for objective in OBJECTIVES]
        name, ratio = target.gate, str(target.target_ratio)
        return [rows.attrs["thresholds"][name][ratio] for rows in frames]
