"""Seconds per response of cells, measured in turns in one worker while nothing else runs."""

from __future__ import annotations

import time

import pandas as pd

from benchmarks import parallel
from benchmarks.cells import OBJECTIVES, Cell, Shard
from benchmarks.lab.replicate import REWARD
from benchmarks.lab.tokenizer import encode_prompts
from benchmarks.measure import asked, choose_best, replicate_of, respond, reward_model
from benchmarks.profile import Profile


def time_cells(task: tuple[Profile, list[Cell], int]) -> pd.DataFrame:
    """Rows `cell` (number), `prompt` (round), `seconds` (per response); the first round, which warms up, is not kept."""
    profile, cells, rounds = task
    records = []
    for turn in range(rounds + 1):
        for number, cell in enumerate(cells):
            shard = Shard(cell, OBJECTIVES[turn % len(OBJECTIVES)])
            replicate = replicate_of(profile, cell.replicate)
            prompts, *_ = asked(replicate, shard)
            ids = encode_prompts(replicate.tokenizer, prompts[: cell.prompts or profile.evaluation.prompts_per_objective])
            start = time.perf_counter()
            tries = respond(replicate, shard, ids, [0] * len(ids))
            if len(tries) > 1:
                choose_best(tries, ids, reward_model(replicate, REWARD))
            seconds = (time.perf_counter() - start) / len(ids)
            parallel.report(seconds * len(ids))
            if turn:
                records.append({"cell": number, "prompt": turn, "seconds": seconds})
    return pd.DataFrame.from_records(records)
