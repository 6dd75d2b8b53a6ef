"""Train and measure the small `check` profile again, and tell a broken metric from noise.

Committed are the hashes of the models, hashes of the columns of every table, and the metrics by
method and prompt. Where every model comes out of training as the committed one, bit for bit, the
machine rounds as the one that measured did, and the columns must be equal. Elsewhere rounding
differs, and training and sampling amplify it: each metric of each method is then compared by one
paired permutation test over prompts, with Holm's correction for all of them together.

References: Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005, chapter 3;
Holm, "A simple sequentially rejective multiple test procedure", 1979.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np
import pandas as pd
from scipy.stats import permutation_test

from benchmarks.analysis import tables
from benchmarks.analysis.multiplicity import holm
from benchmarks.figures.base import Figure
from benchmarks.runtime.files import CACHE, SEAL, read_frame, write_frame, write_text
from benchmarks.runtime.fingerprints import row_code
from benchmarks.spec.profile import Profile, profile_digest

PROVENANCE = "provenance.json"  # with the hashes of models and columns
METRICS_FILE = "metrics.parquet"
METRICS = ("judge", "reward", "kl", "steered", "value_mean", "value_token", "worth")
TEST = ["method", "metric"]
UNIT = [*TEST, "prompt", "seed"]
LEVEL = 0.01  # chance of a false alarm in one run of the check
POWER = 0.8  # chance to see the difference that is called visible
RESAMPLES = 99_999
# Times differ, and so do thresholds in their last digits: a predictor's matrix products depend on
# where its numbers lie in memory.
NOT_COMPARED = ("seconds", "threshold")
# Standard deviations between prompts that count as no change. Training again under AVX-512, AVX2
# and SSE4.1 moved the mean of no metric by more than 0.0033 (root mean square over cells).
TOLERANCE = 0.05


@dataclass(frozen=True)
class Measurement:
    """Hashes and metrics by which two measurements of the profile are compared.

    Attributes:
        models: Hashes of the trained models, by name.
        columns: Hashes of the columns of each table, by its name.
        metrics: As `per_prompt` returns them.
    """

    models: dict[str, str]
    columns: dict[str, dict[str, str]]
    metrics: pd.DataFrame

    @classmethod
    def of(cls, rows: Mapping[str, pd.DataFrame], models: dict[str, str]) -> Self:
        """Describe measured rows, by figure, and the models that they come from."""
        return cls(
            models, {name: column_hashes(frame) for name, frame in rows.items()}, per_prompt(rows)
        )


def run(profile: Profile, figures: Mapping[str, Figure], fresh: bool) -> int:
    """Return the exit code of comparing new rows with the committed ones, or replace these."""
    folder, start = tables.folder(profile), time.monotonic()
    committed = None if fresh else read_committed(profile)
    measured = measure_again(figures, profile)
    if committed is None:
        write(profile, measured, time.monotonic() - start)
        print(f"check: {len(measured.columns)} tables described in {folder}")
        return 0
    faults = compare(measured, committed)
    for fault in faults:
        print(f"changed: {fault}")
    print(f"check: {len(faults)} changes" if faults else "check: passed")
    return 1 if faults else 0


def read_committed(profile: Profile) -> Measurement:
    """Read the committed measurement.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is damaged.
    """
    paths = [tables.folder(profile) / name for name in (PROVENANCE, METRICS_FILE)]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, there is nothing to compare with: restore it, or run "
                "make check FRESH=1"
            )
    provenance = tables.read_entries(paths[0])
    tables.check_files(paths[0].parent, paths[0].stem, provenance)
    metrics = read_frame(paths[1])
    lacking = {
        paths[0]: {"models", "columns"} - provenance.keys(),
        paths[1]: {*UNIT, "value"} - set(metrics),
    }
    for path, names in lacking.items():
        if names:
            raise ValueError(
                f"{path} lacks {', '.join(sorted(names))}: restore it, or run make check FRESH=1"
            )
    metrics = metrics.set_index(UNIT)["value"].unstack("seed")
    return Measurement(provenance["models"], provenance["columns"], metrics)


def measure_again(figures: Mapping[str, Figure], profile: Profile) -> Measurement:
    """Train and measure from nothing."""
    from benchmarks.engine import run

    rows: dict[str, pd.DataFrame] = {}

    def keep(name: str, frame: pd.DataFrame, _) -> None:
        rows[name] = frame

    run.measure_rows(figures, profile, range(1), run.RunOptions(), keep)
    seals = sorted((CACHE / profile.name / "models").glob(f"replicate*/*/{SEAL}"))
    models = {
        path.parent.name: tables.sha256(path)
        for path in seals
        if not path.parent.parent.is_symlink()
    }
    shutil.rmtree(CACHE / profile.name)
    return Measurement.of(rows, models)


def column_hashes(frame: pd.DataFrame) -> dict[str, str]:
    """Return the SHA-256 of each column, as text in the order of the rows."""
    return {
        name: hashlib.sha256(column.to_csv(index=False).encode()).hexdigest()[:16]
        for name, column in frame.items()
        if name not in NOT_COMPARED
    }


def write(profile: Profile, measured: Measurement, seconds: float) -> None:
    """Write what later runs compare with."""
    folder = tables.folder(profile)
    shutil.rmtree(folder, ignore_errors=True)
    long = measured.metrics.stack().rename("value").reset_index()
    write_frame(folder / METRICS_FILE, long)
    provenance = tables.environment_info("benchmarks") | {
        "profile": profile.name,
        "profile_digest": profile_digest(profile),
        "code_digest": row_code(profile),
        "replicates": [0],
        "wall_seconds": round(seconds, 1),
        "models": measured.models,
        "columns": measured.columns,
        "sha256": {METRICS_FILE: tables.sha256(folder / METRICS_FILE)},
    }
    write_text(folder / PROVENANCE, json.dumps(provenance, indent=1, sort_keys=True) + "\n")


def compare(measured: Measurement, committed: Measurement) -> list[str]:
    """Compare exactly where all models are the committed ones, else by paired tests.

    Returns:
        One sentence per difference.
    """
    equal = sum(measured.models.get(name) == sha for name, sha in committed.models.items())
    print(f"models: {equal} of {len(committed.models)} are the committed ones to the last bit")
    exact = equal == len(committed.models)
    differing = column_differences(measured.columns, committed.columns)
    count = len(committed.columns)
    print(f"rows: {count - len(differing)} of {count} tables are equal to the last digit")
    faults = [
        f"{name} has no committed columns to compare with: make check FRESH=1 adds them"
        for name in sorted(measured.columns.keys() - committed.columns.keys())
    ]
    if not differing:
        return faults
    results, missing = paired_tests(measured.metrics, committed.metrics)
    print(results.to_string(index=False, float_format="{:.3g}".format))
    faults += missing + [
        f"{test.metric} of {test.method} moved by {test.difference:+.3g} (p = {test.p:.1g})"
        for test in results[results["rejected"]].itertuples()
    ]
    return faults + [f"by the same models, {text}" for text in differing if exact]


def column_differences(
    measured: Mapping[str, dict[str, str]], committed: Mapping[str, dict[str, str]]
) -> list[str]:
    """Name the tables that differ, and their columns; arguments as in `Measurement`."""
    differing = []
    for name, expected in committed.items():
        columns = measured.get(name, {})
        names = sorted(columns.keys() | expected.keys())
        if changed := [c for c in names if columns.get(c) != expected.get(c)]:
            differing.append(f"{name} differs in {', '.join(changed)}")
    return differing


def per_prompt(rows: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Pool all cells of a method.

    Returns:
        Means, indexed by method, metric and prompt, with a column for each sampling seed.
    """
    frames = []
    for frame in rows.values():
        if not {"judge", "worth"} & set(frame):
            continue
        frame = frame if "seconds" not in frame else frame[frame["seconds"].isna()]
        method = frame["method"].astype(str)
        if "search" in frame:
            searched = (frame["search"] == "best-of") & (frame["best_of"] > 1)
            method = method.where(~searched, method + ", best of several")
        labels = pd.DataFrame(
            {
                "method": method,
                "prompt": frame["objective"].astype(str) + " " + frame["prompt"].astype(str),
                "seed": frame.get("seed", 0),
            }
        )
        values = frame[[name for name in METRICS if name in frame]].astype(float)
        frames.append(
            labels.join(values).melt(["method", "prompt", "seed"], values, "metric").dropna()
        )
    long = pd.concat(frames, ignore_index=True)
    return long.groupby(UNIT)["value"].mean().unstack("seed")


