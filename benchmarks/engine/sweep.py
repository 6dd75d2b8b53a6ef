"""Running cells: what the store lacks is measured by worker processes, shard by shard.

A killed run loses the shards in hand; started again it goes on from there.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import pandas as pd

from benchmarks.engine.calibration import Calibrator, needs_thresholds
from benchmarks.engine.loading import subject_of
from benchmarks.engine.measure import measure_shard
from benchmarks.engine.store import CellStore
from benchmarks.engine.theory import random_instances
from benchmarks.engine.timing import time_cells
from benchmarks.engine.traces import candidate_table, rollout_values, trace_tokens
from benchmarks.runtime import workers
from benchmarks.runtime.memory import memory_errors
from benchmarks.spec.cells import (
    OBJECTIVES,
    ROUNDS,
    TIMED_PROMPTS,
    Cell,
    CellRequest,
    FigureCells,
    Shard,
)
from benchmarks.spec.profile import Profile
from sia import Generation

MEASUREMENTS: dict[str, Callable[..., pd.DataFrame]] = {
    "rows": measure_shard,
    "trace": trace_tokens,
    "rollouts": rollout_values,
    "view": candidate_table,
}
RECALIBRATED_WORK = 1.4  # about two fifths of the thresholds are calibrated again


class Sweep:
    """Measures what figures request, and gives them its rows.

    Args:
        workers: `Workers` or `RayWorkers` that measure; None to read alone.
        since: Time before which measured shards do not count (seconds since the epoch).
    """

    def __init__(self, profile: Profile, workers=None, since: float = 0.0) -> None:
        self.profile = profile
        self.workers = workers
        self.store = CellStore(profile, since)

    @cached_property
    def calibrator(self) -> Calibrator:
        """The calibrator over the validation shards of the store."""
        return Calibrator(self.profile, self.store.validation_rows)

    def resolve(self, request: CellRequest) -> Cell:
        """Return the cell that is measured for a request."""
        return self.calibrator.resolve(request)

    def rows(self, cell: Cell, measurement: str = "rows") -> pd.DataFrame:
        """Return what was measured of a cell; `measurement`: a key of MEASUREMENTS."""
        return self.store.rows(cell, measurement)

    def measure(self, needs: FigureCells) -> None:
        """Measure the rows that these requests need and the store lacks, stage by stage."""
        calibrator = self.calibrator
        unsteered, steered = calibrator.stages(needs.requests)
        self.measure_missing(unsteered, "sweep 1/5: thresholds")
        initial = map(calibrator.initial_cell, steered)
        self.measure_missing(initial, "sweep 2/5: validation")
        best = [cell for request in needs.requests for cell in calibrator.best_two_betas(request)]
        recalibrated = map(calibrator.recalibrated, best)
        self.measure_missing(recalibrated, "sweep 3/5: validation, thresholds calibrated again")
        cells = map(self.resolve, [*needs.cells, *needs.views])
        self.measure_missing(cells, "sweep 4/5: cells")

    def measure_tokens(self, needs: FigureCells) -> None:
        """Measure rollouts, traces and views, once the rows have been measured."""
        rollouts, traces, views = (
            map(self.resolve, requests) for requests in (needs.rollouts, needs.traces, needs.views)
        )
        self.measure_missing(rollouts, "sweep 5/5: rollouts of candidates", "rollouts")
        self.measure_missing(traces, "sweep 5/5: traces", "trace")
        self.measure_missing(views, "sweep 5/5: views", "view")

    def measure_missing(
        self, cells: Iterable[Cell], description: str, measurement: str = "rows"
    ) -> None:
        """Measure the shards of these cells that the store lacks."""
        store = self.store
        shards = [s for cell in dict.fromkeys(cells) for s in store.shards(cell, measurement)]
        shards.sort(key=lambda shard: -shard.cell.work)  # so that the workers end together
        missing = [shard for shard in shards if not store.has(shard, measurement)]
        self.workers.run(
            _measure,
            [
                (measurement, self.profile, shard, *self._extra_arguments(shard, measurement))
                for shard in missing
            ],
            description=description,
            on_result=lambda task, rows: store.write(task[2], measurement, rows),
        )

    def _extra_arguments(self, shard: Shard, measurement: str) -> tuple[list[Generation], ...]:
        """Return further arguments of a measurement: for a view, the responses to show."""
        return (self.store.responses(shard),) if measurement == "view" else ()

    def estimated_seconds(self, needs: FigureCells) -> float:
        """Return the estimated seconds of one core to measure everything anew."""
        evaluation, sweep = self.profile.evaluation, self.profile.sweep
        unsteered, steered = self.calibrator.stages(needs.requests)
        validation = evaluation.validation_prompts_per_objective
        responses = sum(cell.work * validation for cell in unsteered)
        for request in steered:
            again = RECALIBRATED_WORK if needs_thresholds(request) else 1
            responses += request.work * (request.prompts or validation) * again
        responses *= evaluation.validation_samples
        for request in dict.fromkeys([*needs.cells, *needs.traces]):
            prompts = request.prompts or evaluation.prompts_per_objective
            responses += request.work * prompts * evaluation.samples
        for request in dict.fromkeys(needs.timed):
            prompts = min(request.prompts or evaluation.prompts_per_objective, TIMED_PROMPTS)
            responses += request.work * prompts * (ROUNDS + 1) / len(OBJECTIVES)
        rollouts = sweep.probes * self.profile.decoding.candidates * sweep.probe_rollouts
        responses += len(needs.rollouts) * rollouts
        return responses * len(OBJECTIVES) / workers.RESPONSES_PER_SECOND

    # --- for figures

    def table(
        self, requests: Sequence[CellRequest], columns: Sequence[str], measurement: str = "rows"
    ) -> pd.DataFrame:
        """Return the rows of these requests as one table, with these columns and labels.

        `threshold` and `beta` are those that were measured, by objective and replicate; `tuned`
        tells that β was chosen.
        """
        frames = []
        for request in dict.fromkeys(requests):
            cell = self.resolve(request)
            rows = self.rows(cell, measurement)
            labels = request.labels() | {"beta": cell.beta}
            if cell.thresholds:
                labels["threshold"] = rows["objective"].map(
                    dict(zip(OBJECTIVES, cell.thresholds, strict=True))
                )
            names = [name for name in ("objective", "prompt", "seed", "best_of") if name in rows]
            frames.append(rows[[*names, *columns]].assign(**labels))
        table = pd.concat(frames, ignore_index=True).astype({"threshold": "float64"})
        texts = [name for name in table if table[name].dtype in (object, "str")]
        return table.astype(dict.fromkeys(texts, "category"))

    def random_instances(self, replicates: Sequence[int]) -> pd.DataFrame:
        """Return regrets, divergences and bounds on random steps and trees (see `theory`)."""
        return random_instances(replicates)

    def timings(self, requests: Sequence[CellRequest]) -> pd.DataFrame:
        """Return `seconds` per response of each cell in each round, timed anew, with labels."""
        cells = [self.resolve(request) for request in requests]
        task = (self.profile, cells, ROUNDS)
        (seconds,) = self.workers.run(time_cells, [task], description="timing")
        labels = pd.DataFrame([request.labels() for request in requests])
        labels = labels.assign(
            beta=[cell.beta for cell in cells],
            best_of=[cell.responses if cell.search == "best-of" else 1 for cell in cells],
        )
        return seconds.join(labels, on="cell").drop(columns="cell")


def _measure(task: tuple) -> pd.DataFrame:
    """Measure one shard in a worker.

    Args:
        task: Name of the measurement, profile, shard, and what the measurement is given besides.
    """
    measurement, profile, shard, *given = task
    subject = subject_of(profile, shard.cell.replicate)
    work = f"measuring {shard.cell.method} on {shard.objective}"
    with memory_errors(work, subject.batch_size, "responses", "BATCH_SIZE="):
        return MEASUREMENTS[measurement](subject, shard, *given)
