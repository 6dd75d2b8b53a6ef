"""Train and measure the small `check` profile again, and tell a broken metric from noise.

Where every model comes out of training as the committed one, bit for bit, the machine rounds as
the one that measured the committed rows did, and the rows must be equal. Elsewhere rounding
differs, and training and sampling amplify it: each metric of each method is then compared by one
paired permutation test over prompts, with Holm's correction for all of them together.

References: Good, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005, chapter 3;
Holm, "A simple sequentially rejective multiple test procedure", 1979.
"""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from scipy.stats import permutation_test

from benchmarks.analysis import tables
from benchmarks.analysis.multiplicity import holm
from benchmarks.figures.base import Figure
from benchmarks.runtime.files import CACHE, SEAL, read_frame, read_json, write_frame, write_text
from benchmarks.runtime.fingerprints import row_code
from benchmarks.spec.profile import Profile, profile_digest

PROVENANCE = "provenance.json"  # of all tables of the profile together
METRICS = ("judge", "reward", "kl", "steered", "value_mean", "value_token", "worth")
TEST = ["method", "metric"]
LEVEL = 0.01  # chance of a false alarm in one run of the check
POWER = 0.8  # chance to see the difference that is called visible
RESAMPLES = 99_999
ROUNDING = 1e-5  # relative difference of thresholds that rounding alone explains
# Standard deviations between prompts that count as no change. Training again under AVX-512, AVX2
# and SSE4.1 moved the mean of no metric by more than 0.0033 (root mean square over cells).
TOLERANCE = 0.05


def run(profile: Profile, figures: Mapping[str, Figure], fresh: bool) -> int:
    """Return the exit code of comparing new rows with the committed ones, or replace these."""
    folder, start = tables.folder(profile), time.monotonic()
    committed = {} if fresh else read_committed(profile, figures)
    rows, models = measure_again(figures, profile)
    if fresh:
        write(profile, rows, models, time.monotonic() - start)
        print(f"check: rows of {len(rows)} tables written to {folder}")
        return 0
    expected = read_json(folder / PROVENANCE)["models"]
    faults = compare(rows, models, committed, expected)
    for fault in faults:
        print(f"changed: {fault}")
    print(f"check: {len(faults)} changes" if faults else "check: passed")
    return 1 if faults else 0


def read_committed(profile: Profile, figures: Mapping[str, Figure]) -> dict[str, pd.DataFrame]:
    """Read the committed rows of every figure."""
    folder = tables.folder(profile)
    for path in (folder / PROVENANCE, *(folder / f"{name}.parquet" for name in figures)):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, there is nothing to compare with: restore it, or run "
                "make check FRESH=1"
            )
    return {name: read_frame(folder / f"{name}.parquet") for name in figures}


def measure_again(
    figures: Mapping[str, Figure], profile: Profile
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Train and measure from nothing; return rows by figure, and hashes of models by name."""
    from benchmarks.engine import run

    rows: dict[str, pd.DataFrame] = {}

    def keep(name: str, frame: pd.DataFrame, _) -> None:
        rows[name] = as_stored(frame)

    run.measure_rows(figures, profile, range(1), run.RunOptions(), keep)
    seals = sorted((CACHE / profile.name / "models").glob(f"replicate*/*/{SEAL}"))
    models = {
        path.parent.name: tables.sha256(path)
        for path in seals
        if not path.parent.parent.is_symlink()
    }
    shutil.rmtree(CACHE / profile.name)
    return rows, models


def as_stored(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows as they come back from a file: types that a file does not keep apart are one."""
    with TemporaryDirectory() as folder:
        write_frame(Path(folder) / "rows.parquet", frame)
        return read_frame(Path(folder) / "rows.parquet")


def write(
    profile: Profile, rows: dict[str, pd.DataFrame], models: dict[str, str], seconds: float
) -> None:
    """Write what later runs compare with."""
    folder = tables.folder(profile)
    shutil.rmtree(folder, ignore_errors=True)
    for name, frame in rows.items():
        write_frame(folder / f"{name}.parquet", frame)
    provenance = tables.environment_info("benchmarks") | {
        "profile": profile.name,
        "profile_digest": profile_digest(profile),
        "code_digest": row_code(profile),
        "replicates": [0],
        "wall_seconds": round(seconds, 1),
        "models": models,
        "sha256": {path.name: tables.sha256(path) for path in sorted(folder.glob("*.parquet"))},
    }
    write_text(folder / PROVENANCE, json.dumps(provenance, indent=1, sort_keys=True) + "\n")


def compare(
    rows: dict[str, pd.DataFrame],
    models: dict[str, str],
    committed: dict[str, pd.DataFrame],
    expected: dict[str, str],
) -> list[str]:
    """Compare exactly where all models are the committed ones, else by paired tests.

    Args:
        rows: New rows by figure, from `models` (hashes by name).
        committed: Committed rows by figure, from the `expected` models.

    Returns:
        One sentence per difference.
    """
    equal = sum(models.get(name) == digest for name, digest in expected.items())
    print(f"models: {equal} of {len(expected)} are the committed ones to the last bit")
    exact = models == expected
    differing = row_differences(rows, committed)
    print(f"rows: {len(rows) - len(differing)} of {len(rows)} tables are equal to the last digit")
    if not differing:
        return []
    results, missing = paired_tests(per_prompt(rows), per_prompt(committed))
    print(results.to_string(index=False, float_format="{:.3g}".format))
    faults = missing + [
        f"{test.metric} of {test.method} moved by {test.difference:+.3g} (p = {test.p:.1g})"
        for test in results[results["rejected"]].itertuples()
    ]
    return [f"by the same models, {text}" for text in differing] + faults if exact else faults


def row_differences(rows: dict[str, pd.DataFrame], committed: dict[str, pd.DataFrame]) -> list[str]:
    """Name the tables, and their columns, that differ in any digit; times aside.

    Thresholds may differ by ROUNDING: a predictor's matrix products depend on where its numbers lie
    in memory, in the last bit.
    """
    differing = []
    for name, expected in committed.items():
        one, other = (
            frame.drop(columns="seconds", errors="ignore").reset_index(drop=True).astype(object)
            for frame in (rows[name], expected)
        )
        if set(one) != set(other) or len(one) != len(other):
            differing.append(f"{name} has other columns or another number of rows")
            continue
        equal = (one == other[one.columns]) | (one.isna() & other[one.columns].isna())
        if "threshold" in one:
            thresholds = (frame["threshold"].to_numpy(float) for frame in (one, other))
            equal["threshold"] |= np.isclose(*thresholds, rtol=ROUNDING, atol=0)
        if not equal.all(axis=None):
            differing.append(f"{name} differs in {', '.join(equal.columns[~equal.all()])}")
    return differing


def per_prompt(rows: dict[str, pd.DataFrame]) -> pd.DataFrame:
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
    return long.groupby([*TEST, "prompt", "seed"])["value"].mean().unstack("seed")


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
