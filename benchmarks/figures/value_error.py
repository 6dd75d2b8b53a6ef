"""What steering a step is worth, by how sure the base is: value models against rollouts.

At states that base responses visit, every candidate is rolled out many times by the base model; the mean reward of the rollouts is
what it is worth, W. Steering this step alone gains J(π_V) − J(π) = Σ (π_V − π)·W − (1/β)·KL(π_V‖π), π_V ∝ π·exp(β·V), which is linear
in W and so unbiased by the noise of the rollouts. The error of the values is that of their differences between candidates, for a
constant changes no policy; the variance of the rollouts is taken off. β = 1.

At the same states, with the values taken for exact: what leaving the step alone loses, J(π_V) − J(π), against both directions of the KL
(Lemma 2.1), and what steering it loses by values with independent normal errors of known size (Proposition 2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import Profile

BINS = (0.0, 0.1, 0.5, 1.0, 1.5, 2.31)  # nats
DRAWS = 32
LEFT_ALONE, BY_NOISE = "regret of leaving alone", "regret by noise"
COLUMNS = ("entropy", "likelihood", "value_mean", "value_token", "worth", "worth_error")


class ErrorOfValues(Figure):
    """Errors of value models by entropy."""

    title = "Errors of value models by entropy"
    needs_lab = True

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        return FigureCells(
            rollouts=[methods.base(replicate, family) for family in profile.families]
        )

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """One row per candidate of each state."""
        wanted = [
            cell for replicate in replicates for cell in self.cells(profile, replicate).rollouts
        ]
        return results.table(wanted, ["state", "step", "rank", *COLUMNS], "rollouts").drop(
            columns=["threshold", "beta", "tuned", "floor", "search"]
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Means over the states of each stretch of entropy (all: stretch empty): gain of steering there, its two parts, errors of values; with
        the values taken for exact, what leaving alone loses, and what noise does (`noise`: its size). Family "all": both."""
        rows = rows.sort_values(
            ["family", "replicate", "objective", "state", "rank"], kind="stable"
        )
        candidates = rows["rank"].nunique()
        cube = {name: rows[name].to_numpy(np.float64).reshape(-1, candidates) for name in COLUMNS}
        states = rows[rows["rank"] == 0].reset_index(drop=True)
        stretch = np.digitize(states["entropy"], BINS) - 1
        base = np.exp(cube["likelihood"])
        base /= base.sum(1, keepdims=True)  # kept in float32, they add up to 1 but for rounding
        columns, deviations = {}, {}
        for loss in ("mean", "token"):
            values = cube[f"value_{loss}"]
            steered = _tilted(base, values)
            divergence = _divergence(steered, base)
            worth = ((steered - base) * cube["worth"]).sum(1)
            columns |= {
                (loss, "gain of steering", None): worth - divergence,
                (loss, "worth gained", None): worth,
            }
            columns[loss, "KL paid", None] = divergence
            regret, alone = (
                ((steered - base) * values).sum(1) - divergence,
                _divergence(base, steered),
            )
            deviations[loss] = (
                regret - alone,
                np.abs(divergence - regret)[regret > 1e-3] / regret[regret > 1e-3],
            )
            columns[loss, LEFT_ALONE, None] = alone
            draw = np.random.default_rng(profile.statistics.seed)
            for size in methods.NOISES:
                noisy = (
                    _tilted(base, values + size * draw.normal(size=values.shape))
                    for _ in range(DRAWS)
                )
                columns[loss, BY_NOISE, size] = (
                    sum(_divergence(policy, steered) for policy in noisy) / DRAWS
                )
            error = values - cube["worth"]
            for weights, how in (
                (np.full_like(base, 1 / candidates), "each candidate alike"),
                (base, "by base probability"),
            ):
                # variance of the error under these weights, less what the noise of the rollouts adds to it
                variance = (weights * error**2).sum(1) - (weights * error).sum(1) ** 2
                columns[loss, f"squared error of values, {how}", None] = variance - (
                    (weights - weights**2) * cube["worth_error"] ** 2
                ).sum(1)
        records = []
        names, values = list(columns), np.stack(list(columns.values()), axis=1)
        below = (states["entropy"] < methods.TAU).to_numpy()
        halves = {f"below {methods.TAU:g}": below, f"{methods.TAU:g} and more": ~below}
        stretches = (
            {"": below | ~below}
            | halves
            | {f"{low:g} to {high:g}": stretch == i for i, (low, high) in enumerate(pairwise(BINS))}
        )
        for family in dict.fromkeys([*profile.families, estimates.pooled_family(profile)]):
            of_family = (
                np.ones(len(states), dtype=bool)
                if family == "all"
                else (states["family"] == family).to_numpy()
            )
            common = {
                "family": family,
                "objective": "all",
                "replicates": states["replicate"].nunique(),
            }
            draws = {
                name: _draws(states, values, of_family & inside, profile)
                for name, inside in stretches.items()
            }
            for name, inside in stretches.items():
                labels = common | {
                    "n": int((of_family & inside).sum()),
                    "stretch": name,
                    "entropy": states["entropy"][of_family & inside].mean(),
                }
                for i, (loss, metric, noise) in enumerate(names):
                    ends = estimates.ends(draws[name][:, :, i], profile)
                    records.append(
                        labels
                        | {"value_model": f"value-{loss}", "metric": metric, "noise": noise}
                        | ends
                    )
            below_and_more = [draws[half] for half in halves]
            for i, (loss, metric, noise) in enumerate(names):
                if metric == BY_NOISE:
                    alone = below_and_more[0][:, :, names.index((loss, LEFT_ALONE, None))]
                    labels = common | {
                        "n": int(of_family.sum()),
                        "value_model": f"value-{loss}",
                        "noise": noise,
                    }
                    for ratio, (top, bottom) in {
                        f"{BY_NOISE}, entropy below 1 / 1 and more": [
                            half[:, :, i] for half in below_and_more
                        ],
                        f"{LEFT_ALONE} / by noise, entropy below 1": (
                            alone,
                            below_and_more[0][:, :, i],
                        ),
                    }.items():
                        records.append(
                            labels | {"metric": ratio} | estimates.ends(top / bottom, profile)
                        )
        exact = []
        for loss, (
            identity,
            relative,
        ) in deviations.items():  # of all states; deviations from an identity are small
            found = {
                "regret − KL(π‖π*), largest": np.abs(identity).max(),
                "regret − KL(π*‖π), relative, median": pd.Series(relative).median(),
            }
            labels = {
                "family": estimates.pooled_family(profile),
                "objective": "all",
                "n": len(states),
                "value_model": f"value-{loss}",
            }
            exact += [
                labels | {"metric": metric} | dict.fromkeys(("estimate", "low", "high"), number)
                for metric, number in found.items()
            ]
        further = ["stretch", "entropy", "noise"]
        return pd.concat(
            [
                estimates.of_records(records, further).round({"entropy": 4}),
                estimates.of_records(exact, further, 9),
            ],
            ignore_index=True,
        )

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Two rows for each family: gain of steering a step, its two parts, the error of the values, and what leaving alone and noise lose, by
        the entropy of the step."""
        from benchmarks.figures import style

        panels = {
            "gain of steering": "gain in J (reward)",
            "worth gained": "reward gained (SD 2)",
            "KL paid": "KL paid (nats)",
            "squared error of values, by base probability": "squared error,\nby base probability",
            "squared error of values, each candidate alike": "squared error,\ncandidates alike",
            LEFT_ALONE: "loss in J if the\nvalues were exact",
        }
        looks = {"value-token": {}, "value-mean": {"linestyle": "--", "markerfacecolor": "white"}}
        figure, axes = style.grid(2 * len(profile.families), 3, 2.8, 2.3)
        axes = axes.reshape(-1, 6)
        stretches = [f"{a:g} to {b:g}" for a, b in pairwise(BINS)]
        for i, family in enumerate(profile.families):
            for j, (metric, label) in enumerate(panels.items()):
                part = table[(table["family"] == family) & (table["metric"] == metric)].set_index(
                    "stretch"
                )
                for value_model, look in looks.items():
                    points = (
                        part[part["value_model"] == value_model]
                        .reindex(stretches)
                        .assign(place=range(len(stretches)))
                    )
                    style.curve(
                        axes[i, j], "sia", points.dropna(subset=["estimate"]), "place", **look
                    )
                if metric == LEFT_ALONE:
                    axes[i, j].set_yscale("log")
                    for size, shade in zip(
                        methods.NOISES[1:], ("#BBBBBB", "#888888", "#444444"), strict=True
                    ):
                        by_noise = table[
                            (table["family"] == family)
                            & (table["metric"] == BY_NOISE)
                            & (table["noise"] == size)
                        ]
                        by_noise = (
                            by_noise[by_noise["value_model"] == "value-token"]
                            .set_index("stretch")
                            .reindex(stretches)
                        )
                        axes[i, j].plot(
                            range(len(stretches)),
                            by_noise["estimate"],
                            color=shade,
                            linestyle=":",
                            marker="x",
                            markersize=3,
                        )
                else:
                    axes[i, j].axhline(0, color="#999999", linewidth=0.8)
                ticks = [s.replace(" to ", "–").replace("2.31", "2.3") for s in stretches]
                axes[i, j].set_xticks(
                    range(len(stretches)), ticks, rotation=35, fontsize=style.SMALL
                )
                axes[i, j].set_ylabel(label)
                axes[i, j].set_xlabel("entropy of the step (nats)")
            axes[i, 0].set_title(style.FAMILIES[family], loc="left")
            axes[i, -1].set_title("left alone, or noise", loc="left")
        names = [
            style.handle("sia", style.LOSSES[value_model], **{"marker": "o"} | look)
            for value_model, look in looks.items()
        ]
        names += [
            style.handle("base", f"noise of SD {size:g}", color=shade, linestyle=":", marker="x")
            for size, shade in zip(
                methods.NOISES[1:], ("#BBBBBB", "#888888", "#444444"), strict=True
            )
        ]
        whole = table[table["stretch"].isna() & (table["family"] == profile.families[0])].iloc[0]
        inside = table[table["stretch"].isin(stretches) & table["family"].isin(profile.families)][
            "n"
        ]
        caption = (
            f"What steering one step is worth (β = 1), against rollouts of the base model: J = expected reward (SD 2) − KL. States that base "
            f"responses visit, {profile.sweep.probe_rollouts} rollouts for each of their {profile.decoding.candidates} candidates; n = "
            f"{int(whole['n'])} states of each family ({int(inside.min())} to {int(inside.max())} in a stretch of entropy), "
            f"{style.together(int(whole['replicates']))} of profile {profile.name}. Bands: "
            f"{profile.statistics.level:.0%} bootstrap intervals over replicates and states. The error is that of differences between "
            f"candidates, the noise of the rollouts taken off. Last panel: what leaving the step alone would lose if the values were exact, "
            f"and steering it by them with noise added (crosses, per-token values, no intervals)."
        )
        return style.finish(figure, names, caption, folder, "value-error", stale=stale)


def _tilted(base: np.ndarray, values: np.ndarray) -> np.ndarray:
    """π·exp(V), normalised: `(states, K)`."""
    tilted = base * np.exp(values - values.max(1, keepdims=True))
    return tilted / tilted.sum(1, keepdims=True)


def _divergence(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """KL(q‖p) of rows, `(states,)`."""
    return (q * (np.log(np.maximum(q, 1e-300)) - np.log(np.maximum(p, 1e-300)))).sum(1)


def _draws(
    states: pd.DataFrame, values: np.ndarray, inside: np.ndarray, profile: Profile
) -> np.ndarray:
    """Means over the states inside; resampled are replicates, and states within replicate and objective."""
    place, shape = estimates.unit_places(states, "state", profile.sweep.probes)
    sums, counts = np.zeros((np.prod(shape), values.shape[1])), np.zeros((np.prod(shape), 1))
    np.add.at(sums, place[inside], values[inside])  # states of both families share a place
    np.add.at(counts, place[inside], 1)
    return estimates.ratio_draws(sums, np.broadcast_to(counts, sums.shape), shape, profile)
