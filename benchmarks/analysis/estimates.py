"""From rows to estimates: what every figure's summary has in common.

An entry is one method under one setting, with a value of each metric for every unit (a prompt under a sampling seed, of a
replicate and objective). Entries on the same units can be subtracted, unit by unit, which pairs them: by prompt and by noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import pandas as pd

from benchmarks.analysis.bootstrap import bootstrap_weights, interval
from benchmarks.spec.cells import OBJECTIVES
from benchmarks.spec.profile import Profile

UNIT = ["replicate", "objective", "prompt", "seed"]
METRICS = {
    "judge": "judge score",
    "content": "judge score without fluency",
    "reward": "evaluation reward (SD)",
    "fluency_errors": "share with fluency errors",
    "kl": "KL per response (nats)",
    "kl_per_token": "KL per token (nats)",
    "surprise": "−ln π of the response (nats)",
    "distinct": "distinct bigrams",
    "tokens": "tokens",
}
LABELS = [
    "family",
    "model",
    "value_model",
    "method",
    "gate",
    "target_ratio",
    "beta",
    "best_of",
    "search",
    "tuned",
    "floor",
    "tau",
]
COLUMNS = [
    "objective", "family", "model", "value_model", "method", "gate", "target_ratio", "ratio", "beta", "best_of", "metric",
    "estimate", "low", "high", "n", "seeds", "replicates", "tuned", "floor", "tau", "search", "matched", "versus", "versus_ratio",
    "beta_by_replicate", "estimate_by_replicate", "low_by_replicate", "high_by_replicate",
]  # fmt: skip


def of_records(
    records: Sequence[dict], further: Sequence[str] = (), digits: int = 4
) -> pd.DataFrame:
    """A summary of rows that are made one by one: the columns that every summary has, and further ones; so many digits."""
    frame = pd.DataFrame.from_records(records).reindex(columns=[*COLUMNS, *further])
    return frame.round(dict.fromkeys(("estimate", "low", "high"), digits))


def label(profile: Profile, metric: str) -> str:
    """Return the label of a metric on an axis."""
    return profile.reward_label if metric == "reward" else METRICS[metric]


def plural(count: int, what: str) -> str:
    """As many of them, in words."""
    return f"{count} {what}{'s' if count != 1 else ''}"


@dataclass(frozen=True)
class Entry:
    """labels: what it is. values: `(units, metrics)`. steered, tokens: `(units,)` each, of which the realised ratio is made; None where
    it has none. shape: (replicates, objectives, prompts, seeds) of the units, in this order."""

    labels: dict
    values: np.ndarray
    steered: np.ndarray | None
    tokens: np.ndarray | None
    shape: tuple[int, int, int, int]
    versus: Entry | None = None

    def ratio(self, objective: int | None) -> float | None:
        """Realised share of steered tokens, of one objective or of all."""
        if self.tokens is None:
            return None
        part = [
            x.reshape(self.shape)[:, slice(None) if objective is None else objective].sum()
            for x in (self.steered, self.tokens)
        ]
        return float(part[0] / part[1])


def entries(rows: pd.DataFrame, metrics: Sequence[str]) -> dict[tuple, Entry]:
    """Each method and setting of the rows, by its LABELS (β: as it was asked for, 0 where it was tuned).

    Errors: ValueError where one was not measured on the same prompts and seeds throughout.
    """
    rows = with_rates(rows).assign(
        tau=rows["threshold"].where(~rows["gate"].isin(["never"]) & asked_threshold(rows))
    )
    rows = rows.assign(asked=rows["beta"].where(~rows["tuned"].astype(bool), 0.0))
    keys = ["asked" if label == "beta" else label for label in LABELS]
    found = {}
    for key, group in rows.groupby(keys, sort=True, observed=True, dropna=False):
        group = group.sort_values(UNIT, kind="stable")
        shape = tuple(group[name].nunique() for name in UNIT)
        if len(group) != np.prod(shape) or group.duplicated(UNIT).any():
            raise ValueError(
                f"every method must be measured on the same prompts and seeds, {dict(zip(keys, key, strict=True))} was not"
            )
        labels = dict(zip(LABELS, key, strict=True))
        betas = group.groupby("replicate")["beta"].first()
        steered = labels["gate"] != "never"
        labels["beta"] = float(betas.iloc[0]) if steered and betas.nunique() == 1 else None
        labels["beta_by_replicate"] = "|".join(f"{beta:g}" for beta in betas) if steered else ""
        labels["tau"] = None if pd.isna(labels["tau"]) else labels["tau"]
        values = group[list(metrics)].to_numpy(np.float64)
        found[key] = Entry(
            labels, values, group["steered"].to_numpy(float), group["tokens"].to_numpy(float), shape
        )
    return found


def asked_threshold(rows: pd.DataFrame) -> pd.Series:
    """Where the threshold was asked for and not found: it goes without a target ratio."""
    return rows["target_ratio"] == 0


def with_rates(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(kl_per_token=rows["kl"] / rows["tokens"]) if "kl" in rows else rows


def shown_as(method: str, search: str) -> str:
    """The name under which a method is drawn, and taken against: its own, but for best-of-N's."""
    return "best-of-n" if search == "best-of" else method


