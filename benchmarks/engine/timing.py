"""Seconds per response of cells, measured in turns in one worker while nothing else runs."""

from __future__ import annotations

import time

import pandas as pd

from benchmarks.engine.measure import asked, choose_best, respond, subject_of
from benchmarks.runtime import workers
from benchmarks.spec.cells import OBJECTIVES, Cell, Shard
from benchmarks.spec.profile import Profile


def time_cells(task: tuple[Profile, list[Cell], int]) -> pd.DataFrame:
    """Rows `cell` (number), `prompt` (round), `seconds` (per response); the first round, which warms up, is not kept."""
    profile, cells, rounds = task
    records = []
    for turn in range(rounds + 1):
        for number, cell in enumerate(cells):
            shard = Shard(cell, OBJECTIVES[turn % len(OBJECTIVES)])
            subject = subject_of(profile, cell.replicate)
            prompts, _, seeds = asked(subject, shard)
            prompts = [prompt for prompt, seed in zip(prompts, seeds, strict=True) if seed == 0]
            start = time.perf_counter()
            tries = respond(subject, shard, prompts, [0] * len(prompts))
            if len(tries) > 1:
                choose_best(subject, tries, prompts)
            seconds = (time.perf_counter() - start) / len(prompts)
            workers.report(seconds * len(prompts))
            if turn:
                records.append({"cell": number, "prompt": turn, "seconds": seconds})
    return pd.DataFrame.from_records(records)
