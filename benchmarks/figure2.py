"""Figure 2: alignment against the share of steered tokens, beside static baselines, in four settings.

Settings: values by the paper's loss ("mean") or by the per-token loss ("token"), each at β = 1 and with every method at
its own best β, chosen by the judge on validation prompts. The drawing shows three of them; the table has all four.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.cells import Cell
from benchmarks.profile import Profile
from benchmarks.stats import bootstrap_weights, interval

OBJECTIVES = ("harmlessness", "helpfulness", "honesty")
VALUES = {"mean": "value-mean", "token": "value-token"}
SETTINGS = {
    "mean-1": "paper's loss, β = 1",
    "token-1": "per-token loss, β = 1",
    "token-best": "per-token loss, best β",
    "mean-best": "paper's loss, best β",
}
DRAWN = ("mean-1", "token-1", "token-best")
METRICS = {
    "judge": "judge score",
    "reward": "evaluation reward (SD)",
    "fluency_errors": "share with fluency errors",
    "kl": "KL per response (nats)",
}
CELL = ["setting", "family", "model", "value_model", "method", "gate", "target_ratio", "beta", "best_of"]
COLUMNS = [
    "objective", "family", "model", "value_model", "method", "gate", "target_ratio", "ratio", "beta", "best_of", "metric",
    "estimate", "low", "high", "n", "seeds", "replicates", "setting", "versus",
]  # fmt: skip


# --- what is measured ---------------------------------------------------------------------------------------------------


def baselines(profile: Profile, replicate: int) -> list[tuple[str, Cell]]:
    """(setting, cell): the static ones belong to no setting."""
    cells = []
    for family in profile.families:
        base = Cell(replicate, family, "test")
        kinds = [base, replace(base, model="instruct"), replace(base, model="instruct-reward")]
        cells += [("", cell) for cell in [*kinds, replace(base, best_of=profile.evaluation.best_of)]]
    return cells


def unsteered_validation(profile: Profile, replicate: int, family: str) -> Cell:
    return Cell(replicate, family, "validation")


def curve(profile: Profile, cell: Cell) -> list[Cell]:
    """The steered cells of one setting, entropy thresholds still open: SIA and random at each ratio, and dense."""
    partial = [target for target in profile.figure2.targets if target < 1]
    return [replace(cell, gate=gate, target_ratio=t) for gate in ("entropy", "random") for t in partial] + [
        replace(cell, gate="every", target_ratio=1.0)
    ]


def claim_only(profile: Profile, cell: Cell) -> list[Cell]:
    """Only what the claim of sparse against dense needs: SIA within the claimed ratios, and dense."""
    ratios = profile.figure2.claimed
    return [c for c in curve(profile, cell) if c.gate == "every" or (c.gate == "entropy" and c.target_ratio in ratios)]


def validation_cells(profile: Profile, replicate: int, results) -> list[Cell]:
    """Every β on validation prompts, thresholds from unsteered generations; for the paper's loss only what is needed."""
    cells = []
    for family in profile.families:
        base = unsteered_validation(profile, replicate, family)
        thresholds = results.thresholds(base)
        for value_model in VALUES.values():
            for beta in dict.fromkeys((1.0, *profile.figure2.betas)):
                cell = replace(base, value_model=value_model, beta=beta)
                if value_model == VALUES["token"]:
                    wanted = curve(profile, cell)
                elif beta == 1.0:
                    wanted = [c for c in curve(profile, cell) if c.gate != "random"]
                else:
                    wanted = claim_only(profile, cell)
                cells += [_at(thresholds, c) for c in wanted]
    return cells


