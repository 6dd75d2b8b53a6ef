"""Requests of cells that figures have in common: base, steered and dense responses, baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from benchmarks.spec.cells import OBJECTIVES, Cell, CellRequest
from benchmarks.spec.methods import BASELINES
from benchmarks.spec.model_kinds import BASE, ModelKind, value_kind
from benchmarks.spec.profile import Profile

VALUES = {"token": "value-token", "mean": "value-mean"}  # loss → label of its value model
TAU = 1.0  # nats: the threshold that is reported to serve everywhere
# SD of errors added to values (of random steps: of SD up to 3; of the lab: of rewards of SD 2)
NOISES = (0.1, 0.3, 1.0, 3.0)


def base(replicate: int, family: str, model: ModelKind = BASE) -> CellRequest:
    """Return unsteered responses."""
    return CellRequest(replicate, family, model=model)


def steered(
    replicate: int,
    family: str,
    values: str | ModelKind,
    *,
    gate: str = "entropy",
    ratio: float = 0.0,
    beta: float = 1.0,
    **settings,
) -> CellRequest:
    """Return responses steered by values, a loss or a kind of value model.

    Args:
        settings: Further fields of the request.
    """
    scorer = value_kind(values) if isinstance(values, str) else values
    return CellRequest(
        replicate, family, scorer=scorer, gate=gate, target_ratio=ratio, beta=beta, **settings
    )


def dense(
    replicate: int, family: str, values: str | ModelKind, beta: float = 1.0, **settings
) -> CellRequest:
    """Return responses steered at every token."""
    return steered(replicate, family, values, gate="every", ratio=1.0, beta=beta, **settings)


def curve(
    profile: Profile,
    replicate: int,
    family: str,
    values: str | ModelKind,
    ratios: Sequence[float] = (),
    **settings,
) -> list[CellRequest]:
    """Return SIA at these ratios (default: all of the profile), and dense steering."""
    ratios = ratios or profile.sweep.ratios
    sparse = [steered(replicate, family, values, ratio=ratio, **settings) for ratio in ratios]
    return [*sparse, dense(replicate, family, values, **settings)]


def values(profile: Profile) -> list[str]:
    """Return the labels of the profile's value models of the usual size."""
    return [VALUES[loss] for loss in profile.losses]


def searched(request: CellRequest, responses: int) -> CellRequest:
    """Return the same with the best of up to so many responses."""
    return replace(request, search="best-of", responses=responses)


def baselines(profile: Profile, replicate: int, family: str) -> list[CellRequest]:
    """Return the baselines that the profile has models for, each at its own best β.

    β is 1 where nothing is tuned. Best-of-N also holds every smaller N.
    """
    sweep, requests = profile.sweep, []
    for method in BASELINES:
        if not all(map(profile.has, method.needs)):
            continue
        request = base(replicate, family, method.model)
        if method.scorer is not None:
            tuned, beta = bool(sweep.tuning), 0.0 if sweep.tuning else 1.0
            request = dense(replicate, family, method.scorer, beta, tuned=tuned)
        if method.search:
            request = replace(request, search=method.search, responses=sweep.beams)
        if method.name == "transfer-q":  # rollouts are slow
            request = replace(request, prompts=sweep.rollout_prompts)
        requests.append(request)
    return requests


def gate_opens_at(tokens: pd.DataFrame, cell: Cell) -> pd.Series:
    """Return where the entropy gate of a cell opens, or would have on tokens of another policy.

    Args:
        tokens: A trace.
    """
    thresholds = tokens["objective"].map(dict(zip(OBJECTIVES, cell.thresholds, strict=True)))
    return tokens["entropy"] >= thresholds.astype(np.float32)
