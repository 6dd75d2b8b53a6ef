"""`make check`: tells a broken metric from noise.

Three parts. What is exact (`exact.py`) must be what results/check/reference/exact.json says. The committed tables must follow from their
rows (`verify.py`). The whole road of the check profile, trained and measured anew from nothing, must give the rows of the committed
tables, or rows whose metrics differ from them by no more than noise (`regression.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import tables
from benchmarks.analysis.estimates import asked_threshold
from benchmarks.checks import regression
from benchmarks.checks.verify import CHECKED, verify_profile
from benchmarks.figures.base import Figure
from benchmarks.runtime.files import CACHE, SEAL, read_frame, read_json, write_text
from benchmarks.runtime.workers import threads
from benchmarks.spec.profile import Profile, load_profile

EXACT, MODELS, RETRAINING = (
    "exact.json",
    "models.json",
    "retraining.csv",
)  # in results/check/reference
LABELS = (
    "experiment", "family", "model", "value_model", "method", "gate", "target_ratio", "beta", "tau", "tuned", "floor", "search", "best_of",
)  # fmt: skip
PLACES = {
    "replicate",
    "objective",
    "prompt",
    "seed",
    "step",
    "rank",
    "state",
    "token_ids",
    "base_token",
    "threshold",
    "seconds",
    *LABELS,
}
CELL = ["cell", "metric"]
NEGLIGIBLE = (
    0.05  # standard deviations between prompts: less than this is no change, however sure it is
)
OTHER = 0.01  # standard deviations between prompts: by more than this a prompt's value is another
SHARE, FEW = (
    0.015,
    3,
)  # of the prompts, and besides: so many may have another value by rounding, whatever was seen of that
LONGER = 1.2  # times what a plain response takes, at least, where more is computed
CELL_SHARE = 0.25  # the same of a single cell, where few prompts and models that learned briefly make more of rounding


def run(figures: Mapping[str, Figure], fresh: bool) -> int:
    """fresh: measures what is compared with, instead. Exit code: 0, or 1 where something has changed."""
    profile = load_profile(CHECKED)
    if fresh:
        renew(figures, profile)
        return 0
    needed = [
        tables.folder(profile) / f"{name}.{suffix}"
        for name in figures
        for suffix in ("json", "parquet")
    ]
    for path in (*needed, *(reference(profile) / name for name in (EXACT, MODELS, RETRAINING))):
        if not path.exists():
            how = (
                "scripts/measure_retraining.py" if path.name == RETRAINING else "make check FRESH=1"
            )
            raise FileNotFoundError(
                f"{path} is missing, there is nothing to compare with: restore it, or run {how}"
            )
    tables.tidy(profile)
    faults = [
        *exact_faults(profile),
        *committed_faults(profile, figures),
        *measured_faults(profile, figures),
    ]
    for fault in faults:
        print(f"changed: {fault}")
    print(f"check: {len(faults)} changes" if faults else "check: passed")
    return 1 if faults else 0


def reference(profile: Profile) -> Path:
    return tables.folder(profile) / tables.REFERENCE


def renew(figures: Mapping[str, Figure], profile: Profile) -> None:
    """Measures and computes everything anew and writes it where the next check looks."""
    from benchmarks.checks import exact
    from benchmarks.engine import run

    shutil.rmtree(CACHE / profile.name, ignore_errors=True)
    run.run_experiment(figures, profile, range(1), run.RunOptions())
    # after that, for some of it is computed of the rows
    write_text(
        reference(profile) / EXACT,
        json.dumps(tables.circumstances("benchmarks") | {"values": exact.compute()}) + "\n",
    )
    print(f"exact: written to {EXACT}")
    write_text(
        reference(profile) / MODELS,
        json.dumps({"arithmetic": arithmetic(), "models": models_of(profile)}, indent=1) + "\n",
    )
    shutil.rmtree(CACHE / profile.name)


# --- what is exact, and what is committed


def exact_faults(profile: Profile, shown: int = 10) -> list[str]:
    from benchmarks.checks import exact

    expected = read_json(reference(profile) / EXACT)["values"]
    found = exact.compute()
    faults = []
    for section in sorted({*expected, *found}):
        wrong = list(
            exact.differences(found.get(section, {}), expected.get(section, {}), f"exact/{section}")
        )
        cases = {text.split("/")[2] for text in wrong if text.count("/") > 1}
        about = f"{len(wrong)} differences in {len(cases)} of its cases" if wrong else "as expected"
        print(f"exact/{section}: {about}")
        faults += wrong[:shown] + (
            [f"exact/{section}: and {len(wrong) - shown} more"] if len(wrong) > shown else []
        )
    return faults


def committed_faults(profile: Profile, figures: Mapping[str, Figure]) -> list[str]:
    found = [(name, faults) for name, faults in verify_profile(profile, figures) if name in figures]
    faults = [f"{name}: {fault}" for name, many in found for fault in many]
    print(f"summaries: {len(found)} tables made again from their rows, {len(faults)} faults")
    return faults


# --- what is measured


def measure_again(
    figures: Mapping[str, Figure], profile: Profile
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """The rows of every figure, from nothing, and `models_of`; of an interrupted run what was finished counts."""
    from benchmarks.engine import run

    rows: dict[str, pd.DataFrame] = {}
    run.measure_rows(
        figures,
        profile,
        range(1),
        run.RunOptions(),
        lambda name, found, _: rows.update({name: found}),
    )
    models = models_of(profile)
    shutil.rmtree(CACHE / profile.name)
    return rows, models


def arithmetic() -> str:
    """What some steps of training and some products of oneDNN come to on this processor, to the last bit, as a digest: by transformers
    and torch alone, so that no change of this project's code can make a machine look like another."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    shape = {
        "vocab_size": 681,
        "hidden_size": 48,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    found, rng = hashlib.sha256(), np.random.default_rng(0)
    with threads(1):
        for config_class, model_class in (
            (Qwen3Config, Qwen3ForCausalLM),
            (LlamaConfig, LlamaForCausalLM),
        ):
            with torch.random.fork_rng():
                model = model_class(
                    config_class(
                        **shape, num_key_value_heads=1, head_dim=12, tie_word_embeddings=True
                    )
                )
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.from_numpy(rng.normal(0.05, 0.05, parameter.shape)))
            optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
            for _ in range(10):
                ids = torch.from_numpy(rng.integers(0, 681, (32, 50)))
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            for parameter in model.parameters():
                found.update(parameter.detach().numpy().tobytes())
        if (
            torch.backends.mkldnn.is_available()
        ):  # lab models multiply by it (lab/linear.py), and it may know other instructions
            for rows, inputs, outputs in (
                (1563, *sizes) for sizes in permutations((32, 48, 64, 128, 160, 681), 2)
            ):
                x, weight = (
                    torch.from_numpy(rng.normal(size=shape)).float()
                    for shape in ((rows, inputs), (outputs, inputs))
                )
                found.update(
                    torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
                    .numpy()
                    .tobytes()
                )
    return found.hexdigest()