def test_cells(profile: Profile, replicate: int, results) -> list[tuple[str, Cell]]:
    """(setting, cell), with thresholds calibrated on the steered validation generations and, where asked, the best β."""
    cells = []
    for family in profile.families:
        base = unsteered_validation(profile, replicate, family)
        unsteered = results.thresholds(base)
        for loss, value_model in VALUES.items():
            for choice in ("1", "best"):
                cell = replace(base, value_model=value_model, beta=1.0)
                setting = f"{loss}-{choice}"
                for wanted in (claim_only if setting == "mean-best" else curve)(profile, cell):
                    tried = _at(unsteered, wanted)
                    if choice == "best":
                        betas = [replace(tried, beta=beta) for beta in sorted({1.0, *profile.figure2.betas})]
                        tried = max(betas, key=lambda c: results.rows(c)["judge"].mean())
                    if tried.gate == "entropy":
                        tried = _at(results.thresholds(tried), tried)
                    cells.append((setting, replace(tried, split="test")))
    return cells


def _at(thresholds: dict[str, float], cell: Cell) -> Cell:
    return replace(cell, threshold=thresholds[str(cell.target_ratio)]) if cell.gate == "entropy" else cell


def compute(profile: Profile, replicates: range, results) -> pd.DataFrame:
    """All rows: one per prompt, seed and cell."""
    static = [cell for r in replicates for cell in baselines(profile, r)]
    unsteered = [unsteered_validation(profile, r, f) for r in replicates for f in profile.families]
    results.complete([*unsteered, *(cell for _, cell in static)], "figure2 1/3: baselines")
    results.complete([c for r in replicates for c in validation_cells(profile, r, results)], "figure2 2/3: validation")
    steered = [cell for r in replicates for cell in test_cells(profile, r, results)]
    results.complete([cell for _, cell in steered], "figure2 3/3: steered")
    frames = []
    for setting, cell in static + steered:
        names = {"replicate": cell.replicate, "setting": setting, "family": cell.family, "model": cell.model}
        names |= {"value_model": cell.value_model, "method": cell.method, "gate": cell.gate, "target_ratio": cell.target_ratio}
        names |= {"beta": cell.beta, "best_of": cell.best_of, "threshold": cell.threshold}
        frames.append(results.rows(cell).assign(**names))
    return pd.concat(frames, ignore_index=True).astype({"threshold": "float64"})


