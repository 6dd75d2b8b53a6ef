"""What steering a step is worth, by how sure the base is: value models against rollouts.

At states that base responses visit, every candidate is rolled out many times by the base model; the mean reward of the rollouts is
what it is worth, W. Steering this step alone gains J(π_V) − J(π) = Σ (π_V − π)·W − (1/β)·KL(π_V‖π), π_V ∝ π·exp(β·V), which is linear
in W and so unbiased by the noise of the rollouts. The error of the values is that of their differences between candidates, for a
constant changes no policy; the variance of the rollouts is taken off. β = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import plan, summary
from benchmarks.profile import Profile

BINS = (0.0, 0.1, 0.5, 1.0, 1.5, 2.31)  # nats
COLUMNS = ("entropy", "likelihood", "value_mean", "value_token", "worth", "worth_error")


def cells(profile: Profile, replicate: int) -> plan.Wanted:
    return plan.Wanted(probes=[plan.base(replicate, family) for family in profile.families])


def collect(profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
    """One row per candidate of each state."""
    wanted = [cell for replicate in replicates for cell in cells(profile, replicate).probes]
    return results.table(wanted, ["state", "step", "rank", *COLUMNS], "probe").drop(
        columns=["threshold", "beta", "tuned", "floor", "search"]
    )


def summarize(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Means over the states of each stretch of entropy (all: stretch empty): gain of steering there, its two parts, errors of values."""
    rows = rows.sort_values(["family", "replicate", "objective", "state", "rank"], kind="stable")
    candidates = rows["rank"].nunique()
    cube = {name: rows[name].to_numpy(np.float64).reshape(-1, candidates) for name in COLUMNS}
    states = rows[rows["rank"] == 0].reset_index(drop=True)
    stretch = np.digitize(states["entropy"], BINS) - 1
    base = np.exp(cube["likelihood"])
    columns = {}
    for loss in ("mean", "token"):
        values = cube[f"value_{loss}"]
        tilted = base * np.exp(values - values.max(1, keepdims=True))
        steered = tilted / tilted.sum(1, keepdims=True)
        divergence = (steered * (np.log(np.maximum(steered, 1e-300)) - cube["likelihood"])).sum(1)
        worth = ((steered - base) * cube["worth"]).sum(1)
        columns |= {(loss, "gain of steering"): worth - divergence, (loss, "worth gained"): worth, (loss, "KL paid"): divergence}
        error = values - cube["worth"]
        for weights, how in ((np.full_like(base, 1 / candidates), "each candidate alike"), (base, "by base probability")):
            # variance of the error under these weights, less what the noise of the rollouts adds to it
            variance = (weights * error**2).sum(1) - (weights * error).sum(1) ** 2
            columns[loss, f"squared error of values, {how}"] = variance - ((weights - weights**2) * cube["worth_error"] ** 2).sum(1)
    records = []
    names, values = list(columns), np.stack(list(columns.values()), axis=1)
    for family in profile.families:
        of_family = (states["family"] == family).to_numpy()
        for number in (None, *range(len(BINS) - 1)):
            inside = of_family if number is None else of_family & (stretch == number)
            draws = _draws(states, values, inside, profile)
            labels = {"family": family, "objective": "all", "replicates": states["replicate"].nunique(), "n": int(inside.sum())}
            labels |= {"stretch": "" if number is None else f"{BINS[number]:g} to {BINS[number + 1]:g}"}
            labels |= {"entropy": states["entropy"][inside].mean()}
            for i, (loss, metric) in enumerate(names):
                records.append(labels | {"value_model": f"value-{loss}", "metric": metric} | summary.ends(draws[:, :, i], profile))
    return summary.of_records(records, ["stretch", "entropy"]).round({"entropy": 4})


def _draws(states: pd.DataFrame, values: np.ndarray, inside: np.ndarray, profile: Profile) -> np.ndarray:
    """Means over the states inside; resampled are replicates, and states within replicate and objective."""
    place, shape = summary.unit_places(states, "state", profile.sweep.probes)
    sums, counts = np.zeros((np.prod(shape), values.shape[1])), np.zeros((np.prod(shape), 1))
    sums[place[inside]], counts[place[inside]] = values[inside], 1
    return summary.ratio_draws(sums, np.broadcast_to(counts, sums.shape), shape, profile)


def plot(table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
    """Two rows for each family: gain of steering a step, its two parts, and the error of the values, by the entropy of the step."""
    from benchmarks import style

    panels = {
        "gain of steering": "gain in J (reward)",
        "worth gained": "expected reward gained",
        "KL paid": "KL(steered‖base) (nats)",
        "squared error of values, by base probability": "squared error of values,\nby base probability",
        "squared error of values, each candidate alike": "squared error of values,\neach candidate alike",
    }
    looks = {"value-token": {}, "value-mean": {"linestyle": "--", "markerfacecolor": "white"}}
    figure, axes = style.grid(2 * len(profile.families), 3, 2.8, 2.3)
    axes = axes.reshape(-1, 6)
    stretches = [f"{a:g} to {b:g}" for a, b in pairwise(BINS)]
    for i, family in enumerate(profile.families):
        for j, (metric, label) in enumerate(panels.items()):
            part = table[(table["family"] == family) & (table["metric"] == metric)].set_index("stretch")
            for value_model, look in looks.items():
                points = part[part["value_model"] == value_model].reindex(stretches).assign(place=range(len(stretches)))
                style.curve(axes[i, j], "sia", points.dropna(subset=["estimate"]), "place", **look)
            axes[i, j].axhline(0, color="#999999", linewidth=0.8)
            ticks = [s.replace(" to ", "–").replace("2.31", "2.3") for s in stretches]
            axes[i, j].set_xticks(range(len(stretches)), ticks, rotation=35, fontsize=style.SMALL)
            axes[i, j].set_ylabel(label)
            axes[i, j].set_xlabel("entropy of the step (nats)")
        axes[i, 0].set_title(style.FAMILIES[family], loc="left")
        axes[i, -1].set_axis_off()
    names = [style.handle("sia", style.LOSSES[value_model], **{"marker": "o"} | look) for value_model, look in looks.items()]
    whole = table[table["stretch"].isna()].iloc[0]
    caption = (
        f"What steering one step is worth (β = 1), against rollouts of the base model: J = expected reward (SD 2) − KL. States that base "
        f"responses visit, {profile.sweep.probe_rollouts} rollouts for each of their {profile.decoding.candidates} candidates; n = "
        f"{int(whole['n'])} states of each family, from "
        f"{summary.plural(int(whole['replicates']), 'replicate')} of profile {profile.name}. Bands: "
        f"{profile.statistics.level:.0%} bootstrap intervals over replicates and states. The error is that of differences between "
        f"candidates, the noise of the rollouts taken off."
    )
    return style.finish(figure, names, caption, folder, "value-error", stale=stale)
