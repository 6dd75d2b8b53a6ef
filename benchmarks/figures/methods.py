"""Which cells stand for which method: what the figures have in common. Thresholds, and tuned strengths, are still open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.spec.cells import ARGS, AUTOREGRESSIVE, OBJECTIVES, ROLLOUT, Cell
from benchmarks.spec.profile import Profile

VALUES = {"token": "value-token", "mean": "value-mean"}  # loss → value model
TAU = 1.0  # nats: the threshold that is reported to serve everywhere
NOISES = (
    0.1,
    0.3,
    1.0,
    3.0,
)  # SD of errors added to values (of random steps: of SD up to 3; of the lab: of rewards of SD 2)


class Wanted(NamedTuple):
    """What a figure needs of one replicate: cells, and those of which traces, probes or views are kept (see probes.py)."""

    cells: Sequence[Cell] = ()
    traces: Sequence[Cell] = ()
    probes: Sequence[Cell] = ()
    views: Sequence[Cell] = ()


def base(replicate: int, family: str) -> Cell:
    return Cell(replicate, family)


def steered(
    replicate: int,
    family: str,
    loss: str,
    *,
    gate: str = "entropy",
    ratio: float = 0.0,
    beta: float = 1.0,
    **how,
) -> Cell:
    """The base model under a value model of this loss. how: further fields of the cell."""
    return Cell(
        replicate, family, value_model=VALUES[loss], gate=gate, target_ratio=ratio, beta=beta, **how
    )


def dense(replicate: int, family: str, loss: str, beta: float = 1.0, **how) -> Cell:
    return steered(replicate, family, loss, gate="every", ratio=1.0, beta=beta, **how)


def curve(
    profile: Profile, replicate: int, family: str, loss: str, ratios: Sequence[float] = (), **how
) -> list[Cell]:
    """SIA at these ratios (all of the profile), and dense steering."""
    ratios = ratios or profile.sweep.ratios
    return [steered(replicate, family, loss, ratio=r, **how) for r in ratios] + [
        dense(replicate, family, loss, **how)
    ]


def values(profile: Profile) -> list[str]:
    """The value models of the usual size."""
    return [VALUES[loss] for loss in profile.losses]


def searched(cell: Cell, responses: int) -> Cell:
    return replace(cell, search="best-of", responses=responses)


def baselines(profile: Profile, replicate: int, family: str) -> list[Cell]:
    """Base, post-trained models, searches, and other ways to steer, each at its own best β (1 where nothing is tuned), as far as the
    profile has models for them. Best-of-N also holds every smaller N."""
    sweep, plain = profile.sweep, base(replicate, family)
    guided = replace(
        plain,
        gate="every",
        target_ratio=1.0,
        tuned=bool(sweep.tuning),
        beta=0.0 if sweep.tuning else 1.0,
    )
    needing = [
        ("base", plain),
        ("instruct", replace(plain, model="instruct")),
        ("instruct-reward", replace(plain, model="instruct-reward")),
        (ARGS, searched(plain, sweep.beams)),
        (ARGS, replace(plain, search="beams", responses=sweep.beams)),
        (ARGS, replace(guided, value_model=ARGS)),
        (AUTOREGRESSIVE, replace(guided, value_model=AUTOREGRESSIVE)),
        (ARGS, replace(guided, value_model=ROLLOUT, prompts=sweep.rollout_prompts)),
    ]
    return [cell for kind, cell in needing if profile.has(kind)]


def would_open(tokens: pd.DataFrame, cell: Cell) -> pd.Series:
    """Where the entropy gate of this settled cell opens, or would have on the tokens of another policy. tokens: of a trace."""
    thresholds = tokens["objective"].map(dict(zip(OBJECTIVES, cell.thresholds, strict=True)))
    return tokens["entropy"] >= thresholds.astype(np.float32)
