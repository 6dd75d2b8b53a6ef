"""From rows to estimates: what every figure's summary has in common.

A `MethodScores` holds one method under one setting: a value of each metric for every unit (a prompt
under a sampling seed, of a replicate and objective). Scores on the same units can be subtracted
unit by unit, which pairs them by prompt and by noise.

Summaries are tidy: a row is one estimate of one metric. Rows with `replicate` "all" pool the
replicates; where there are several, rows "0", "1", ... hold each alone: a method's scores, and its
differences to others over all objectives together. Counts, realised ratios and the standard
deviation of what is averaged (`sd`) stand in the pooled rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby

import numpy as np
import pandas as pd

from benchmarks.analysis.intervals import bootstrap_interval, bootstrap_weights, t_interval
from benchmarks.spec.cells import OBJECTIVES
from benchmarks.spec.profile import Profile

POOLED = "all"  # value of the column `replicate`
TOLERANCE = 0.05  # standard deviations of base responses: the smallest difference of interest
FEWEST_PROMPTS = 50  # over all objectives and replicates, that a verdict rests on
SCORES = ("judge", "reward")  # metrics of which figures show single replicates
UNIT = ["replicate", "objective", "prompt", "seed"]
LABELS = [
    "family", "model", "value_model", "method", "gate", "target_ratio", "beta", "best_of", "search",
    "tuned", "tau",
]  # fmt: skip
COLUMNS = [
    "objective", "family", "model", "value_model", "method", "gate", "target_ratio", "ratio",
    "beta", "best_of", "metric", "replicate", "estimate", "low", "high", "n", "seeds",
    "replicates", "tuned", "tau", "search", "matched", "versus", "versus_ratio", "sd",
]  # fmt: skip
ORDER = [
    "family", "model", "value_model", "method", "gate", "target_ratio", "pooled_beta", "best_of",
    "tuned", "tau", "versus",
]  # fmt: skip
NUMBERS = ("estimate", "low", "high")
COUNTS = dict.fromkeys(("n", "seeds", "replicates"), "Int64")
POOLED_ONLY = {"ratio", "versus_ratio", "n", "seeds", "replicates", "sd", "entropy"}


def summary_frame(
    records: Sequence[dict], further: Sequence[str] = (), digits: int = 4
) -> pd.DataFrame:
    """Return a summary made of single rows: the common columns and `further` ones, rounded."""
    rows = [{"replicate": POOLED} | record for record in records]
    frame = pd.DataFrame.from_records(rows).reindex(columns=[*COLUMNS, *further])
    return frame.astype(COUNTS).round(dict.fromkeys(NUMBERS, digits))


def pooled(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a summary that pool the replicates."""
    return summary[summary["replicate"] == POOLED]


@dataclass(frozen=True)
class MethodScores:
    """One method under one setting, on every unit.

    Attributes:
        labels: Its setting, by LABELS and what a difference adds.
        values: `(units, metrics)`.
        steered_tokens: Steered tokens of each unit, `(units,)`; None without a realised ratio.
        tokens: All tokens of each unit, as `steered_tokens`.
        shape: (replicates, objectives, prompts, seeds) of the units, in this order.
        versus: The scores that were subtracted, of a difference.
        chosen: Settings that may differ between replicates and objectives, `(replicates,
            objectives)` each; a row of the summary shows one that is the same throughout the row.
    """

    labels: dict
    values: np.ndarray
    steered_tokens: np.ndarray | None
    tokens: np.ndarray | None
    shape: tuple[int, int, int, int]
    versus: MethodScores | None = None
    chosen: Mapping[str, np.ndarray] = field(default_factory=dict)

    def ratio(self, objective: int | None) -> float | None:
        """Return the realised share of steered tokens, of one objective or of all."""
        if self.tokens is None:
            return None
        index = slice(None) if objective is None else objective
        steered, tokens = (
            x.reshape(self.shape)[:, index].sum() for x in (self.steered_tokens, self.tokens)
        )
        return float(steered / tokens)

    def restrict(self, prompts: slice) -> MethodScores:
        """Return the scores on these prompts of each objective."""
        count = len(range(*prompts.indices(self.shape[2])))
        shape = (*self.shape[:2], count, self.shape[3])

        def cut(x: np.ndarray | None) -> np.ndarray | None:
            if x is None:
                return None
            kept = x.reshape(*self.shape, *x.shape[1:])[:, :, prompts]
            return kept.reshape(np.prod(shape), *x.shape[1:])

        return replace(
            self,
            values=cut(self.values),
            steered_tokens=cut(self.steered_tokens),
            tokens=cut(self.tokens),
            shape=shape,
            versus=None,
        )