def models_of(profile: Profile) -> dict[str, str]:
    """The hash of every trained model (its checksums, that is), by its name."""
    folders = (CACHE / profile.name / "models").glob(f"replicate*/*/{SEAL}")
    return {
        path.parent.name: tables.sha256(path)
        for path in sorted(folders)
        if not path.parent.parent.is_symlink()
    }


def measured_faults(profile: Profile, figures: Mapping[str, Figure]) -> list[str]:
    again, models = measure_again(figures, profile)
    committed = {name: read_frame(tables.folder(profile) / f"{name}.parquet") for name in figures}
    changed = {name: changed_columns(again[name], committed[name]) for name in figures}
    same = sum(not columns for columns in changed.values())
    print(f"rows: {same} of {len(figures)} tables have the committed rows to the last digit")
    made = read_json(reference(profile) / MODELS)
    expected, alike = made["models"], made["arithmetic"] == arithmetic()
    others = sorted(name for name in {*models, *expected} if models.get(name) != expected.get(name))
    trained = sum(models.get(name) == digest for name, digest in expected.items())
    print(
        f"models: {trained} of {len(expected)} came out of training as those that the committed rows are of, to the last bit"
    )
    faults = []
    if trained > 0 or alike:  # this machine calculates as that one did: nothing may differ
        faults = [
            f"model {name} came out of training otherwise, on a machine that calculates as the reference's"
            for name in others
        ]
    if not others:
        faults += [
            f"{name}: other {', '.join(columns)}, by the same models"
            for name, columns in changed.items()
            if columns
        ]
    faults += too_fast(again["cost"])
    found, shared = per_prompt(again)
    expected_values, retraining = (
        per_prompt(committed)[0],
        pd.read_csv(reference(profile) / RETRAINING).set_index("metric"),
    )
    return [
        *faults,
        *shared,
        *values_changed(found, expected_values, retraining),
        *compare(found, expected_values, retraining),
    ]


