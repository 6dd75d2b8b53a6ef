"""Timing in turns within one process, so that a drifting machine changes all times alike."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

Run = Callable[[int], object]  # of a seed: every round has its own, and so its own junctions
Label = TypeVar("Label", bound=Hashable)


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
    runs: Mapping[Label, Run], device: torch.device, rounds: int, bar: tqdm | None = None
) -> dict[Label, list[float]]:
    """Return the seconds of each run in each round, after one round that does not count."""
    times: dict[Label, list[float]] = {label: [] for label in runs}
    for turn in range(rounds + 1):
        for label, run in runs.items():
            times[label].append(seconds(run, turn, device))
        if bar is not None:
            bar.update()
            bar.set_postfix_str(" ".join(f"{each[-1]:.2f}s" for each in times.values()))
    return {label: each[1:] for label, each in times.items()}


def ratios(baseline: Sequence[float], times: Sequence[float]) -> list[float]:
    """Return times as multiples of those of a baseline, round by round."""
    return [time / base for time, base in zip(times, baseline, strict=True)]