def method_scores(rows: pd.DataFrame, metrics: Sequence[str]) -> list[MethodScores]:
    """Return the scores of each method and setting of the rows, sorted by LABELS.

    Raises:
        ValueError: A method was not measured on the same prompts and seeds throughout.
    """
    fixed = ~rows["gate"].isin(["never"]) & has_fixed_threshold(rows)
    rows = with_kl_per_token(rows).assign(
        tau=rows["threshold"].where(fixed),
        requested_beta=rows["beta"].where(~rows["tuned"].astype(bool), 0.0),
    )
    keys = ["requested_beta" if label == "beta" else label for label in LABELS]
    scores = []
    for key, group in rows.groupby(keys, sort=True, observed=True, dropna=False):
        group = group.sort_values(UNIT, kind="stable")
        shape = tuple(group[name].nunique() for name in UNIT)
        labels = dict(zip(LABELS, key, strict=True))
        if len(group) != np.prod(shape) or group.duplicated(UNIT).any():
            raise ValueError(
                f"every method must be measured on the same prompts and seeds, {labels} was not"
            )
        betas, chosen = group.groupby("replicate")["beta"].first().to_numpy(float), {}
        labels["beta"] = None
        if labels["gate"] != "never":
            chosen["beta"] = np.repeat(betas[:, None], shape[1], axis=1)
            labels["beta"] = common_value(betas)
        labels["tau"] = None if pd.isna(labels["tau"]) else labels["tau"]
        values = group[list(metrics)].to_numpy(np.float64)
        steered, tokens = (group[name].to_numpy(float) for name in ("steered", "tokens"))
        scores.append(MethodScores(labels, values, steered, tokens, shape, chosen=chosen))
    return scores


def common_value(values: np.ndarray) -> float | None:
    """Return the value that all of these are; None if they differ."""
    values = np.asarray(values)
    return float(values.flat[0]) if (values == values.flat[0]).all() else None


def has_fixed_threshold(rows: pd.DataFrame) -> pd.Series:
    """Return which rows have a given threshold: only calibrated ones have a target ratio."""
    return rows["target_ratio"] == 0