def too_fast(cost: pd.DataFrame) -> list[str]:
    """What took less time than it can, of the rows of the target cost. Times are noisy, but two responses take longer than one, and values
    of every candidate longer than none."""
    timed = cost[cost["seconds"].notna()]
    base, several = (
        (timed["method"] == "base") & (timed["best_of"] == 1),
        (timed["method"] == "base") & (timed["best_of"] > 1),
    )
    seconds = timed["seconds"][base].median()
    ratios = {"dense steering": timed["seconds"][timed["method"] == "dense"].median() / seconds}
    ratios["the best of several"] = timed["seconds"][several].median() / seconds
    return [
        f"cost: {name} took {ratio:.2f} × the time of one plain response"
        for name, ratio in ratios.items()
        if ratio < LONGER
    ]


def changed_columns(one: pd.DataFrame, other: pd.DataFrame) -> list[str]:
    """In which two tables differ, times aside; texts may be categories in one of them."""
    if set(one) != set(other):
        return [f"columns ({', '.join(sorted(set(one) ^ set(other)))})"]
    if len(one) != len(other):
        return [f"rows ({len(one)} for {len(other)})"]
    return [
        c
        for c in one
        if c != "seconds"
        and not (
            np.array_equal(one[c].to_numpy(), other[c].to_numpy(), equal_nan=True)
            if pd.api.types.is_numeric_dtype(one[c]) and pd.api.types.is_numeric_dtype(other[c])
            else one[c].astype(str).tolist() == other[c].astype(str).tolist()
        )
    ]


def per_prompt(tables_of_rows: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, list[str]]:
    """Long: cell (what was done, in words), metric, unit (objective and prompt), mean over the rows of the unit, and their variance over
    its samples. What several tables share is there once; where they disagree, a sentence says so."""
    frames = []
    for name, rows in tables_of_rows.items():
        rows = (
            rows[rows["objective"].notna() & rows["prompt"].notna()]
            if "objective" in rows
            else rows[:0]
        )
        if "seconds" in rows:
            rows = rows[rows["seconds"].isna()]
        if len(rows) == 0:
            continue
        bits = [column for column in rows if column.startswith("junctions_")]
        if bits:
            open_ = np.unpackbits(
                rows[bits].to_numpy("<u8").view(np.uint8), axis=1, bitorder="little"
            )
            rows = rows.drop(columns=bits).assign(
                junctions=open_.sum(1), junction_places=open_ @ np.arange(open_.shape[1])
            )
        if "threshold" in rows:
            rows = rows.assign(
                tau=_numbers(rows["threshold"]).where(
                    (rows["gate"] != "never") & asked_threshold(rows)
                )
            )
        if "tuned" in rows:
            rows = rows.assign(beta=rows["beta"].where(~rows["tuned"].astype(bool)))
        sampled = {"judge", "step"} & set(rows) == {"judge"}  # a row is a response
        cell = pd.Series("" if sampled else name, index=rows.index)
        for label in (label for label in LABELS if label in rows):
            words = rows[label].astype(object).map(lambda value, label=label: _words(label, value))
            cell = cell.str.cat(words.astype(str), sep="")
        unit = rows["objective"].astype(str) + " " + rows["prompt"].astype(int).astype(str)
        metrics = [name for name in rows if name not in PLACES and name != "tau"]
        for metric in (
            name for name in metrics if rows[name].dtype.kind in "biuf" or name == "steered"
        ):
            values = pd.DataFrame(
                {"cell": cell.str.strip(), "unit": unit, "value": _numbers(rows[metric])}
            )
            grouped = (
                values.groupby(["cell", "unit"])["value"]
                .agg(["mean", "var", "count"])
                .reset_index()
                .dropna(subset="mean")
            )
            frames.append(grouped.assign(metric=metric))
    long = pd.concat(frames, ignore_index=True)
    told = long.groupby([*CELL, "unit"])["mean"].agg(["min", "max"])
    apart = (
        told[(told["max"] - told["min"]) > 1e-6 * (1 + told["max"].abs())]
        .reset_index()
        .groupby(CELL)
        .size()
    )
    shared = [
        f"{cell}: tables disagree about {metric} of {count} prompts"
        for (cell, metric), count in apart.items()
    ]
    return long.drop_duplicates([*CELL, "unit"]), shared


