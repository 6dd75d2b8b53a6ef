"""Seconds per response of cells, timed in turns in one worker while nothing else runs."""

import time

import pandas as pd

from benchmarks.engine.loading import subject_of
from benchmarks.engine.measure import choose_best, expand_prompts, respond
from benchmarks.runtime import workers
from benchmarks.runtime.memory import memory_errors
from benchmarks.spec.cells import OBJECTIVES, TIMED_PROMPTS, Cell, Shard
from benchmarks.spec.profile import Profile


def time_cells(task: tuple[Profile, list[Cell], int]) -> pd.DataFrame:
    """Return rows with `cell` (index), `prompt` (round) and `seconds` per response.

    A first round, which warms up, is not kept.

    Args:
        task: Profile, cells, number of rounds.
    """
    profile, cells, rounds = task
    records = []
    for turn in range(rounds + 1):
        for number, cell in enumerate(cells):
            shard = Shard(cell, OBJECTIVES[turn % len(OBJECTIVES)])
            subject = subject_of(profile, cell.replicate)
            expanded, _, seeds = expand_prompts(subject, shard)
            first = [prompt for prompt, seed in zip(expanded, seeds, strict=True) if seed == 0]
            prompts = first[:TIMED_PROMPTS]
            start = time.perf_counter()
            rows = subject.batch_size
            with memory_errors(f"timing {cell.method}", rows, "responses", "BATCH_SIZE="):
                samples = respond(subject, shard, prompts, [0] * len(prompts))
                if len(samples) > 1:
                    choose_best(subject, samples, prompts)
            seconds = time.perf_counter() - start
            workers.report(seconds)
            if turn:
                records.append({"cell": number, "prompt": turn, "seconds": seconds / len(prompts)})
    return pd.DataFrame.from_records(records)