def with_kl_per_token(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the KL per token where there is a KL."""
    return rows.assign(kl_per_token=rows["kl"] / rows["tokens"]) if "kl" in rows else rows


def method_key(method: str, search: str) -> str:
    """Return the key of a method in palettes and comparisons: its name, or "best-of-n"."""
    return "best-of-n" if search == "best-of" else method


def select(scores: Iterable[MethodScores], **labels) -> list[MethodScores]:
    """Return the scores with these labels; a tuple of values means any of them."""

    def fits(one: MethodScores) -> bool:
        return all(
            one.labels.get(k) in (v if isinstance(v, tuple) else (v,)) for k, v in labels.items()
        )

    return [one for one in scores if fits(one)]


def select_one(scores: Iterable[MethodScores], **labels) -> MethodScores:
    """Return the single method with these labels.

    Raises:
        LookupError: There is none, or there are several.
    """
    fitting = select(scores, **labels)
    if len(fitting) != 1:
        raise LookupError(f"expected one method with {labels}, found {len(fitting)}")
    return fitting[0]


def difference(left: MethodScores, right: MethodScores, **labels) -> MethodScores:
    """Return left − right, unit by unit, on the prompts that both have.

    It is named as `left`, with the method of `right` as `versus` unless `labels` says otherwise.
    """
    prompts = slice(min(left.shape[2], right.shape[2]))
    left, right = left.restrict(prompts), right.restrict(prompts)
    if left.shape != right.shape:
        raise ValueError(f"a difference needs the same units, got {left.shape} and {right.shape}")
    names = left.labels | {"versus": right.labels["method"]} | labels
    return replace(left, labels=names, values=left.values - right.values, versus=right)


def mean_of(scores: Sequence[MethodScores], **labels) -> MethodScores:
    """Return the mean of scores, unit by unit, without a realised ratio.

    Labels in which they differ are left out, but for those given here.
    """
    first = scores[0]
    names = {k: v for k, v in first.labels.items() if all(one.labels.get(k) == v for one in scores)}
    chosen = {
        name: values
        for name, values in first.chosen.items()
        if all(name in one.chosen and (one.chosen[name] == values).all() for one in scores)
    }
    values = np.mean([one.values for one in scores], axis=0)
    return MethodScores(names | labels, values, None, None, first.shape, chosen=chosen)


def over_families(scores: Sequence[MethodScores]) -> list[MethodScores]:
    """Return means over families, as family "all", of scores that differ in the family alone."""

    def key(one: MethodScores) -> tuple:
        ignored = {"family", "beta"} if one.labels.get("tuned") else {"family"}
        return tuple(sorted((k, str(v)) for k, v in one.labels.items() if k not in ignored))

    groups = [list(group) for _, group in groupby(sorted(scores, key=key), key=key)]
    return [mean_of(group, family="all") for group in groups if len(group) > 1]


def pooled_family(profile: Profile) -> str:
    """Return the name of the mean over all families: "all", or the one there is."""
    return "all" if len(profile.families) > 1 else profile.families[0]


def summarize(
    scores: Sequence[MethodScores],
    metrics: Sequence[str],
    profile: Profile,
    extra: Sequence[str] = (),
) -> pd.DataFrame:
    """Return rows of each method, objective (and all) and metric, pooled and by replicate."""
    records: list[dict] = []
    for shape in dict.fromkeys(one.shape for one in scores):
        records += _intervals([one for one in scores if one.shape == shape], metrics, profile)
    frame = pd.DataFrame.from_records(records).reindex(columns=[*COLUMNS, *extra, "pooled_beta"])
    return (
        frame.astype({"tuned": "boolean"} | COUNTS)
        .sort_values([*ORDER, "objective", "metric"], na_position="first", kind="stable")
        .drop(columns="pooled_beta")
        .round(dict.fromkeys(["ratio", "versus_ratio", "sd", *NUMBERS], 4))
        .reset_index(drop=True)
    )


def _intervals(
    scores: Sequence[MethodScores], metrics: Sequence[str], profile: Profile
) -> list[dict]:
    """Return the rows of methods with the same units, in any order."""
    shape = scores[0].shape
    cube = np.stack([one.values for one in scores], axis=-1)
    cube = cube.reshape(*shape, len(metrics), len(scores))
    records = []
    for number, objective in [*enumerate(OBJECTIVES[: shape[1]]), (None, "all")]:
        of_objective = cube if number is None else cube[:, [number]]
        deviations = standard_deviation(of_objective)
        rows: list[tuple] = [(POOLED, slice(None), mean_and_interval(of_objective, profile))]
        if shape[0] > 1:
            rows += [
                (str(r), r, _replicate_mean(of_objective[[r]], number is None, profile))
                for r in range(shape[0])
            ]
        counts = {
            "n": int(np.prod(of_objective.shape[:3])),
            "seeds": shape[3],
            "replicates": shape[0],
        }
        for i, one in enumerate(scores):
            labels = one.labels | {"objective": objective, "pooled_beta": one.labels.get("beta")}
            counts["ratio"] = one.ratio(number)
            counts["versus_ratio"] = one.versus.ratio(number) if one.versus else None
            for replicate, index, numbers in rows:
                common = labels | {"replicate": replicate}
                common |= counts if replicate == POOLED else {}
                for name, settings in one.chosen.items():
                    common[name] = common_value(settings[index, ... if number is None else number])
                alone, versus = replicate != POOLED, labels.get("versus")
                for m, metric in enumerate(metrics):
                    # of single replicates, figures and verdicts read only these; rows give others
                    if not alone or (number is None if versus else metric in SCORES):
                        sd = {} if alone else {"sd": deviations[m, i]}
                        estimate = dict(zip(NUMBERS, numbers[:, m, i], strict=False))
                        records.append(common | {"metric": metric} | estimate | sd)
    return records


def standard_deviation(values: np.ndarray) -> np.ndarray:
    """Return the standard deviation between the units of a replicate and objective.

    Args:
        values: The first four axes are those of `shape`; it is the root of the mean variance over
            the first two, and NaN where these have a single unit each.
    """
    units = values.reshape(*values.shape[:2], -1, *values.shape[4:])
    if units.shape[2] == 1:
        return np.full(values.shape[4:], np.nan)
    return np.sqrt(units.var(axis=2, ddof=1).mean(axis=(0, 1)))


def base_sd(summary: pd.DataFrame, metric: str, family: str = "all") -> float:
    """Return the standard deviation of a metric over responses of the base model of usual size.

    Args:
        summary: Summary with the base among its methods.
        metric: Metric of the summary.
        family: Family of models; "all" takes the mean variance over families.

    Raises:
        ValueError: The summary has no standard deviations, or none of the base.
    """
    base = {"method": "base", "model": "base", "objective": "all", "replicate": POOLED}
    labels = (
        base | {"best_of": 1, "metric": metric} | ({"family": family} if family != "all" else {})
    )
    rows = summary[(summary["versus"].fillna("") == "")] if "sd" in summary else summary[:0]
    for name, value in labels.items():
        rows = rows[rows[name] == value]
    if rows.empty:
        raise ValueError(
            f"expected a summary with the standard deviation of {metric} over base responses, as "
            "today's code writes it (make summaries), got one without"
        )
    return float(np.sqrt(rows["sd"].pow(2).mean()))


def differences_from_dense(
    summary: pd.DataFrame, profile: Profile, names: Sequence[str]
) -> pd.DataFrame:
    """Return paired differences of methods from dense steering in standard deviations (`base_sd`).

    Args:
        summary: Summary of a figure.
        profile: What was measured.
        names: Methods.

    Returns:
        Rows of each score, over all families and objectives.
    """
    family = pooled_family(profile)
    rows = summary[
        (summary["versus"] == "dense")
        & summary["method"].isin(names)
        & summary["metric"].isin(profile.available_metrics(SCORES))
        & (summary["objective"] == "all")
        & (summary["family"] == family)
    ]
    spreads = {metric: base_sd(summary, metric, family) for metric in rows["metric"].unique()}
    spread = rows["metric"].map(spreads).replace(0, np.nan)  # of an untrained model
    return rows.assign(**{name: rows[name] / spread for name in NUMBERS})


def reaching_margin(summary: pd.DataFrame, metric: str, family: str) -> float:
    """Return by how much a method may differ and still reach another one (see `base_sd`)."""
    return -TOLERANCE * base_sd(summary, metric, family)


def prompt_count(row: pd.Series, summary: pd.DataFrame) -> float:
    """Return the number of prompts behind an estimate; NaN if it does not rest on prompts.

    The `n` of times counts timing rounds: the prompts are those of the method's token positions.
    """
    count = row.get("n")
    if row.get("metric") == "seconds_ratio":
        same = ["family", "method", "search", "value_model", "target_ratio", "versus"]
        counted = summary[summary["metric"] == "positions_ratio"]
        equal = (counted[same] == row[same]) | (counted[same].isna() & row[same].isna())
        count = counted.loc[equal.all(axis=1), "n"].max()
    return float("nan") if pd.isna(count) else float(count)


def _replicate_mean(values: np.ndarray, with_interval: bool, profile: Profile) -> np.ndarray:
    """Return the mean of one replicate, with its interval if requested."""
    if with_interval:
        return mean_and_interval(values, profile)
    return values.reshape(np.prod(values.shape[:4]), -1).mean(0).reshape(1, *values.shape[4:])


@lru_cache(maxsize=4)
def resampling_weights(shape: tuple[int, int, int], count: int, seed: int) -> np.ndarray:
    """Return the bootstrap weights of a replicate's units (cached)."""
    return bootstrap_weights(shape, count, np.random.default_rng(seed))


def mean_and_interval(values: np.ndarray, profile: Profile) -> np.ndarray:
    """Return mean, low and high over the first four axes (those of `shape`): `(3, other axes)`."""
    (replicates, *shape), others = values.shape[:4], values.shape[4:]
    statistics = profile.statistics
    if replicates > 1:
        means = values.reshape(replicates, np.prod(shape), -1).mean(1)
        return t_interval(means, statistics.level).reshape(3, *others)
    weights = resampling_weights(tuple(shape), statistics.resamples, statistics.seed)
    bounds = bootstrap_interval(values.reshape(len(weights[0]), -1), weights, statistics.level)
    return bounds.reshape(3, *others)


def unit_indices(
    rows: pd.DataFrame, unit: str, units: int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Return each row's index among replicates × objectives × `units`, and that shape.

    Args:
        rows: With columns `replicate`, `objective` and `unit`.
        unit: The column that numbers the units of a replicate and objective.
        units: How many of them there are.
    """
    replicates = sorted(rows["replicate"].unique())
    objective = rows["objective"].map({name: i for i, name in enumerate(OBJECTIVES)})
    replicate = rows["replicate"].map({r: i for i, r in enumerate(replicates)}).to_numpy()
    stratum = replicate * len(OBJECTIVES) + objective.astype(int).to_numpy()
    return stratum * units + rows[unit].astype(int).to_numpy(), (
        len(replicates),
        len(OBJECTIVES),
        units,
        1,
    )


def ratio_draws(
    sums: np.ndarray, counts: np.ndarray, shape: tuple[int, int, int, int], profile: Profile
) -> np.ndarray:
    """Return the ratios of sums of each replicate, with their resamples.

    Args:
        sums: `(units, columns)` in the order of `shape`.
        counts: As `sums`.
        shape: (replicates, objectives, prompts, seeds).
        profile: Says how many resamples.

    Returns:
        `(replicates, 1 + resamples, columns)`; the first of each replicate is the estimate.
    """
    statistics = profile.statistics
    weights = resampling_weights(shape[1:], statistics.resamples, statistics.seed)
    whole = np.full((1, weights.shape[1]), 1 / weights.shape[1], np.float64)
    weights = np.concatenate([whole, weights])
    tops, bottoms = (x.reshape(shape[0], weights.shape[1], -1) for x in (sums, counts))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ tops) / (weights @ bottoms)


def estimate_rows(
    labels: dict,
    draws: np.ndarray,
    profile: Profile,
    chosen: Mapping[str, np.ndarray] | None = None,
) -> list[dict]:
    """Return the row of an estimate over all replicates, then one of each where there are several.

    Args:
        labels: Labels of the estimate; rows of single replicates are without POOLED_ONLY.
        draws: `(replicates, 1 + resamples)`, as `ratio_draws` returns them.
        profile: Says the level of the intervals.
        chosen: As in `MethodScores`.
    """
    level = profile.statistics.level
    of_replicates = [_bootstrap_bounds(draw, level) for draw in draws]
    pooled = of_replicates[0] if len(draws) == 1 else t_interval(draws[:, :1], level)[:, 0]
    alone = {name: value for name, value in labels.items() if name not in POOLED_ONLY}
    rows: list[tuple] = [(labels | {"replicate": POOLED}, pooled, slice(None))]
    if len(draws) > 1:
        rows += [
            (alone | {"replicate": str(number)}, numbers, number)
            for number, numbers in enumerate(of_replicates)
        ]
    return [
        row
        | {name: common_value(values[index]) for name, values in (chosen or {}).items()}
        | dict(zip(NUMBERS, map(float, numbers), strict=True))
        for row, numbers, index in rows
    ]


def _bootstrap_bounds(draws: np.ndarray, level: float) -> np.ndarray:
    """Return an estimate with its interval from the estimate and its resamples."""
    tail = (1 - level) / 2
    finite = np.isfinite(draws[1:]).any()
    bounds = np.nanquantile(draws[1:], [tail, 1 - tail]) if finite else (np.nan, np.nan)
    return np.array([draws[0], *bounds])


def metric_rows(labels: dict, draws: Mapping[str, np.ndarray], profile: Profile) -> list[dict]:
    """Return the rows of `estimate_rows` of several metrics, by their draws."""
    return [
        row
        for metric, of_metric in draws.items()
        for row in estimate_rows(labels | {"metric": metric}, of_metric, profile)
    ]
