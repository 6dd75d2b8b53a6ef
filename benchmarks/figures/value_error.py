"""Errors of value models against rollouts: what steering a step is worth, by its entropy.

At states that base responses visit, every candidate is rolled out many times by the base model; the
mean reward of the rollouts is what it is worth, W. Steering this step alone gains
J(π_V) − J(π) = Σ (π_V − π)·W − (1/β)·KL(π_V‖π), π_V ∝ π·exp(β·V), which is linear in W and so
unbiased by the noise of the rollouts. The error of the values is that of their differences between
candidates, for a constant changes no policy; the variance of the rollouts is taken off. β = 1.

At the same states, with the values taken for exact: what leaving the step alone loses,
J(π_V) − J(π), against both directions of the KL (Lemma 2.1), and what steering it loses by values
with independent normal errors of known size (Proposition 2.3).
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.divergence import NOISES, kl_divergence, tilted
from benchmarks.analysis.intervals import interval_kind
from benchmarks.analysis.labels import LOSSES, family_label, plural
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import Profile

EDGES = (0.0, 0.1, 1.0, 1.5)  # nats; few steps of sure models lie between the first two
DRAWS = 32
ENTROPY_BINS = [*(f"{low:g} to {high:g}" for low, high in pairwise(EDGES)), "1.5 and more"]
BELOW_TAU, ABOVE_TAU = f"below {methods.TAU:g}", f"{methods.TAU:g} and more"
COLUMNS = ("entropy", "base_logprob", "value_mean", "value_token", "worth", "worth_error")
PANELS = {
    "steering_gain": "gain in J",
    "reward_gained": "reward gained\n(scaled to SD 2)",
    "kl_paid": "KL paid (nats)",
    "value_error_weighted": "squared error of V,\nbase-weighted",
    "value_error_uniform": "squared error of V,\nequal weights",
    "regret_left_alone": "loss in J if left alone",
}
NOISE_LOOKS = {
    f"{size:g}": style.Look(shade, "", (1, 1))
    for size, shade in zip(NOISES[1:], ("#BBBBBB", "#888888", "#444444"), strict=True)
}


class Quantity(NamedTuple):
    """Name of a mean over states, and of the values that it is of."""

    value_model: str
    metric: str
    noise: float | None = None


class ErrorOfValues(Figure):
    """Errors of value models by entropy."""

    needs_lab = True

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return base responses, at whose states candidates are rolled out."""
        return FigureCells(
            rollouts=[methods.base(replicate, family) for family in profile.families]
        )

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """Return a row per candidate of each state."""
        requests = [
            cell for replicate in replicates for cell in self.cells(profile, replicate).rollouts
        ]
        return results.table(requests, ["state", "step", "rank", *COLUMNS], "rollouts").drop(
            columns=["threshold", "beta", "tuned", "search"]
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Return means over the states of each bin of entropy (all states: `entropy_bin` empty).

        The gain of steering there and its two parts, errors of the values, and with the values
        taken for exact what leaving the step alone loses, and what noise of size `noise` does.
        Family "all": both.
        """
        rows = rows.sort_values(
            ["family", "replicate", "objective", "state", "rank"], kind="stable"
        )
        candidates = rows["rank"].nunique()
        cube = {name: rows[name].to_numpy(np.float64).reshape(-1, candidates) for name in COLUMNS}
        states = rows[rows["rank"] == 0].reset_index(drop=True)
        quantities, exact = _quantities(cube, profile)
        pooled = estimates.pooled_family(profile)
        records = [
            row
            for family in dict.fromkeys([*profile.families, pooled])
            for row in _family_rows(states, quantities, family, profile)
        ]
        setting = {"family": pooled, "objective": "all", "n": len(states)}
        constants = [
            setting | quantity._asdict() | dict.fromkeys(estimates.NUMBERS, number)
            for quantity, number in exact.items()
        ]
        further = ["entropy_bin", "entropy", "noise"]
        return pd.concat(
            [
                estimates.summary_frame(records, further).round({"entropy": 4}),
                estimates.summary_frame(constants, further, digits=9),  # deviations of identities
            ],
            ignore_index=True,
        )

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw gains, costs and errors of steering a step by the entropy of the step."""
        table = estimates.pooled(table)
        table = table[
            table["entropy_bin"].isin(ENTROPY_BINS) & table["family"].isin(profile.families)
        ]
        place = table["entropy_bin"].map(ENTROPY_BINS.index).astype(float)
        table = table.assign(place=place).sort_values("place")
        looks = style.LOSS_LOOKS
        families = profile.families
        figure, axes = style.plt.subplots(
            len(PANELS) // 3 * len(families),
            3,
            sharex=True,
            figsize=(style.PAGE, 2.6 * len(families) + 1.2),
        )
        for family, panels in zip(families, axes.reshape(len(families), -1), strict=True):
            rows = table[table["family"] == family]
            for axis, (metric, label) in zip(panels, PANELS.items(), strict=True):
                shown = rows[(rows["metric"] == metric) & rows["value_model"].isin(looks)]
                style.curves(
                    shown.dropna(subset=["estimate"]), "place", "value_model", looks=looks
                ).on(axis).plot()
                axis.set(ylabel=label, xlabel="")
                if metric == "regret_left_alone":
                    noisy = rows[
                        (rows["metric"] == "noise_regret") & (rows["value_model"] == "value-token")
                    ]
                    sizes = noisy["noise"].map("{:g}".format)
                    noisy = noisy.assign(size=sizes, low=np.nan, high=np.nan)
                    noisy = noisy[sizes.isin(NOISE_LOOKS)]
                    style.curves(noisy, "place", "size", looks=NOISE_LOOKS).on(axis).plot()
                    # values without a difference lose nothing
                    axis.set_yscale("symlog", linthresh=1e-3)
                    axis.set(ylim=(0, None), ylabel=label, xlabel="")
                else:
                    axis.axhline(0, color=style.ZERO, linewidth=0.8)
            panels[1].set_title(family_label(family))
        for axis in axes[:-1].flat:
            axis.tick_params(labelbottom=False)
        for axis in axes[-1]:
            ticks = [name.replace(" to ", "–").replace(" and more", "+") for name in ENTROPY_BINS]
            axis.set_xticks(range(len(ticks)), ticks)
            axis.set_xlabel("entropy of the step (nats)")
        handles = [
            *style.handles(looks, {name: LOSSES[name] for name in looks}),
            *style.handles(
                NOISE_LOOKS, {size: f"exact values + noise of SD {size}" for size in NOISE_LOOKS}
            ),
        ]
        replicates = int(table["replicates"].max())
        caption = (
            "Effect of steering one step, by rollouts of the base model. J = E[reward] − KL, with "
            "the reward scaled to SD 2; β = 1. "
            f"Bands: {interval_kind(profile.statistics.level, replicates, 'states')}; "
            f"n = {table['n'].min():.0f} to {table['n'].max():.0f} states per point, "
            f"{plural(replicates, 'replicate')}, profile {profile.name}."
        )
        return style.finish(
            figure, handles, caption, folder, "value-error", stale=stale, legend_columns=3
        )


def _in_entropy_bins(entropy: pd.Series) -> dict[str, pd.Series]:
    """Return which states are in each bin of entropy, on each side of τ, and, as "", in any."""
    numbers = pd.Series(np.digitize(entropy, EDGES) - 1, index=entropy.index)
    sides = {"": entropy >= 0, BELOW_TAU: entropy < methods.TAU, ABOVE_TAU: entropy >= methods.TAU}
    return sides | {name: numbers == i for i, name in enumerate(ENTROPY_BINS)}


def _family_rows(
    states: pd.DataFrame, quantities: dict[Quantity, np.ndarray], family: str, profile: Profile
) -> list[dict]:
    """Return the means of a family ("all": of both) in each bin of entropy, and ratios of losses.

    Args:
        states: A row per state.
        quantities: Values at the states, `(states,)` each.
        family: Its name.
        profile: Says how to resample.
    """
    of_family = (states["family"] == family) | (family == "all")
    common = {"family": family, "objective": "all", "replicates": states["replicate"].nunique()}
    values, records, draws = np.stack(list(quantities.values()), axis=1), [], {}
    for name, inside in _in_entropy_bins(states["entropy"]).items():
        selected = of_family & inside
        means = _draws(states, values, selected.to_numpy(), profile)
        draws[name] = dict(zip(quantities, np.moveaxis(means, 2, 0), strict=True))
        setting = common | {"n": int(selected.sum()), "entropy_bin": name}
        setting["entropy"] = states.loc[selected, "entropy"].mean()
        for quantity, of_quantity in draws[name].items():
            records += estimates.estimate_rows(setting | quantity._asdict(), of_quantity, profile)
    below, above = draws[BELOW_TAU], draws[ABOVE_TAU]
    for quantity in (one for one in quantities if one.metric == "noise_regret"):
        alone = quantity._replace(metric="regret_left_alone", noise=None)
        ratios = {
            "noise_regret_below_to_above_tau": below[quantity] / above[quantity],
            "left_alone_to_noise_regret_below_tau": below[alone] / below[quantity],
        }
        setting = common | quantity._asdict() | {"n": int(of_family.sum())}
        records += estimates.metric_rows(setting, ratios, profile)
    return records


def _draws(
    states: pd.DataFrame, values: np.ndarray, inside: np.ndarray, profile: Profile
) -> np.ndarray:
    """Return means over the states inside, resampled within objectives."""
    index, shape = estimates.unit_indices(states, "state", profile.sweep.probes)
    sums, counts = np.zeros((np.prod(shape), values.shape[1])), np.zeros((np.prod(shape), 1))
    np.add.at(sums, index[inside], values[inside])  # states of both families share a unit
    np.add.at(counts, index[inside], 1)
    return estimates.ratio_draws(sums, np.broadcast_to(counts, sums.shape), shape, profile)


def _quantities(
    cube: dict[str, np.ndarray], profile: Profile
) -> tuple[dict[Quantity, np.ndarray], dict[Quantity, float]]:
    """Return quantities of each state, `(states,)`, and single numbers over all states.

    Args:
        cube: COLUMNS by name, `(states, candidates)` each.
        profile: Gives the seed of the noise.
    """
    base = np.exp(cube["base_logprob"])
    base /= base.sum(1, keepdims=True)  # kept in float32, they add up to 1 but for rounding
    columns: dict[Quantity, np.ndarray] = {}
    exact: dict[Quantity, float] = {}
    for loss in ("mean", "token"):
        values, of = cube[f"value_{loss}"], partial(Quantity, methods.VALUES[loss])
        steered_policy = tilted(base, values)
        paid, alone = kl_divergence(steered_policy, base), kl_divergence(base, steered_policy)
        worth = ((steered_policy - base) * cube["worth"]).sum(1)
        columns |= {
            of("steering_gain"): worth - paid,
            of("reward_gained"): worth,
            of("kl_paid"): paid,
            of("regret_left_alone"): alone,
        }
        rng = np.random.default_rng(profile.statistics.seed)
        for size in NOISES:
            noisy = (
                tilted(base, values + size * rng.normal(size=values.shape)) for _ in range(DRAWS)
            )
            total = sum(kl_divergence(policy, steered_policy) for policy in noisy)
            columns[of("noise_regret", size)] = total / DRAWS
        error = values - cube["worth"]
        alike = np.full_like(base, 1 / base.shape[1])
        for name, weights in (("uniform", alike), ("weighted", base)):
            variance = (weights * error**2).sum(1) - (weights * error).sum(1) ** 2
            by_rollouts = ((weights - weights**2) * cube["worth_error"] ** 2).sum(1)
            columns[of(f"value_error_{name}")] = variance - by_rollouts
        regret = ((steered_policy - base) * values).sum(1) - paid
        relative = (np.abs(paid - regret) / regret)[regret > 1e-3]
        exact[of("regret_minus_kl_base_optimum_max")] = np.abs(regret - alone).max()
        exact[of("regret_vs_kl_optimum_base_median")] = pd.Series(relative).median()
    return columns, exact
