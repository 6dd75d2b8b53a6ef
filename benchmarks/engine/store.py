"""Measured shards on disk, each under a digest of everything that changes its rows."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from benchmarks.engine.loading import subject_of
from benchmarks.engine.measure import VIEW_PROMPTS, recorded_response
from benchmarks.runtime.files import CACHE, read_cell, write_cell
from benchmarks.runtime.fingerprints import row_code
from benchmarks.spec.cells import OBJECTIVES, Cell, Shard
from benchmarks.spec.methods import ROLLOUT
from benchmarks.spec.model_kinds import JUNCTION, ModelKind, value_kind
from benchmarks.spec.profile import Profile
from sia import Generation


@dataclass(frozen=True)
class CellStore:
    """The measured shards of one profile.

    Args:
        since: Time before which shards do not count (seconds since the epoch).
    """

    profile: Profile
    since: float = 0.0
    _validation: dict[Path, pd.DataFrame] = field(default_factory=dict, repr=False)

    def shards(self, cell: Cell, measurement: str = "rows") -> list[Shard]:
        """Return the shards of a cell: by objective and ranges of test prompts."""
        evaluation = self.profile.evaluation
        if measurement == "view":
            prompts = range(min(VIEW_PROMPTS, evaluation.prompts_per_objective))
            return [Shard(cell, objective, prompts) for objective in OBJECTIVES]
        size = self.profile.prompts_per_shard
        if size is None or cell.split == "validation":
            return [Shard(cell, objective) for objective in OBJECTIVES]
        count = cell.prompts or evaluation.prompts_per_objective
        ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]
        return [Shard(cell, objective, prompts) for objective in OBJECTIVES for prompts in ranges]

    def path(self, shard: Shard, measurement: str = "rows") -> Path:
        """Return where a shard lies: by its cell, its models, the code, and decisive settings."""
        cell, evaluation, sweep = shard.cell, self.profile.evaluation, self.profile.sweep
        decisive: list[object] = [evaluation.samples, ()]  # samples: they share a search's noise
        if cell.split == "validation":  # its shards hold the thresholds of all ratios
            decisive = [evaluation.validation_samples, sweep.ratios]
        decisive += [(sweep.beam_width, sweep.chunk)] if cell.search == "beams" else []
        decisive += [sweep.rollout_tokens] if cell.scorer == ROLLOUT else []
        decisive += [sweep.probes, sweep.probe_rollouts] if measurement == "rollouts" else []
        if measurement == "view":  # which shows divergences by values, and as they are predicted
            values = cell.scorer or value_kind(self.profile.losses[0])
            predicted = self.profile.has(ModelKind(JUNCTION, values.loss))
            cell = replace(cell, scorer=values, gate=JUNCTION if predicted else "every")
        models = subject_of(self.profile, cell.replicate).digest_of(cell)
        key = shard.key(measurement, models, row_code(self.profile), *decisive)
        return CACHE / self.profile.name / "cells" / key[:2] / f"{key}.cell"

    def has(self, shard: Shard, measurement: str = "rows") -> bool:
        """Return whether a shard has been measured since `since`."""
        path = self.path(shard, measurement)
        return path.exists() and path.stat().st_mtime >= self.since

    def write(self, shard: Shard, measurement: str, rows: pd.DataFrame) -> None:
        """Keep the rows of a measured shard."""
        write_cell(self.path(shard, measurement), rows)

    def rows(self, cell: Cell, measurement: str = "rows") -> pd.DataFrame:
        """Return the rows of all shards of a cell."""
        paths = [self.path(shard, measurement) for shard in self.shards(cell, measurement)]
        rows = pd.concat(map(read_cell, paths), ignore_index=True)
        rows.attrs = {}  # of one shard; those of several are no longer there
        return rows

    def responses(self, view: Shard) -> list[Generation]:
        """Return the measured responses that a view shows: the first to each of its prompts."""
        records = {}
        for shard in self.shards(view.cell):
            if shard.objective == view.objective and shard.prompts.start < VIEW_PROMPTS:
                records |= read_cell(self.path(shard)).attrs["responses"]
        return [recorded_response(records[str(prompt)]) for prompt in view.prompts]

    def validation_rows(self, shard: Shard) -> pd.DataFrame:
        """Return the rows of a validation shard, read once: many cells look at them."""
        path = self.path(shard)
        if path not in self._validation:
            self._validation[path] = read_cell(path)
        return self._validation[path]