def select(found: Iterable[Entry], **labels) -> list[Entry]:
    """The entries with these labels; a tuple of values means any of them."""

    def fits(entry: Entry) -> bool:
        return all(
            entry.labels.get(k) in v if isinstance(v, tuple) else entry.labels.get(k) == v
            for k, v in labels.items()
        )

    return [entry for entry in found if fits(entry)]


def the(found: Iterable[Entry], **labels) -> Entry:
    """The one entry with these labels. Errors: LookupError if there is none, or several."""
    fitting = select(found, **labels)
    if len(fitting) != 1:
        raise LookupError(f"expected one entry with {labels}, found {len(fitting)}")
    return fitting[0]


def difference(left: Entry, right: Entry, **labels) -> Entry:
    """left − right, unit by unit; named as `left`, against the method of `right`. Where `right` has fewer prompts, on those."""
    prompts = min(left.shape[2], right.shape[2])
    left, right = first_prompts(left, prompts), first_prompts(right, prompts)
    if left.shape != right.shape:
        raise ValueError(f"a difference needs the same units, got {left.shape} and {right.shape}")
    names = left.labels | {"versus": right.labels["method"]} | labels
    return Entry(
        names, left.values - right.values, left.steered, left.tokens, left.shape, versus=right
    )


def first_prompts(entry: Entry, prompts: int) -> Entry:
    """The entry on its first so many prompts of each objective."""
    if entry.shape[2] == prompts:
        return entry
    shape = (*entry.shape[:2], prompts, entry.shape[3])

    def cut(x: np.ndarray | None) -> np.ndarray | None:
        if x is None:
            return None
        return x.reshape(*entry.shape, *x.shape[1:])[:, :, :prompts].reshape(
            np.prod(shape), *x.shape[1:]
        )

    return Entry(entry.labels, cut(entry.values), cut(entry.steered), cut(entry.tokens), shape)


def mean_of(many: Sequence[Entry], **labels) -> Entry:
    """Their mean, unit by unit, which has no realised ratio of its own. Labels in which they differ are left empty, but for `labels`."""
    first = many[0].labels
    names = {k: v for k, v in first.items() if all(e.labels.get(k) == v for e in many)} | labels
    return Entry(names, np.mean([e.values for e in many], axis=0), None, None, many[0].shape)


def over_families(found: Sequence[Entry]) -> list[Entry]:
    """Of entries that differ in their family alone, the mean over families, as family "all"."""

    def key(entry: Entry) -> tuple:
        names = {
            k: v
            for k, v in entry.labels.items()
            if k not in ("family", "beta_by_replicate", "chosen")
        }
        return tuple(
            sorted(
                (k, str(v)) for k, v in names.items() if not (k == "beta" and names.get("tuned"))
            )
        )

    pooled = []
    for _, group in groupby(sorted(found, key=key), key=key):
        many = list(group)
        if len(many) > 1:
            pooled.append(mean_of(many, family="all"))
    return pooled


def pooled_family(profile: Profile) -> str:
    """What the mean over all families goes by: "all", or the one there is."""
    return "all" if len(profile.families) > 1 else profile.families[0]


def summarize(
    found: Sequence[Entry], metrics: Sequence[str], profile: Profile, extra: Sequence[str] = ()
) -> pd.DataFrame:
    """A row for each entry, objective (and all of them) and metric: estimate with its interval, pooled and of each replicate."""
    records: list[dict] = []
    for shape in dict.fromkeys(entry.shape for entry in found):
        part = [entry for entry in found if entry.shape == shape]
        records += _intervals(part, shape, metrics, profile)
    frame = pd.DataFrame.from_records(records).reindex(columns=[*COLUMNS, *extra])
    rounded = dict.fromkeys(["ratio", "versus_ratio", "estimate", "low", "high"], 4)
    order = [
        "family",
        "model",
        "value_model",
        "method",
        "gate",
        "target_ratio",
        "beta",
        "best_of",
        "tuned",
        "floor",
        "tau",
        "versus",
    ]
    frame["tuned"] = frame["tuned"].astype("boolean")
    return (
        frame.sort_values(
            [*order, *extra, "objective", "metric"], na_position="first", kind="stable"
        )
        .round(rounded)
        .reset_index(drop=True)
    )


