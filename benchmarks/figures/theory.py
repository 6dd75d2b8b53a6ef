"""The theory, tried out on random tabular policies and on the lab's own distributions.

Experiments (column `experiment`): "step", single steps with random policies and values; "tree",
whole responses on small trees; "lab", steps that lab policies visit, with values at β = 1;
"objective", what the lab's policies reach of E[R] − (1/β)·KL. Equations and sources: sia.theory.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates, labels
from benchmarks.analysis.divergence import NOISES, regret_bounds
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.profile import LabProfile, Profile

LOSSES = ("token", "mean")
QUANTITIES = [f"{name}_{loss}" for name in ("divergence", "range") for loss in LOSSES]
DIGITS = {"objective_reached": 5, "divergence": 4, "range": 2, "entropy": 4}  # of lab rows
STATES = {"sia": "SIA", "base": "base", "dense": "dense"}  # policies whose states are visited
BAR_ALPHA = 0.6  # lets intervals be seen on black bars
LAWS = {
    "regret_vs_kl_optimum_base_median": "KL(π*‖π)/β as regret:\nmedian relative error",
    "trees_beyond_optimum_sum": "trees beyond the sum\nunder the optimum's states",
    "trees_beyond_base_sum": "trees beyond the sum\nunder the base's states",
    "steps_beyond_bound": "steps beyond\nthe entropy bound",
    "regret_to_bound_below_tau": "regret / entropy bound,\nentropy < 1 (median)",
    "regret_to_bound_above_tau": "regret / entropy bound,\nentropy ≥ 1 (median)",
}
SIDES = (("below_tau", "entropy < 1", style.PALE), ("above_tau", "entropy ≥ 1", style.DARK))
BOUNDS = {"steps_below_tau_regret": "mean regret", "steps_below_tau_bound": "mean entropy bound"}


class Theory(Figure):
    """Theory and exact computation."""

    needs_lab = True

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return the base, SIA and dense steering by per-token values, with traces."""
        requests = [
            request
            for family in profile.families
            for request in (
                methods.base(replicate, family),
                *methods.curve(profile, replicate, family, "token", profile.sweep.reduced_ratios),
            )
        ]
        return FigureCells(cells=requests, traces=requests)

    def collect(self, profile: LabProfile, replicates: Sequence[int], results) -> pd.DataFrame:
        """Return random instances, and what the first sample of each lab response visits."""
        # the laws are those of every world: instances of one replicate try them
        frames = [results.random_instances([0])] if 0 in replicates else []
        names = ["objective", "prompt", "step", "entropy", "steered", *QUANTITIES]
        for replicate in replicates:
            for cell in self.cells(profile, replicate).traces:
                common = {
                    "replicate": replicate,
                    "family": cell.family,
                    "method": cell.method,
                    "target_ratio": cell.target_ratio,
                }
                tokens = results.rows(results.resolve(cell), "trace").query("seed == 0")
                sparse = {
                    f"opens_{ratio:g}": methods.steered(
                        replicate, cell.family, "token", ratio=ratio
                    )
                    for ratio in profile.sweep.reduced_ratios
                }
                opens = {
                    name: methods.gate_opens_at(tokens, results.resolve(request)).astype("int8")
                    for name, request in sparse.items()
                }
                visited = tokens[names].assign(**opens, **common, experiment="lab")
                if cell.gate != "never":  # the bound is compared in states of the base alone
                    visited[[f"range_{loss}" for loss in LOSSES]] = np.nan
                rows = results.rows(results.resolve(cell)).query("seed == 0")  # the one rewarded
                reached = profile.training.reward_scale * rows["training_reward"] - rows["kl"]
                rows = rows[["objective", "prompt", "seed"]].assign(
                    **common, experiment="objective", objective_reached=reached
                )
                frames += [visited, rows]
        table = pd.concat(frames, ignore_index=True)
        return rounded(table).astype(
            dict.fromkeys(("experiment", "family", "method", "objective"), "category")
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Return one estimate per law.

        Of random instances: shares and largest deviations over all of them (low and high are the
        number itself), losses by noise with intervals over the steps. Of the lab: means with
        intervals. `states` names the policy whose states are averaged over.
        """
        steps, trees, lab, reached = (
            rows[rows["experiment"] == name] for name in ("step", "tree", "lab", "objective")
        )
        records = [*summarize_steps(steps, profile), *summarize_trees(trees)]
        for family in profile.families:
            records += _lab_rows(lab[lab["family"] == family], family, profile)
            records += _objective_rows(reached[reached["family"] == family], family, profile)
        further = ["experiment", "states", "noise"]
        # 9 digits, for deviations of identities are tiny
        return estimates.summary_frame(records, further, digits=9)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the laws: random steps and trees in the first two panels, the lab in the others."""
        table = estimates.pooled(table)
        lab = table[table["experiment"] == "lab"]
        figure, axes = style.plt.subplots(3, 2, figsize=(style.PAGE, 6.9))
        _draw_laws(axes[0, 0], table)
        _draw_noise(axes[0, 1], table)
        _draw_metric_by_state_policy(axes[1, 0], lab, "unsteered_kl", profile)
        axes[1, 0].set(ylabel="nats per response", title="KL of unsteered steps (Theorem 2.2)")
        _draw_metric_by_state_policy(axes[1, 1], lab, "junction_kl_share", profile)
        axes[1, 1].set(ylabel="share of the KL of all steps", title="KL at junctions")
        _draw_losses(axes[2, 0], lab, profile)
        _draw_bounds(axes[2, 1], lab, profile)
        handles = [
            style.plt.Rectangle(
                (0, 0), 1, 1, color=style.COLOURS[key], alpha=BAR_ALPHA, label=f"states of {name}"
            )
            for key, name in STATES.items()
        ]
        count = int(table.loc[table["experiment"] == "step", "n"].max())
        note = style.sample_size_note(lab[lab["low"].notna()].assign(seeds=1), profile, "Lines")
        caption = (
            f"Top: {count} random steps, and small trees, computed exactly. Others: lab, per-token "
            f"loss unless labelled otherwise, β = 1, J = E[reward] − KL. {note}"
        )
        return style.finish(figure, handles, caption, folder, "theory", stale=stale)


def _draw_laws(axis, table: pd.DataFrame) -> None:
    """Draw how often, or how far, the laws fail on random steps and trees, in percent."""
    laws = table[table["metric"].isin(LAWS)].set_index("metric")["estimate"]
    values = 100 * laws[list(LAWS)].rename(LAWS)
    style.sns.barplot(x=values.values, y=values.index, ax=axis, color=style.NEUTRAL, width=0.6)
    axis.bar_label(axis.containers[0], fmt="%.0f", padding=2, fontsize=style.SMALL)
    axis.tick_params(axis="y", labelsize=6)
    axis.set(title="random steps and trees", xlabel="%", ylabel="")


def _draw_noise(axis, table: pd.DataFrame) -> None:
    """Draw the regret of steering by noisy values beside that of leaving a step alone."""
    exact = table[table["experiment"] == "step"].set_index("metric")
    for ending, label, colour in SIDES:
        noisy = exact.loc[[f"noise_regret_{ending}"]]
        look = {"color": colour, "markersize": 3, "label": f"noise, {label}"}
        axis.plot(noisy["noise"], noisy["estimate"], "o-", **look)
        alone = exact.loc[f"regret_left_alone_{ending}", "estimate"]
        axis.axhline(
            alone, color=colour, linestyle="--", linewidth=1.1, label=f"left alone, {label}"
        )
    axis.set(xscale="log", yscale="log", xlabel="SD of the noise in V", ylabel="mean regret (nats)")
    axis.set_title("random steps: what noise costs")
    axis.legend(frameon=False, fontsize=style.SMALL, loc="lower right")


def _draw_metric_by_state_policy(axis, lab: pd.DataFrame, metric: str, profile: Profile) -> None:
    """Draw one metric by family, ratio and the policy whose states are visited."""
    rows = lab[(lab["metric"] == metric) & (lab["value_model"] == "value-token")]
    rows = rows[rows["target_ratio"].isin(profile.sweep.reduced_ratios)]
    rows = rows.assign(
        cell=rows["family"].map(labels.family_label)
        + "\n"
        + rows["target_ratio"].map(labels.share_label)
    )
    rows = style.ordered(rows.sort_values("target_ratio"), family=profile.families)
    (
        style.so.Plot(rows, x="cell", y="estimate", color="states")
        .add(style.so.Bar(alpha=BAR_ALPHA, edgewidth=0, width=0.8), style.so.Dodge(), legend=False)
        .add(style.so.Range(color="#222222", linewidth=0.9), style.so.Dodge(), ymin="low",
             ymax="high", legend=False)
        .scale(color={states: style.COLOURS[states] for states in STATES})
        .label(x="")
        .on(axis)
        .plot()
    )  # fmt: skip


def _draw_losses(axis, lab: pd.DataFrame, profile: Profile) -> None:
    """Draw the measured loss of SIA against the sum that the theory equates with it."""
    gaps = lab[lab["metric"] == "objective_gap_to_dense"]
    sums = lab[
        (lab["metric"] == "unsteered_kl")
        & (lab["value_model"] == "value-token")
        & (lab["states"] == "sia")
    ]
    both = sums.merge(gaps, on=["family", "target_ratio"], suffixes=("", "_gap"))
    for row in both.itertuples():
        solid = row.target_ratio == profile.sweep.reduced_ratios[0]
        axis.errorbar(
            row.estimate,
            row.estimate_gap,
            xerr=[[row.estimate - row.low], [row.high - row.estimate]],
            yerr=[[row.estimate_gap - row.low_gap], [row.high_gap - row.estimate_gap]],
            color=style.COLOURS["sia"],
            marker="os"[profile.families.index(row.family)],
            markersize=5,
            markerfacecolor=None if solid else "white",
            linestyle="none",
            elinewidth=0.8,
            label=f"{labels.family_label(row.family)}, {labels.share_label(row.target_ratio)}",
        )
    ends = [0, max(both["high"].max(), both["high_gap"].max())]
    axis.plot(ends, ends, color=style.ZERO, linewidth=0.8, linestyle=":", label="equal")
    axis.set(xlabel="KL of unsteered steps (nats)", ylabel="J(dense) − J(SIA)")
    axis.set_title("loss of SIA against dense: measured and predicted")
    low, high = axis.get_ylim()
    axis.set_ylim(low - 0.5 * (high - low), high)  # room for the legend
    axis.legend(frameon=False, fontsize=style.SMALL, ncols=2, loc="lower right")


def _draw_bounds(axis, lab: pd.DataFrame, profile: Profile) -> None:
    """Draw mean regret and mean entropy bound of the steps below τ = 1."""
    rows = lab[lab["metric"].isin(BOUNDS)]
    losses = rows["value_model"].map(labels.LOSSES).str.replace(" loss", "\nloss")
    rows = rows.assign(
        cell=rows["family"].map(labels.family_label) + "\n" + losses,
        quantity=rows["metric"].map(BOUNDS),
    )
    rows = style.ordered(rows, family=profile.families)
    style.sns.barplot(rows, x="cell", y="estimate", hue="quantity", hue_order=BOUNDS.values(),
                      ax=axis, palette=[style.DARK, style.PALE], errorbar=None, saturation=1,
                      )  # fmt: skip
    axis.set(xlabel="", ylabel="nats", title="steps below τ = 1 (no intervals)")
    if rows["estimate"].notna().any():  # an untrained model may have no such step
        axis.set(yscale="log", ylim=(None, 8 * rows["estimate"].max()))  # room for the legend
    axis.legend(frameon=False, fontsize=style.SMALL)


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows, those of the lab with DIGITS decimals.

    Numbers of random instances stay exact: their deviations are the result.
    """
    columns = {
        name: table[name].astype("float32").round(DIGITS[name.partition("_")[0]])
        for name in QUANTITIES
    }
    lab = table["experiment"] == "lab"
    columns["entropy"] = table["entropy"].where(~lab, table["entropy"].round(DIGITS["entropy"]))
    reached = table["objective_reached"].astype("float32").round(DIGITS["objective_reached"])
    return table.assign(**columns, objective_reached=reached)


def summarize_steps(steps: pd.DataFrame, profile: Profile) -> list[dict]:
    """Return the rows of a summary that random steps come to."""
    steps = steps.sort_values("replicate", kind="stable")
    common, replicates = {"experiment": "step", "n": len(steps)}, steps["replicate"].nunique()
    regret, low = steps["regret"], steps["entropy"] < methods.TAU
    large = regret > 1e-3
    relative = ((steps["kl_optimum_base"] - regret).abs() / regret)[large]
    to_bound, to_hoeffding = regret / steps["bound"], steps["bound"] / steps["hoeffding"]
    records = _exact_rows(
        common,
        {
            "regret_minus_kl_base_optimum_max": (regret - steps["kl_base_optimum"]).abs().max(),
            "regret_vs_kl_optimum_base_median": relative.median(),
            "regret_vs_kl_optimum_base_off": (relative > 0.05).mean(),
            "steps_beyond_bound": (regret > steps["bound"] + 1e-6).mean(),
            "regret_to_bound_below_tau": to_bound[low & large].median(),
            "regret_to_bound_above_tau": to_bound[~low & large].median(),
            "bound_to_hoeffding_below_tau": to_hoeffding[low].median(),
            "bound_to_hoeffding_below_tenth": to_hoeffding[steps["entropy"] < 0.1].median(),
            "regret_left_alone_below_tau": regret[low].mean(),
            "regret_left_alone_above_tau": regret[~low].mean(),
        },
    )
    shape = (replicates, 1, len(steps) // replicates, 1)
    counts = np.stack([low, ~low, low], axis=1).astype(np.float64)
    for size in NOISES:
        noise = steps[f"noise_regret_{size:g}"].astype(np.float64)
        sums = np.stack([noise * low, noise * ~low, regret * low], axis=1)
        below, above, alone = np.moveaxis(estimates.ratio_draws(sums, counts, shape, profile), 2, 0)
        draws = {
            "noise_regret_below_tau": below,
            "noise_regret_above_tau": above,
            "noise_regret_below_to_above_tau": below / above,
            "left_alone_to_noise_regret_below_tau": alone / below,
        }
        setting = common | {"noise": size, "replicates": replicates}
        records += estimates.metric_rows(setting, draws, profile)
        predicted = (steps["noise_predicted"] * size**2).sum()
        numbers = {
            "noise_regret_entropy_correlation": noise.corr(steps["entropy"], method="spearman"),
            "noise_regret_to_prediction": noise.sum() / predicted,
        }
        records += _exact_rows(setting, numbers)
    return records


def _exact_rows(common: dict, numbers: dict[str, float]) -> list[dict]:
    """Return a row for each metric, whose interval is the number itself."""
    return [
        common | {"metric": metric} | dict.fromkeys(estimates.NUMBERS, float(number))
        for metric, number in numbers.items()
    ]


def summarize_trees(trees: pd.DataFrame) -> list[dict]:
    """Return the rows of a summary that random trees come to."""
    regret = trees["regret"]
    numbers = {"tree_regret_minus_own_sum_max": (regret - trees["sum_under_own"]).abs().max()}
    for states in ("optimum", "base"):
        total = trees[f"sum_under_{states}"]
        numbers[f"trees_beyond_{states}_sum"] = (regret > total + 1e-6).mean()
        numbers[f"{states}_sum_to_regret"] = (total / regret).median()
    return _exact_rows({"experiment": "tree", "n": len(trees)}, numbers)


def _lab_rows(tokens: pd.DataFrame, family: str, profile: Profile) -> list[dict]:
    """Return what the gate opens and skips, and the entropy bound, in states of lab policies."""
    records, common = [], _lab_labels(tokens, family, profile)
    for ratio in profile.sweep.reduced_ratios:
        for states, target in (("sia", ratio), ("base", 0.0), ("dense", 1.0)):
            at_target = np.isclose(tokens["target_ratio"], target)
            visited = tokens[(tokens["method"] == states) & at_target]
            opens = visited[f"opens_{ratio:g}"]
            for loss in LOSSES:
                kl = visited[f"divergence_{loss}"]
                skipped = kl.where(opens == 0, 0.0)
                draws = {
                    "unsteered_kl": _per_prompt(visited, skipped, None, profile),
                    "junction_kl_share": _per_prompt(visited, kl - skipped, kl, profile),
                    "gate_open_share": _per_prompt(visited, opens, opens**0, profile),
                }
                setting = common | {"method": "sia", "target_ratio": ratio, "states": states}
                setting["value_model"] = methods.VALUES[loss]
                records += estimates.metric_rows(setting, draws, profile)
    low = tokens[(tokens["method"] == "base") & (tokens["entropy"] < methods.TAU)]
    for loss in LOSSES if len(low) else ():  # an untrained model is never that sure
        entropy, regret, spread = (
            low[name].to_numpy(np.float64)
            for name in ("entropy", f"divergence_{loss}", f"range_{loss}")
        )
        bound = regret_bounds(entropy, spread)
        setting = common | {"value_model": methods.VALUES[loss], "states": "base", "n": len(low)}
        numbers = {
            "steps_below_tau_beyond_bound": (regret > bound + 1e-4).mean(),
            "steps_below_tau_regret_to_bound": regret.sum() / bound.sum(),
            "steps_below_tau_regret": regret.mean(),
            "steps_below_tau_bound": bound.mean(),
        }
        records += [
            setting | {"metric": metric, "estimate": float(number)}
            for metric, number in numbers.items()
        ]
    return records


def _per_prompt(
    tokens: pd.DataFrame, top: pd.Series, bottom: pd.Series | None, profile: Profile
) -> np.ndarray:
    """Return Σ top / Σ bottom (None: the responses), as `estimates.ratio_draws` does."""
    prompts = profile.evaluation.prompts_per_objective
    index, shape = estimates.unit_indices(tokens, "prompt", prompts)
    sums, counts = (
        np.ones(np.prod(shape)) if column is None
        else np.bincount(index, column.to_numpy(np.float64), np.prod(shape))
        for column in (top, bottom)
    )  # fmt: skip
    return estimates.ratio_draws(sums[:, None], counts[:, None], shape, profile)[:, :, 0]


def _lab_labels(rows: pd.DataFrame, family: str, profile: Profile) -> dict:
    replicates, prompts = rows["replicate"].nunique(), profile.evaluation.prompts_per_objective
    return {
        "experiment": "lab",
        "family": family,
        "objective": "all",
        "replicates": replicates,
        "n": replicates * len(OBJECTIVES) * prompts,
    }


def _objective_rows(reached: pd.DataFrame, family: str, profile: Profile) -> list[dict]:
    """Return what each lab policy reaches of J = E[R] − KL, and what it lacks to dense steering."""
    records, common = [], _lab_labels(reached, family, profile)
    policies = reached.sort_values(estimates.UNIT).groupby(
        ["method", "target_ratio"], observed=True
    )
    values = {key: rows["objective_reached"].to_numpy(float) for key, rows in policies}
    dense = next(reached for (method, _), reached in values.items() if method == "dense")
    shape = (common["replicates"], len(OBJECTIVES), profile.evaluation.prompts_per_objective, 1)
    for (method, target), of_policy in values.items():
        sums = np.stack([of_policy, dense - of_policy], axis=1)
        draws = estimates.ratio_draws(sums, np.ones_like(sums), shape, profile)
        setting = common | {"method": method, "target_ratio": float(target)}
        setting["value_model"] = "value-token"
        names = ("objective_reached", "objective_gap_to_dense")
        by_metric = dict(zip(names, np.moveaxis(draws, 2, 0), strict=True))
        records += estimates.metric_rows(setting, by_metric, profile)
    return records
