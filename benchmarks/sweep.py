"""Running cells: what is not in the store yet is measured in worker processes and kept, shard by shard.

A killed run loses the shards in hand, one per worker (a shard is one sample of each prompt, a test cell has several);
started again it goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from benchmarks import parallel
from benchmarks.cells import OBJECTIVES, Cell, Shard
from benchmarks.digests import ROWS, code_digest
from benchmarks.lab.build import Replicate
from benchmarks.measure import measure
from benchmarks.profile import Profile
from benchmarks.store import CACHE, read_frame, write_frame


@dataclass(frozen=True)
class Results:
    """The store of one profile's cells, and the workers that fill it. since: cells older than this are measured again."""

    profile: Profile
    workers: parallel.Workers
    since: float = 0.0

    @cached_property
    def _digests(self) -> dict[int, str]:
        return {index: Replicate(self.profile, index).digest for index in range(self.profile.replicates)}

    def shards(self, cell: Cell) -> list[Shard]:
        """The validation split is sampled once per prompt."""
        samples = 1 if cell.split == "validation" else self.profile.evaluation.samples
        return [Shard(cell, seed) for seed in range(samples)]

    def path(self, shard: Shard) -> Path:
        # the thresholds kept with a validation cell are those of the targets
        notes = self.profile.figure2.targets if shard.cell.split == "validation" else ()
        key = shard.key(self._digests[shard.cell.replicate], code_digest(ROWS), notes)
        return CACHE / self.profile.name / "cells" / key[:2] / f"{key}.parquet"

    def has(self, shard: Shard) -> bool:
        path = self.path(shard)
        return path.exists() and path.stat().st_mtime >= self.since

    def rows(self, cell: Cell) -> pd.DataFrame:
        """One row per prompt and seed."""
        return pd.concat([read_frame(self.path(shard)) for shard in self.shards(cell)], ignore_index=True)

    def thresholds(self, cell: Cell) -> dict[str, float]:
        """Target ratio → entropy threshold, from the generations of a validation cell."""
        return read_frame(self.path(self.shards(cell)[0])).attrs["thresholds"]

    def complete(self, cells: Sequence[Cell], description: str) -> None:
        """Measures the shards that are missing."""
        shards = [shard for cell in dict.fromkeys(cells) for shard in self.shards(cell)]
        missing = [shard for shard in shards if not self.has(shard)]
        prompts = {"test": self.profile.evaluation.prompts_per_objective}
        prompts["validation"] = self.profile.evaluation.validation_prompts_per_objective
        total = sum(round(shard.work * len(OBJECTIVES) * prompts[shard.cell.split]) for shard in missing)
        description = f"{description} ({len(shards) - len(missing)} of {len(shards)} parts there)"
        tasks = [(self.profile, shard, self.path(shard)) for shard in missing]
        self.workers.run(_measure_and_keep, tasks, description=description, total=total, unit="response")


def _measure_and_keep(task: tuple[Profile, Shard, Path]) -> None:
    profile, shard, path = task
    write_frame(path, measure(profile, shard))