def _numbers(column: pd.Series) -> pd.Series:
    """As floats; tables that mix kinds of rows hold some as texts."""
    if pd.api.types.is_numeric_dtype(column):
        return column.astype(float)
    return pd.to_numeric(column.astype(str).replace({"True": "1", "False": "0"}), errors="coerce")


def _words(label: str, value: object) -> str:
    """A label of a cell, left out where it says nothing."""
    unsaid = value in ("", 0, False) or value is None or value != value
    if unsaid or (label, value) in (("best_of", 1), ("model", "base")):
        return ""
    prefix = {"beta": "β = ", "tau": "τ = ", "floor": "floor ", "best_of": "best of "}.get(
        label, ""
    )
    return (
        " best β"
        if label == "tuned"
        else f" {prefix}{value:g}"
        if isinstance(value, (int, float))
        else f" {prefix}{value}"
    )


def compare(again: pd.DataFrame, committed: pd.DataFrame, retraining: pd.DataFrame) -> list[str]:
    """Prints every cell with each metric's difference and the smallest that would have been seen; returns what has changed."""
    both = committed.merge(
        again, on=["cell", "metric", "unit"], how="outer", suffixes=("", "_again"), indicator=True
    )
    faults = [
        f"{cell}: {metric} of {count} prompts is {'no longer measured' if side == 'left_only' else 'new'}"
        for (cell, metric, side), count in both[both["_merge"] != "both"]
        .groupby([*CELL, "_merge"], observed=True)
        .size()
        .items()
    ]
    both = both[both["_merge"] == "both"].assign(
        difference=lambda frame: frame["mean_again"] - frame["mean"]
    )
    units = both["unit"].unique()
    wide = both.pivot(index=CELL, columns="unit", values="difference").reindex(columns=units)
    scale = scales(both)
    share = (
        retraining["tolerance"]
        .reindex(wide.index.get_level_values("metric"))
        .fillna(0.0)
        .clip(lower=NEGLIGIBLE)
        .to_numpy()
    )
    spread, tolerance = (
        noise(both).reindex(wide.index).to_numpy(),
        share * scale.reindex(wide.index).to_numpy(),
    )
    found = regression.run(wide.to_numpy(float), spread, tolerance, np.random.default_rng(0))
    table = pd.DataFrame(vars(found), index=wide.index).reset_index()
    judged = table["p"].notna().sum()
    print(
        f"metrics: {len(table)} of {table['cell'].nunique()} cells, {judged} of them tested on at least "
        f"{regression.fewest_prompts(len(table))} prompts; chance of a false alarm {regression.LEVEL:.0%} (Holm). Difference to the "
        f"committed mean, in brackets the smallest that would have been seen in {regression.POWER:.0%} of runs"
    )
    for cell, part in table.groupby("cell", sort=True):
        print(f"  {cell}: {_told(part)}")
    for row in table[table["rejected"]].itertuples():
        faults.append(
            f"{row.cell}: {row.metric} moved by {row.difference:+.3g} (p = {row.p:.1g}, tested were {judged})"
        )
    return faults