def paired_tests(again: pd.DataFrame, committed: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Test each metric of each method on the prompts that both runs answered.

    Args:
        again: As `per_prompt` returns it.
        committed: The same of the committed rows.

    Returns:
        A row per test: mean before, difference, p (NaN where too few prompts could ever reject),
        visible (the smallest difference that would have been seen with POWER) and whether Holm
        rejects; and a sentence for each metric that only one run has.
    """
    missing = [
        f"{metric} of {method} {text}"
        for one, other, text in (
            (committed, again, "is no longer measured on every prompt"),
            (again, committed, "is measured on prompts that have no committed value"),
        )
        for method, metric in one.index.difference(other.index).droplevel("prompt").unique()
    ]
    index = again.index.intersection(committed.index)
    again, committed = again.loc[index], committed.loc[index]
    varies = committed.groupby(TEST).transform(np.ptp).max(axis=1) > 0
    moved = (again != committed).any(axis=1).groupby(TEST).transform("any")
    again, committed = (frame[varies | moved] for frame in (again, committed))
    groups = committed.groupby(TEST)
    fewest = int(np.ceil(np.log2(2 * max(1, groups.ngroups) / LEVEL)))
    records = []
    for (method, metric), before in groups:
        difference = (again.loc[before.index] - before).mean(axis=1).to_numpy()
        tolerance = TOLERANCE * before.mean(axis=1).std()
        # two runs that sample independently differ by this much in a prompt
        spread = np.sqrt(2 * before.var(axis=1).mean() / before.shape[1])
        tested = len(before) >= fewest
        records.append(
            {
                "method": method,
                "metric": metric,
                "before": before.mean(axis=None),
                "difference": difference.mean(),
                "visible": visible(difference, spread, tolerance, groups.ngroups),
                "p": p_value(difference, tolerance) if tested else np.nan,
            }
        )
    results = pd.DataFrame.from_records(records)
    tested = results["p"].notna()
    results["rejected"] = tested
    results.loc[tested, "rejected"] = holm(results.loc[tested, "p"]) <= LEVEL
    return results, missing


def p_value(difference: np.ndarray, tolerance: float) -> float:
    """Return the p-value that the mean `(prompts,)` lies within the tolerance around zero."""
    mean = difference.mean()
    if abs(mean) <= tolerance or not difference.any():
        return 1.0
    shifted = difference - np.sign(mean) * tolerance
    test = permutation_test(
        (shifted,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=10_000,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def visible(difference: np.ndarray, spread: float, tolerance: float, tests: int) -> float:
    """Return the smallest mean difference that would be rejected with probability POWER.

    Args:
        difference: Differences by prompt, `(prompts,)`.
        spread: Standard deviation of a prompt's difference where runs sample independently.
        tolerance: Mean difference that counts as no change.
        tests: Number of tests that share LEVEL.
    """
    normal, count = NormalDist(), len(difference)
    critical, power = normal.inv_cdf(1 - LEVEL / tests / 2), normal.inv_cdf(POWER)
    if count <= critical**2:
        return np.nan
    # flipped signs of shifted data spread by √(shift² + noise²): √n·shift over it stays below √n
    noise = max(difference.std(), spread)
    return tolerance + noise * (critical / np.sqrt(count - critical**2) + power / np.sqrt(count))