# --- the summary --------------------------------------------------------------------------------------------------------


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Estimates with intervals of every method and metric, and paired differences of SIA against dense and random.

    A method's β may differ between replicates where each has its own best; it is left empty then. `versus` names what
    a difference is taken against. method "sia-claimed": the mean of SIA over the claimed ratios.
    """
    rows = rows.sort_values(["replicate", "objective", "prompt", "seed"], kind="stable")
    shape = tuple(rows[name].nunique() for name in ("replicate", "objective", "prompt", "seed"))
    shape = (shape[0], shape[1], shape[2] // shape[1], shape[3])
    names, columns = [], []
    methods = dict(list(rows.groupby(["setting", "family", "method", "target_ratio"], sort=True)))
    for key, group in methods.items():
        names.append(_describe(key, group))
        columns.append({metric: group[metric].to_numpy(np.float64) for metric in METRICS})
    for description, column in _differences(methods, profile):
        names.append(description)
        columns.append(column)
    return _intervals(names, columns, shape, profile)


def _describe(key: tuple, group: pd.DataFrame) -> dict:
    setting, family, method, target = key
    betas = group["beta"].unique()
    first = group.iloc[0]
    same = {"model": first["model"], "value_model": first["value_model"], "gate": first["gate"], "best_of": first["best_of"], "versus": ""}
    beta = betas[0] if len(betas) == 1 and first["gate"] != "never" else None
    steered = group.groupby("objective")[["steered", "tokens"]].sum()
    ratios = (steered["steered"] / steered["tokens"]).to_dict() | {"all": steered["steered"].sum() / steered["tokens"].sum()}
    return {"setting": setting, "family": family, "method": method, "target_ratio": target, "beta": beta, "ratios": ratios, **same}


def _differences(methods: dict[tuple, pd.DataFrame], profile: Profile) -> Iterator[tuple[dict, dict]]:
    """Paired per prompt and seed: SIA − dense, SIA − random, and the mean of SIA over the claimed ratios − dense."""

    def column(key: tuple) -> dict[str, np.ndarray]:
        return {metric: methods[key][metric].to_numpy(np.float64) for metric in METRICS}

    def minus(a: dict, b: dict) -> dict:
        return {metric: a[metric] - b[metric] for metric in METRICS}

    def mean(many: list[dict]) -> dict:
        return {metric: np.mean([one[metric] for one in many], axis=0) for metric in METRICS}

    for setting in SETTINGS:
        pooled: dict[tuple, list[dict]] = {}
        for family in profile.families:
            dense = column((setting, family, "dense", 1.0))
            sparse = {t: column((setting, family, "sia", t)) for s, f, m, t in methods if (s, f, m) == (setting, family, "sia")}
            differences = {("sia", t, "dense"): minus(values, dense) for t, values in sparse.items()}
            for t, values in sparse.items():
                if (setting, family, "random", t) in methods:
                    differences["sia", t, "random"] = minus(values, column((setting, family, "random", t)))
            in_range = [sparse[t] for t in profile.figure2.claimed]
            differences["sia-claimed", None, "dense"] = minus(mean(in_range), dense)
            for key, values in differences.items():
                pooled.setdefault(key, []).append(values)
                yield _difference(setting, family, *key), values
        for key, many in pooled.items():
            yield _difference(setting, "all", *key), mean(many)


def _difference(setting: str, family: str, method: str, target: float | None, versus: str) -> dict:
    value_model = VALUES[setting.split("-")[0]]
    return {"setting": setting, "family": family, "method": method, "target_ratio": target, "versus": versus,
            "model": "base", "value_model": value_model, "gate": "entropy", "best_of": 1}  # fmt: skip


def _intervals(names: list[dict], columns: list[dict], shape: tuple, profile: Profile) -> pd.DataFrame:
    """One row per description, objective (and all of them) and metric."""
    statistics = profile.statistics
    cube = np.stack([column[metric] for column in columns for metric in METRICS], axis=1).reshape(*shape, -1)
    records = []
    for number, objective in enumerate((*OBJECTIVES, "all")):
        part = cube if objective == "all" else cube[:, [number]]
        rng = np.random.default_rng(statistics.seed)
        weights = bootstrap_weights(part.shape[:4], statistics.resamples, rng)
        ends = interval(part.reshape(-1, part.shape[4]), weights, statistics.level)
        for i, (name, metric) in enumerate((name, metric) for name in names for metric in METRICS):
            ratio = name.get("ratios", {}).get(objective)
            record = {key: value for key, value in name.items() if key != "ratios"} | {"objective": objective, "metric": metric}
            estimate, low, high = (float(end[i]) for end in ends)
            counts = {"n": part.shape[0] * part.shape[1] * part.shape[2], "seeds": shape[3], "replicates": shape[0]}
            records.append(record | counts | {"ratio": ratio, "estimate": estimate, "low": low, "high": high})
    frame = pd.DataFrame.from_records(records).reindex(columns=COLUMNS)
    order = ["objective", "family", "setting", "method", "target_ratio", "versus", "metric"]
    return frame.sort_values(order, na_position="first").round({"ratio": 4, "estimate": 4, "low": 4, "high": 4}).reset_index(drop=True)


def verdict(summary: pd.DataFrame, profile: Profile) -> list[str]:
    """The claim "20% to 80% reaches or beats dense", in one sentence per setting, over objectives and families."""
    claimed = profile.figure2.claimed
    pooled = summary[(summary["objective"] == "all") & (summary["family"] == "all") & (summary["metric"] == "judge")]
    sentences = []
    for setting, name in SETTINGS.items():
        part = pooled[(pooled["setting"] == setting) & (pooled["versus"] == "dense")]
        whole = part[part["method"] == "sia-claimed"].iloc[0]
        single = part[(part["method"] == "sia") & part["target_ratio"].isin([min(claimed), max(claimed)])].sort_values("target_ratio")
        at = "; ".join(f"at {row.target_ratio:.0%} {_with_interval(row)}" for row in single.itertuples())
        says = "beats dense" if whole["low"] > 0 else "falls short of dense" if whole["high"] < 0 else "cannot be told from dense"
        sentences.append(f"{name}: SIA at {min(claimed):.0%} to {max(claimed):.0%} {says}: {_with_interval(whole)} on average; {at}")
    return sentences


def agreement(summary: pd.DataFrame, reference: pd.DataFrame) -> str:
    """How the judge scores of a run lie against the committed intervals over all replicates, in one sentence."""
    keys = ["objective", "family", "setting", "method", "target_ratio", "versus", "metric"]
    both = summary.merge(reference, on=keys, suffixes=("", "_committed"))
    both = both[(both["metric"] == "judge") & (both["versus"] == "")]
    inside = both["estimate"].between(both["low_committed"], both["high_committed"]).mean()
    overlap = ((both["low"] <= both["high_committed"]) & (both["high"] >= both["low_committed"])).mean()
    return (
        f"of {len(both)} judge scores, {inside:.0%} lie inside the committed intervals over {reference['replicates'].max()} replicates "
        f"and {overlap:.0%} of the intervals overlap"
    )


def _with_interval(row) -> str:
    return f"{row.estimate:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"


# --- the drawing --------------------------------------------------------------------------------------------------------


def plot(summary: pd.DataFrame, profile: Profile, stale: bool, paths: list[Path]) -> None:
    """Top half: judge score; bottom half: evaluation reward. Rows: settings; columns: objectives of each family."""
    from benchmarks import style

    metrics = ("judge", "reward")
    level = summary[(summary["versus"] == "") & (summary["objective"] != "all")]
    columns = [(family, objective) for family in profile.families for objective in OBJECTIVES]
    figure, axes = style.grid(len(metrics) * len(DRAWN), len(columns))
    for j, (family, objective) in enumerate(columns):
        column = level[(level["family"] == family) & (level["objective"] == objective)]
        for m, metric in enumerate(metrics):
            for s, setting in enumerate(DRAWN):
                axis = axes[m * len(DRAWN) + s, j]
                part = column[column["metric"] == metric]
                for row in part[part["setting"] == ""].itertuples():
                    style.horizontal(axis, row.method, row.estimate, row.low, row.high)
                steered = part[part["setting"] == setting]
                dense = steered[steered["method"] == "dense"]
                for method in ("random", "sia"):
                    style.curve(axis, method, pd.concat([steered[steered["method"] == method], dense]).sort_values("ratio"))
                axis.set_xlim(0, 1.03)
            style.share_y(axes[m * len(DRAWN) : (m + 1) * len(DRAWN), j])
        axes[0, j].set_title(f"{style.FAMILIES[family]}\n{objective}")
        axes[-1, j].set_xlabel("share of tokens steered")
    for m, metric in enumerate(metrics):
        for s, setting in enumerate(DRAWN):
            axes[m * len(DRAWN) + s, 0].set_ylabel(f"{METRICS[metric]}\n({SETTINGS[setting]})")
    first = level.iloc[0]
    caption = (
        f"Solid: steered with the entropy gate (SIA) or at random; both end in dense steering at 1. Dashed: no steering. "
        f"Bands: {profile.statistics.level:.0%} bootstrap intervals over replicates, prompts and seeds; n = {first['n']} prompts × "
        f"{first['seeds']} samples per point and objective, {first['replicates']} replicate{'s' if first['replicates'] > 1 else ''} of "
        f"profile {profile.name}. Best β: chosen by the judge on validation prompts, for each method and ratio."
    )
    methods = ["sia", "random", "base", "instruct", "instruct-reward", "best-of-n"]
    style.finish(figure, methods, caption, paths, stale=stale, best_of=profile.evaluation.best_of)