def _intervals(
    found: Sequence[Entry], shape: tuple, metrics: Sequence[str], profile: Profile
) -> list[dict]:
    cube = np.stack([entry.values for entry in found], axis=-1).reshape(
        *shape, len(metrics), len(found)
    )
    records = []
    for number, objective in [*enumerate(OBJECTIVES[: shape[1]]), (None, "all")]:
        part = cube if number is None else cube[:, [number]]
        pooled = ends_of(part, profile)
        single = (
            [ends_of(part[[r]], profile) for r in range(shape[0])] if shape[0] > 1 else [pooled]
        )
        for i, entry in enumerate(found):
            common = dict(entry.labels)
            common |= {
                "ratio": entry.ratio(number),
                "versus_ratio": entry.versus.ratio(number) if entry.versus else None,
            }
            common |= {
                "objective": objective,
                "n": int(np.prod(part.shape[:3])),
                "seeds": shape[3],
                "replicates": shape[0],
            }
            for m, metric in enumerate(metrics):
                numbers = dict(
                    zip(
                        ("estimate", "low", "high"),
                        (float(end[m, i]) for end in pooled),
                        strict=True,
                    )
                )
                told = (
                    ("estimate", "low", "high") if number is None else ("estimate",)
                )  # single replicates are judged on all objectives
                numbers |= {
                    f"{name}_by_replicate": "|".join(f"{ends[e][m, i]:.4f}" for ends in single)
                    for e, name in enumerate(told)
                }
                records.append(common | {"metric": metric} | numbers)
    return records


@lru_cache(maxsize=4)
def resamples(shape: tuple[int, int, int, int], count: int, seed: int) -> np.ndarray:
    return bootstrap_weights(shape, count, np.random.default_rng(seed))


def ends_of(part: np.ndarray, profile: Profile) -> list[np.ndarray]:
    """Mean and interval over the first four axes (replicates, objectives, prompts, seeds): three arrays of the other axes."""
    statistics = profile.statistics
    weights = resamples(part.shape[:4], statistics.resamples, statistics.seed)
    ends = interval(part.reshape(len(weights[0]), -1), weights, statistics.level)
    return [end.reshape(part.shape[4:]) for end in ends]


def unit_places(
    rows: pd.DataFrame, unit: str, units: int
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The number of each row's unit among replicates × objectives × `units`, and that shape. unit: a column."""
    replicates = sorted(rows["replicate"].unique())
    objective = (
        rows["objective"].map({name: i for i, name in enumerate(OBJECTIVES)}).astype(int).to_numpy()
    )
    replicate = rows["replicate"].map({r: i for i, r in enumerate(replicates)}).to_numpy()
    place = (replicate * len(OBJECTIVES) + objective) * units + rows[unit].astype(int).to_numpy()
    return place, (len(replicates), len(OBJECTIVES), units, 1)


def ratio_draws(
    sums: np.ndarray, counts: np.ndarray, shape: tuple[int, int, int, int], profile: Profile
) -> np.ndarray:
    """Ratios of sums, `(1 + replicates, 1 + resamples, columns)`: pooled and of each replicate, the estimate and then its resamples.

    sums, counts: `(units, columns)` in the order of `shape`.
    """
    statistics, many = profile.statistics, []
    for replicate in (None, *range(shape[0])):
        part = [
            x.reshape(*shape, -1) if replicate is None else x.reshape(*shape, -1)[[replicate]]
            for x in (sums, counts)
        ]
        weights = resamples(part[0].shape[:4], statistics.resamples, statistics.seed)
        top, bottom = (x.reshape(weights.shape[1], -1) for x in part)
        with np.errstate(invalid="ignore", divide="ignore"):
            many.append(
                np.concatenate(
                    [(top.sum(0) / bottom.sum(0))[None], (weights @ top) / (weights @ bottom)]
                )
            )
    return np.stack(many)


def ends(draws: np.ndarray, profile: Profile) -> dict:
    """Estimate and interval from `(1 + replicates, 1 + resamples)`, as `ratio_draws` gives them."""
    tail = (1 - profile.statistics.level) / 2
    found = [
        (x[0], *np.nanquantile(x[1:], [tail, 1 - tail]))
        if np.isfinite(x[1:]).any()
        else (x[0], np.nan, np.nan)
        for x in draws
    ]
    names = ("estimate", "low", "high")
    by_replicate = {
        f"{name}_by_replicate": "|".join(f"{end[i]:.4f}" for end in found[1:])
        for i, name in enumerate(names)
    }
    return dict(zip(names, map(float, found[0]), strict=True)) | by_replicate
