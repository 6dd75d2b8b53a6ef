"""Running cells: what is not in the store yet is measured in worker processes and kept, shard by shard.

Figures ask for cells whose thresholds, and strength where it is tuned, are open. Unsteered validation generations give first
thresholds. Steered validation generations show the two best β, correct their thresholds where the realised ratio of an objective is far
from its target (for steering changes what follows), once more from what the corrected ones did, and choose the best β. Then the test
cells are measured. A killed run loses the shards in hand; started again it goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from benchmarks.engine.measure import measure, subject_of
from benchmarks.engine.timing import time_cells
from benchmarks.engine.traces import probe, trace, view
from benchmarks.runtime import workers
from benchmarks.runtime.files import CACHE, read_cell, write_cell
from benchmarks.runtime.fingerprints import row_code
from benchmarks.spec.cells import OBJECTIVES, ROLLOUT, Cell, Shard
from benchmarks.spec.profile import Profile

if TYPE_CHECKING:
    from benchmarks.runtime.ray_workers import RayWorkers

MEASURES: dict[str, Callable[..., pd.DataFrame]] = {
    "rows": measure,
    "trace": trace,
    "probe": probe,
    "view": view,
}
VIEWED = 4  # prompts of each objective that views show
FAR = 0.02  # a realised ratio that is further from its target has its threshold corrected
LABELS = (
    "replicate",
    "family",
    "model",
    "value_model",
    "method",
    "gate",
    "target_ratio",
    "threshold",
    "beta",
    "tuned",
    "floor",
    "search",
)


@dataclass(frozen=True)
class Results:
    """The store of one profile's cells, and the workers that fill it. since: cells older than this are measured again."""

    profile: Profile
    workers: workers.Workers | RayWorkers | None
    since: float = 0.0

    @cached_property
    def _frames(self) -> dict[Path, pd.DataFrame]:
        return {}  # validation shards that were read: many cells look at them

    def path(self, shard: Shard, what: str = "rows") -> Path:
        evaluation, sweep = self.profile.evaluation, self.profile.sweep
        validation = shard.cell.split == "validation"
        # the number of samples (of searches: which noise is whose), and what is kept with a validation shard or is set in the sweep
        decisive = [
            evaluation.validation_samples if validation else evaluation.samples,
            sweep.ratios if validation else (),
        ]
        decisive += [(sweep.beam_width, sweep.chunk)] if shard.cell.search == "beams" else []
        decisive += [sweep.rollout_tokens] if shard.cell.value_model == ROLLOUT else []
        decisive += [sweep.probes, sweep.probe_rollouts] if what == "probe" else []
        key = shard.key(
            what,
            subject_of(self.profile, shard.cell.replicate).digest_of(shard.cell),
            row_code(self.profile),
            *decisive,
        )
        return CACHE / self.profile.name / "cells" / key[:2] / f"{key}.cell"

    def has(self, shard: Shard, what: str = "rows") -> bool:
        path = self.path(shard, what)
        return path.exists() and path.stat().st_mtime >= self.since

    def rows(self, cell: Cell, what: str = "rows") -> pd.DataFrame:
        """What was measured of a settled cell, one row per prompt and sample (of traces and probes: see there)."""
        return pd.concat(
            [read_cell(self.path(shard, what)) for shard in self.shards(cell, what)],
            ignore_index=True,
        )

    def shards(self, cell: Cell, what: str = "rows") -> list[Shard]:
        """The parts in which a cell is measured: by objective and, in Hub profiles, by ranges of its test prompts; of views the first
        prompts alone."""
        if what == "view":
            return [
                Shard(
                    cell,
                    objective,
                    range(min(VIEWED, self.profile.evaluation.prompts_per_objective)),
                )
                for objective in OBJECTIVES
            ]
        size = self.profile.prompts_per_shard
        if size is None or cell.split == "validation":
            return [Shard(cell, objective) for objective in OBJECTIVES]
        count = cell.prompts or self.profile.evaluation.prompts_per_objective
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
        return [Shard(cell, objective, part) for objective in OBJECTIVES for part in parts]

    def complete(self, cells: Iterable[Cell], description: str, what: str = "rows") -> None:
        """Measures the shards that are missing."""
        shards = [shard for cell in dict.fromkeys(cells) for shard in self.shards(cell, what)]
        shards.sort(
            key=lambda shard: -shard.cell.work
        )  # the longest first, so that the workers end together
        missing = [shard for shard in shards if not self.has(shard, what)]
        tasks = [(what, self.profile, shard) for shard in missing]
        self.workers.run(_measure, tasks, description=description, keep=self._keep)

    def _keep(self, task: tuple[str, Profile, Shard], rows: pd.DataFrame) -> None:
        what, _, shard = task
        write_cell(self.path(shard, what), rows)

    # --- settling what is open

    def unsteered(self, cell: Cell) -> Cell:
        """The validation cell that gives first thresholds."""
        return Cell(cell.replicate, cell.family, "validation", cell.model)

    def validations(self, cell: Cell) -> list[Cell]:
        """The steered validation cells, thresholds open, that decide about this one: one for each β to choose from."""
        if cell.gate == "never" or not (cell.calibrated or cell.tuned):
            return []
        betas = self.profile.sweep.tuning if cell.tuned else [cell.beta]
        # a search is tuned, and its thresholds found, without searching
        plain = replace(cell, split="validation", tuned=False, search="", responses=1)
        return [replace(plain, beta=beta) for beta in betas]

    def first(self, cell: Cell) -> Cell:
        """A validation cell with thresholds from unsteered generations."""
        return self._with_thresholds(cell, self.unsteered(cell))

    def corrected(self, cell: Cell) -> Cell:
        """A measured validation cell with new thresholds for the objectives whose realised ratio was far from the target."""
        if not cell.calibrated:
            return cell
        old = zip(
            OBJECTIVES, cell.thresholds, self._with_thresholds(cell, cell).thresholds, strict=True
        )
        ratios = [self._ratio(Shard(cell, objective)) for objective in OBJECTIVES]
        far = [abs(ratio - cell.target_ratio) > FAR for ratio in ratios]
        return replace(
            cell,
            thresholds=tuple(
                new if wrong else same for wrong, (_, same, new) in zip(far, old, strict=True)
            ),
        )

    def promising(self, cell: Cell) -> list[Cell]:
        """Its measured validation cells; of several the two whose β scored best, the best first. Correcting thresholds moves scores too
        little to bring up another: of the 36 tuned cells of a lab replicate none was chosen otherwise."""
        return sorted(
            (self.first(one) for one in self.validations(cell)), key=self._score, reverse=True
        )[:2]

    def settled(self, cell: Cell) -> Cell:
        """The cell as it is measured, once its validation cells are there."""
        tried = self.promising(cell)
        if not tried:
            return cell
        best = max(tried, key=lambda one: self._score(self.corrected(one)))
        settled = replace(cell, tuned=False, beta=best.beta)
        if not cell.calibrated:
            return settled
        corrected = self.corrected(best)
        following = self._with_thresholds(corrected, corrected).thresholds
        runs = zip(
            *(
                (one.thresholds, [self._ratio(Shard(one, o)) for o in OBJECTIVES])
                for one in (best, corrected)
            ),
            strict=True,
        )
        thresholds, ratios = (list(zip(*pair, strict=True)) for pair in runs)
        chosen = (
            settle(cell.target_ratio, *each)
            for each in zip(thresholds, ratios, following, strict=True)
        )
        return replace(
            settled, thresholds=tuple(round(t) if cell.gate == "position" else t for t in chosen)
        )

    def _ratio(self, shard: Shard) -> float:
        rows = self._read(shard)
        return float(rows["steered"].sum() / rows["tokens"].sum())

    def _score(self, cell: Cell) -> float:
        return sum(
            self._read(Shard(cell, objective))[self.profile.score].mean()
            for objective in OBJECTIVES
        )

    def _with_thresholds(self, cell: Cell, source: Cell) -> Cell:
        if not cell.calibrated:
            return cell
        found = [
            self._read(Shard(source, objective)).attrs["thresholds"] for objective in OBJECTIVES
        ]
        return replace(
            cell, thresholds=tuple(of[cell.gate][str(cell.target_ratio)] for of in found)
        )

    def _read(self, shard: Shard) -> pd.DataFrame:
        path = self.path(shard)
        if path not in self._frames:
            self._frames[path] = read_cell(path)
        return self._frames[path]

    # --- all together

    def stages(self, cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
        """Unsteered and (open) steered validation cells of these test cells."""
        steered = list(
            dict.fromkeys(validation for cell in cells for validation in self.validations(cell))
        )
        return list(
            dict.fromkeys(self.unsteered(cell) for cell in steered if cell.calibrated)
        ), steered

    def work(
        self,
        cells: Sequence[Cell],
        traces: Sequence[Cell] = (),
        probes: Sequence[Cell] = (),
        views: Sequence[Cell] = (),
    ) -> float:
        """About how many seconds of one core it takes to measure these test cells. What is open is counted as missing."""
        evaluation = self.profile.evaluation
        unsteered, steered = self.stages([*cells, *traces, *probes, *views])
        sweep = self.profile.sweep
        validation = evaluation.validation_prompts_per_objective * evaluation.validation_samples
        twice = 1.4  # about two fifths of the thresholds are corrected
        total = sum(cell.work * len(OBJECTIVES) * validation for cell in unsteered)
        total += sum(
            cell.work
            * len(OBJECTIVES)
            * (cell.prompts * evaluation.validation_samples or validation)
            * (twice if cell.calibrated else 1)
            for cell in steered
        )
        for cell in dict.fromkeys([*cells, *traces]):
            prompts = cell.prompts or evaluation.prompts_per_objective
            total += cell.work * len(OBJECTIVES) * prompts * evaluation.samples
        total += (
            len(probes)
            * len(OBJECTIVES)
            * sweep.probes
            * self.profile.decoding.candidates
            * sweep.probe_rollouts
        )
        return total / workers.RESPONSES_PER_SECOND

    def measure(
        self,
        cells: Sequence[Cell],
        traces: Sequence[Cell] = (),
        probes: Sequence[Cell] = (),
        views: Sequence[Cell] = (),
    ) -> None:
        """Everything that these cells of the test split need, and the cells. traces, probes, views: of which these are kept too."""
        wanted = [*cells, *traces, *probes, *views]
        unsteered, steered = self.stages(wanted)
        self.complete(unsteered, "sweep 1/5: thresholds")
        self.complete([self.first(cell) for cell in steered], "sweep 2/5: validation")
        corrected = [self.corrected(one) for cell in wanted for one in self.promising(cell)]
        self.complete(corrected, "sweep 3/5: validation, thresholds corrected")
        self.complete([self.settled(cell) for cell in cells], "sweep 4/5: cells")
        self.complete(
            [self.settled(cell) for cell in probes], "sweep 5/5: worth of candidates", "probe"
        )
        self.complete([self.settled(cell) for cell in traces], "sweep 5/5: traces", "trace")
        self.complete([self.settled(cell) for cell in views], "sweep 5/5: views", "view")

    def table(
        self, cells: Sequence[Cell], columns: Sequence[str], what: str = "rows"
    ) -> pd.DataFrame:
        """The rows of these cells as one table: how each was asked for (LABELS), and these columns.

        threshold and beta are those that were measured, by objective and replicate; tuned says that β was chosen.
        """
        frames = []
        for cell in dict.fromkeys(cells):
            settled = self.settled(cell)
            rows = self.rows(settled, what)
            labels = {name: getattr(cell, name) for name in LABELS} | {"beta": settled.beta}
            if settled.thresholds:
                labels["threshold"] = rows["objective"].map(
                    dict(zip(OBJECTIVES, settled.thresholds, strict=True))
                )
            names = [name for name in ("objective", "prompt", "seed", "best_of") if name in rows]
            frames.append(rows[[*names, *columns]].assign(**labels))
        table = pd.concat(frames, ignore_index=True).astype({"threshold": "float64"})
        return table.astype(
            {name: "category" for name in table if table[name].dtype in (object, "str")}
        )

    def words(self, tokens: Sequence[int]) -> list[str]:
        """Return how token ids are written, as readers are shown them."""
        return subject_of(self.profile, 0).words(tokens)

    def timings(self, cells: Sequence[Cell], rounds: int) -> pd.DataFrame:
        """Rows with `seconds` per response of each cell in each round, labelled like `table`. Measured anew each time."""
        settled = [self.settled(cell) for cell in cells]
        found = self.workers.run(
            time_cells, [(self.profile, settled, rounds)], description="timing"
        )[0]
        labels = pd.DataFrame(
            [
                {name: getattr(cell, name) for name in LABELS} | {"beta": one.beta}
                for cell, one in zip(cells, settled, strict=True)
            ]
        )
        labels["best_of"] = [cell.responses if cell.search == "best-of" else 1 for cell in cells]
        return found.join(labels, on="cell").drop(columns="cell")


def settle(
    target: float, thresholds: Sequence[float], ratios: Sequence[float], following: float
) -> float:
    """A threshold from what two did: the one that came close to the target ratio; between them if that lies between their ratios; else
    what the second run's own signals say next (`following`)."""
    distances = [abs(ratio - target) for ratio in ratios]
    if min(distances) <= FAR:
        return thresholds[distances.index(min(distances))]
    if min(ratios) < target < max(ratios):
        (low, high), (at_low, at_high) = (
            sorted(ratios),
            (t for _, t in sorted(zip(ratios, thresholds, strict=True))),
        )
        return at_low + (at_high - at_low) * (target - low) / (high - low)
    return following


def _measure(task: tuple[str, Profile, Shard]) -> pd.DataFrame:
    what, profile, shard = task
    try:
        return MEASURES[what](subject_of(profile, shard.cell.replicate), shard)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of GPU memory while measuring {shard.cell.method} on {shard.objective}: use a smaller BATCH_SIZE"
        ) from error
