"""Requests of cells that figures have in common: base, steered and dense responses, baselines."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from benchmarks.analysis.estimates import MethodScores, difference, mean_of, select
from benchmarks.analysis.labels import LOSSES
from benchmarks.spec.cells import OBJECTIVES, Cell, CellRequest
from benchmarks.spec.methods import BASELINES, BY_NAME
from benchmarks.spec.model_kinds import (
    BASE,
    JUNCTION,
    Q_HEAD,
    VOCABULARY,
    ModelKind,
    value_kind,
)
from benchmarks.spec.profile import Profile

VALUES = {loss: str(value_kind(loss)) for loss in ("token", "mean")}  # label of its value model
SCORES = ("judge", "reward", "fluency_errors", "kl")  # metrics of most figures
# methods that `predictors_and_heads` requests
PREDICTING = ("junction", "q-head", "junction-q-head", "vocabulary-value")
TAU = 1.0  # nats: the threshold that is reported to serve everywhere


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


def value_models(profile: Profile) -> list[str]:
    """Return the labels of the profile's value models of the usual size."""
    return [VALUES[loss] for loss in profile.losses]


def losses_in_order(profile: Profile) -> list[str]:
    """Return the labels of `value_models` in the order of figures and tables."""
    return [value_model for value_model in LOSSES if value_model in value_models(profile)]


def with_best_of(request: CellRequest, responses: int) -> CellRequest:
    """Return the same request as a best-of-N search over up to `responses` responses."""
    return replace(request, search="best-of", responses=responses)


def small_ratios(profile: Profile) -> list[float]:
    """Return the shares of tokens up to the largest reduced one, where gates differ most."""
    sweep = profile.sweep
    return [ratio for ratio in sweep.ratios if ratio <= max(sweep.reduced_ratios)]


def tuned_losses(profile: Profile) -> tuple[str, ...]:
    """Return the loss whose value models also steer at their best β: the paper's if available.

    Empty if the profile tunes nothing.
    """
    usual = "mean" if "mean" in profile.losses else profile.losses[0]
    return (usual,) if profile.sweep.tuning else ()


def has_models(profile: Profile, method: str, loss: str) -> bool:
    """Return whether the profile has the models that a method needs with values of this loss."""
    return all(map(profile.has, BY_NAME[method].models(loss)))


def divergence_gates(
    profile: Profile,
    replicate: int,
    family: str,
    loss: str,
    ratios: Sequence[float],
    gates: Sequence[str] = (JUNCTION,),
    **settings,
) -> list[CellRequest]:
    """Return steering by values where the divergence is, or is expected to be, largest."""
    return [
        steered(replicate, family, loss, gate=gate, ratio=ratio, **settings)
        for gate in gates
        if has_models(profile, gate, loss)
        for ratio in ratios
    ]


def heads(
    profile: Profile, replicate: int, family: str, loss: str, tuned: bool = False
) -> list[CellRequest]:
    """Return the Q-head at every token and, at β = 1, at junctions, and the vocabulary head.

    Methods whose models the profile lacks are left out.
    """
    q_head, ratio = ModelKind(Q_HEAD, loss), min(profile.sweep.reduced_ratios)
    requests = [dense(replicate, family, q_head, tuned=tuned)]
    if not tuned:
        requests += [
            steered(replicate, family, q_head, gate=JUNCTION, ratio=ratio),
            dense(replicate, family, ModelKind(VOCABULARY, loss)),
        ]
    return [request for request in requests if has_models(profile, request.method, loss)]


def predictors_and_heads(
    profile: Profile, replicate: int, family: str, loss: str, tuned: bool = False
) -> list[CellRequest]:
    """Return the junction gate at the smallest reduced share, and what `heads` returns."""
    unit, ratio = (profile, replicate, family, loss), min(profile.sweep.reduced_ratios)
    return [*divergence_gates(*unit, [ratio], tuned=tuned), *heads(*unit, tuned)]


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
        if method.few_prompts:
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


def traces_with_junctions(results, request: CellRequest) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield method and trace of the base and of a sparsely steered cell.

    Column `junction` says where the gate opens, or would have opened in responses of the base.
    """
    cell = results.resolve(request)
    for policy in (base(request.replicate, request.family), request):
        tokens = results.rows(results.resolve(policy), "trace")
        opens = tokens["steered"] if policy is request else gate_opens_at(tokens, cell)
        yield policy.method, tokens.assign(junction=opens)


def against_dense(
    sparse: Sequence[MethodScores], dense: MethodScores, profile: Profile
) -> list[MethodScores]:
    """Return the differences of SIA at each ratio, and of its mean over the claimed ones, to dense.

    The mean, of method "sia-claimed", comes last; it is left out where a ratio is missing.
    """
    return [difference(sia, dense) for sia in [*sparse, *claimed_mean(sparse, profile)]]


def claimed_mean(sparse: Sequence[MethodScores], profile: Profile) -> list[MethodScores]:
    """Return the mean of SIA over the claimed ratios in a list, empty where one is missing."""
    claimed = select(sparse, target_ratio=profile.sweep.main_ratios)
    complete = len(claimed) == len(profile.sweep.main_ratios)
    return [mean_of(claimed, method="sia-claimed")] if complete else []


def measured_at(scores: Sequence[MethodScores], responses: int) -> list[MethodScores]:
    """Return scores without those of best-of-N with another number of responses."""
    return [
        one
        for one in scores
        if one.labels["search"] != "best-of" or one.labels["best_of"] == responses
    ]