def values_changed(
    again: pd.DataFrame, committed: pd.DataFrame, retraining: pd.DataFrame
) -> list[str]:
    """Prints how many values of prompts are others, by metric over all cells, and returns where these, or those of a single cell, are more
    than rounding explains: models that learned otherwise, or other samples, though their means be alike."""
    table, cells = other_values(again, committed, ["metric"]), other_values(again, committed, CELL)
    table["limit"] = (3 * retraining["others"].reindex(table.index).fillna(0.0)).clip(lower=SHARE)
    told = [f"{row.Index} {row.share:.1%}" for row in table.itertuples()]
    print(
        f"values of prompts that differ by more than {OTHER} standard deviations: {', '.join(told)}; of one cell {cells['share'].max():.0%}"
    )
    faults = [
        f"{row.Index}: {row.share:.1%} of {row.prompts} values of prompts (all cells) are others, where rounding explains {row.limit:.1%}"
        for row in table.itertuples()
        if row.share * row.prompts > row.limit * row.prompts + FEW
    ]
    limit = (
        table["limit"]
        .reindex(cells.index.get_level_values("metric"))
        .clip(lower=CELL_SHARE)
        .to_numpy()
    )
    many = cells[cells["share"] * cells["prompts"] > limit * cells["prompts"] + FEW].reset_index()
    for cell, part in many.groupby("cell"):
        faults.append(
            f"{cell}: {part['share'].max():.0%} of {part['prompts'].max()} prompts have other values ({', '.join(part['metric'])})"
        )
    return faults


def other_values(one: pd.DataFrame, other: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """By `by`: prompts (of all cells), and the share whose values differ by more than OTHER of the cell's standard deviation."""
    both = other.merge(one, on=[*CELL, "unit"], suffixes=("", "_again"))
    scale = scales(both).reindex(pd.MultiIndex.from_frame(both[CELL])).to_numpy()
    differs = (both["mean_again"] - both["mean"]).abs() > OTHER * scale + 1e-6
    return differs.groupby([both[name] for name in by]).agg(prompts="size", share="mean")


def _told(part: pd.DataFrame) -> str:
    """The metrics of a cell, those that were tested first."""
    tested, few = part.dropna(subset="visible"), part[part["visible"].isna()]
    texts = [
        ", ".join(
            f"{r.metric} {r.difference:+.2g} ({r.visible:.2g}{', CHANGED' if r.rejected else ''})"
            for r in tested.itertuples()
        )
    ]
    if len(few):
        texts.append(
            f"too few prompts to test {', '.join(f'{r.metric} {r.difference:+.2g}' for r in few.itertuples())}"
        )
    return "; ".join(text for text in texts if text)


def scales(values: pd.DataFrame) -> pd.Series:
    """Standard deviation of each metric of each cell between prompts: the unit of the tolerance."""
    return values.groupby(CELL)["mean"].std().fillna(0.0)


def noise(values: pd.DataFrame) -> pd.Series:
    """Standard deviation of a prompt's difference between two runs that sample independently, from how its samples differ in one; where
    they do not (some metrics are of a prompt's first response), from how prompts differ, which is more."""
    variance = (
        (2 * values["var"] / values["count"])
        .groupby([values[name] for name in CELL])
        .mean()
        .fillna(0.0)
    )
    return variance.where(variance > 0, 2 * scales(values) ** 2) ** 0.5


def retraining_tolerance(runs: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """metric, runs, shift, tolerance: how far training again on another processor moves the mean of a cell, in standard deviations between
    its prompts: root mean square over pairs of runs and cells, and three times that. others: the largest share of `other_values`.

    runs: of `per_prompt`, of the same code under other instruction sets.
    """
    means, scale, runs = [], None, list(runs)
    for run in runs:
        means.append(run.groupby(CELL)["mean"].mean())
        scale = scales(run) if scale is None else scale
    frame = pd.concat(means, axis=1, keys=range(len(means)))
    pairs = [
        (frame[i] - frame[j]) / scale.where(scale > 0) for i, j in combinations(range(len(runs)), 2)
    ]
    squares = pd.concat(pairs, axis=1).pow(2).mean(axis=1).groupby("metric").mean() ** 0.5
    others = pd.concat(
        [
            other_values(later, earlier, ["metric"])["share"]
            for earlier, later in combinations(runs, 2)
        ],
        axis=1,
    ).max(axis=1)
    found = pd.DataFrame({"runs": len(means), "shift": squares, "tolerance": 3 * squares}).fillna(
        0.0
    )
    return found.assign(others=others).round(4).reset_index()
