"""Timing in turns within one process, so that a drifting machine changes all times alike."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.analysis.tables import environment_info
from benchmarks.runtime.files import sha256, write_text
from benchmarks.runtime.fingerprints import MODELS, code_digest

Run = Callable[[int], Any]  # of a seed: every round has its own, and so its own junctions


def seconds(run: Run, seed: int, device: torch.device) -> float:
    """Return the seconds of one run, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(seed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[Any, Run], device: torch.device, rounds: int, description: str
) -> dict[Any, list[float]]:
    """Return the seconds of each run in each round, after one round that does not count."""
    turns = tqdm(range(rounds + 1), desc=description, unit="round", disable=None)
    times = [[seconds(run, turn, device) for run in runs.values()] for turn in turns]
    return dict(zip(runs, map(list, zip(*times[1:], strict=True)), strict=True))


def ratios(baseline: Sequence[float], times: Sequence[float]) -> list[float]:
    """Return times as multiples of those of a baseline, round by round."""
    return [time / base for time, base in zip(times, baseline, strict=True)]


def write_provenance(module: str, start: float, files: Sequence[Path], **further: object) -> None:
    """Write beside the first of these files how they were measured, since `start`."""
    provenance = environment_info(module) | {
        "code_digest": code_digest(MODELS),
        "wall_seconds": round(time.monotonic() - start, 1),
        "sha256": {file.name: sha256(file) for file in files},
    }
    text = json.dumps(provenance | further, indent=2, sort_keys=True)
    write_text(files[0].with_suffix(".json"), text + "\n")
