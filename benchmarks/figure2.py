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

from benchmarks.cells import OBJECTIVES, VALUE_LOSSES, Cell
from benchmarks.profile import Profile
from benchmarks.stats import bootstrap_weights, interval

VALUES = {loss: value_model for value_model, loss in VALUE_LOSSES.items()}
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
KEYS = ["objective", "family", "setting", "method", "target_ratio", "versus", "metric"]
UNIT = ["replicate", "objective", "prompt", "seed"]
COLUMNS = [
    "objective", "family", "model", "value_model", "method", "gate", "target_ratio", "ratio", "beta", "best_of", "metric",
    "estimate", "low", "high", "n", "seeds", "replicates", "setting", "versus", "versus_ratio",
    "beta_by_replicate", "estimate_by_replicate",
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


def unsteered_validation(replicate: int, family: str) -> Cell:
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
        base = unsteered_validation(replicate, family)
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
        base = unsteered_validation(replicate, family)
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
    unsteered = [unsteered_validation(r, f) for r in replicates for f in profile.families]
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

    versus: what a difference is taken against, at a realised ratio of `versus_ratio`; empty for the method itself.
    method "sia-claimed": the mean of SIA over the claimed ratios. beta is empty where replicates have each their own.
    Errors: ValueError where the methods were not all measured on the same prompts and seeds.
    """
    rows = rows.sort_values(UNIT, kind="stable")
    groups = dict(list(rows.groupby(["setting", "family", "method", "target_ratio"], sort=True)))
    units = next(iter(groups.values()))[UNIT].to_numpy()
    for key, group in groups.items():
        if not np.array_equal(group[UNIT].to_numpy(), units):
            raise ValueError(f"every method must be measured on the same prompts and seeds, {key} was not")
    counts = rows.groupby(UNIT[:2])["prompt"].nunique()
    shape = (rows["replicate"].nunique(), len(OBJECTIVES), int(counts.iloc[0]), rows["seed"].nunique())
    columns = {key: group[list(METRICS)].to_numpy(np.float64) for key, group in groups.items()}
    names = [_describe(key, group) for key, group in groups.items()]
    ratios = {key: name["ratios"] for key, name in zip(groups, names, strict=True)}
    differences = list(_differences(columns, ratios, profile))
    cube = np.stack([*columns.values(), *(values for _, values in differences)], axis=-1)
    return _intervals(names + [name for name, _ in differences], cube.reshape(*shape, *cube.shape[1:]), profile)


def _describe(key: tuple, group: pd.DataFrame) -> dict:
    """What is constant in the rows of one method, and its realised ratio by objective."""
    setting, family, method, target = key
    first = group.iloc[0]
    betas = group.groupby("replicate")["beta"].first()
    steered = first["gate"] != "never"
    totals = group.groupby("objective")[["steered", "tokens"]].sum()
    totals.loc["all"] = totals.sum()
    return {
        "setting": setting, "family": family, "method": method, "target_ratio": target, "versus": "",
        "model": first["model"], "value_model": first["value_model"], "gate": first["gate"], "best_of": first["best_of"],
        "beta": betas.iloc[0] if steered and betas.nunique() == 1 else None,
        "beta_by_replicate": "|".join(f"{beta:g}" for beta in betas) if steered else "",
        "ratios": (totals["steered"] / totals["tokens"]).to_dict(),
    }  # fmt: skip


def _differences(columns: dict[tuple, np.ndarray], ratios: dict[tuple, dict], profile: Profile) -> Iterator[tuple[dict, np.ndarray]]:
    """Paired by prompt and noise: SIA − dense, SIA − random, and the mean of SIA over the claimed ratios − dense; for each
    family and, as family "all", for their mean. columns: `(observations, metrics)` of each method."""
    for setting in SETTINGS:
        pooled: dict[tuple, list[np.ndarray]] = {}
        for family in profile.families:
            dense = (setting, family, "dense", 1.0)
            sparse = [key for key in columns if key[:3] == (setting, family, "sia")]
            pairs = [(key, other) for key in sparse for other in (dense, (*key[:2], "random", key[3])) if other in columns]
            for key, other in pairs:
                values = columns[key] - columns[other]
                pooled.setdefault((*key[2:], other[2]), []).append(values)
                yield _difference(setting, family, *key[2:], other[2]) | {"ratios": ratios[key], "versus_ratios": ratios[other]}, values
            claimed = np.mean([columns[key] for key in sparse if key[3] in profile.figure2.claimed], axis=0) - columns[dense]
            pooled.setdefault(("sia-claimed", None, "dense"), []).append(claimed)
            yield _difference(setting, family, "sia-claimed", None, "dense"), claimed
        for key, many in pooled.items():
            yield _difference(setting, "all", *key), np.mean(many, axis=0)


def _difference(setting: str, family: str, method: str, target: float | None, versus: str) -> dict:
    value_model = VALUES[setting.split("-")[0]]
    return {
        "setting": setting, "family": family, "method": method, "target_ratio": target, "versus": versus,
        "model": "base", "value_model": value_model, "gate": "entropy", "best_of": 1,
    }  # fmt: skip


def _intervals(names: list[dict], cube: np.ndarray, profile: Profile) -> pd.DataFrame:
    """A row for each name, objective (and all of them) and metric.

    cube: `(replicates, objectives, prompts, seeds, metrics, names)`.
    """
    statistics, records = profile.statistics, []
    for number, objective in enumerate((*OBJECTIVES, "all")):
        part = cube if objective == "all" else cube[:, [number]]
        replicates, objectives, prompts, seeds = part.shape[:4]
        weights = bootstrap_weights(part.shape[:4], statistics.resamples, np.random.default_rng(statistics.seed))
        ends = [end.reshape(part.shape[4:]) for end in interval(part.reshape(len(weights[0]), -1), weights, statistics.level)]
        single = part.mean(axis=(1, 2, 3))
        for i, name in enumerate(names):
            common = {key: value for key, value in name.items() if key not in ("ratios", "versus_ratios")}
            common |= {"ratio": name.get("ratios", {}).get(objective), "versus_ratio": name.get("versus_ratios", {}).get(objective)}
            common |= {"objective": objective, "n": replicates * objectives * prompts, "seeds": seeds, "replicates": replicates}
            for m, metric in enumerate(METRICS):
                estimate, low, high = (float(end[m, i]) for end in ends)
                by_replicate = "|".join(f"{value:.4f}" for value in single[:, m, i])
                records.append(
                    common | {"metric": metric, "estimate": estimate, "low": low, "high": high, "estimate_by_replicate": by_replicate}
                )
    frame = pd.DataFrame.from_records(records).reindex(columns=COLUMNS)
    rounded = dict.fromkeys(["ratio", "versus_ratio", "estimate", "low", "high"], 4)
    return frame.sort_values(KEYS, na_position="first").round(rounded).reset_index(drop=True)


def verdict(summary: pd.DataFrame, profile: Profile) -> list[str]:
    """The claim "20% to 80% reaches or beats dense" in one sentence per setting, over both families, then by objective."""
    claimed = profile.figure2.claimed
    pooled = summary[(summary["family"] == "all") & (summary["metric"] == "judge") & (summary["versus"] == "dense")]
    sentences = []
    for setting, name in SETTINGS.items():
        part = pooled[pooled["setting"] == setting].set_index(["objective", "method", "target_ratio"]).sort_index()
        whole = part.loc[("all", "sia-claimed")].iloc[0]
        single = [float(value) for value in whole["estimate_by_replicate"].split("|")]
        says = "beats dense" if whole["low"] > 0 else "falls short of dense" if whole["high"] < 0 else "cannot be told from dense"
        worlds = f"replicates {' '.join(f'{value:+.2f}' for value in single)}" if len(single) > 1 else "one replicate"
        ends = "; ".join(f"at {t:.0%} {_with_interval(part.loc[('all', 'sia', t)])}" for t in (min(claimed), max(claimed)))
        objectives = "; ".join(f"{o} {_with_interval(part.loc[(o, 'sia-claimed')].iloc[0])}" for o in OBJECTIVES)
        sentences.append(
            f"{name}: SIA at {min(claimed):.0%} to {max(claimed):.0%} {says}: {_with_interval(whole)} on average ({worlds}); "
            f"{ends}; {objectives}"
        )
    return sentences


def agreement(summary: pd.DataFrame, reference: pd.DataFrame) -> str:
    """How the judge scores of a smaller run lie against the committed ones over all replicates, in one sentence."""
    both = summary.merge(reference, on=KEYS, suffixes=("", "_committed"))
    both = both[(both["metric"] == "judge") & (both["versus"] == "")]
    ours, theirs = (both[f"estimate_by_replicate{suffix}"].str.split("|").str[0].astype(float) for suffix in ("", "_committed"))
    inside = both["estimate"].between(both["low_committed"], both["high_committed"]).mean()
    return (
        f"of {len(both)} judge scores, {(ours == theirs).mean():.0%} are those of the committed first replicate to the last digit (largest "
        f"difference {(ours - theirs).abs().max():.4f}), and {inside:.0%} lie inside the committed intervals over "
        f"{reference['replicates'].max()} replicates"
    )


def _with_interval(row: pd.Series) -> str:
    return f"{row['estimate']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


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
        f"Solid: steered with the entropy gate (SIA) or at random; both end in dense steering at 1. Other lines: unsteered. "
        f"Bands: {profile.statistics.level:.0%} bootstrap intervals over replicates and prompts; n = {first['n']} prompts × "
        f"{first['seeds']} samples per point, from {first['replicates']} replicate{'s' if first['replicates'] > 1 else ''} of profile "
        f"{profile.name}. Instruct: the base trained on its own responses that the judge or the reward model likes. "
        f"Best β: chosen by the judge on validation prompts, for each method and ratio."
    )
    methods = ["sia", "random", "base", "instruct", "instruct-reward", "best-of-n"]
    style.finish(figure, methods, caption, paths, stale=stale, best_of=profile.evaluation.best_of)
