"""The theory, tried out: on random tabular policies, where everything can be computed exactly, and on the lab's own distributions.

Experiments (column `experiment`): "step", single steps with random policies and values; "tree", whole responses on small trees;
"lab", steps that lab policies visit, with values at β = 1; "objective", what the lab's policies reach of E[R] − (1/β)·KL.
Equations and sources: sia.theory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.divergence import regret_bounds
from benchmarks.analysis.labels import LOSSES as LOSS_LABELS
from benchmarks.analysis.labels import family_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.profile import LabProfile, Profile

STEPS, TREES, CANDIDATES, DRAWS = 3000, 1000, 10, 64
LOSSES = ("token", "mean")
STATES = {"sia": "SIA", "base": "base", "dense": "dense"}  # policies whose states are visited
LAWS = {
    "regret_vs_kl_optimum_base_median": "KL(π*‖π)/β for a step's regret:\nmedian relative error",
    "trees_beyond_optimum_sum": "trees beyond the sum\nunder the optimum's states",
    "trees_beyond_base_sum": "trees beyond the sum\nunder the base's states",
    "steps_beyond_bound": "steps beyond\nthe entropy bound",
    "regret_to_bound_below_tau": "regret / entropy bound,\nentropy < 1 (median)",
    "regret_to_bound_above_tau": "regret / entropy bound,\nentropy ≥ 1 (median)",
}
SIDES = (("below_tau", "entropy < 1", "#9ECAE1"), ("above_tau", "entropy ≥ 1", "#08306B"))
BOUNDS = {"steps_below_tau_regret": "mean regret", "steps_below_tau_bound": "mean entropy bound"}


class Theory(Figure):
    """Theory and exact computation."""

    title = "Theory and exact computation"
    needs_lab = True

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        wanted = []
        for family in profile.families:
            wanted += [
                methods.base(replicate, family),
                *(
                    methods.steered(replicate, family, "token", ratio=r)
                    for r in profile.sweep.reduced_ratios
                ),
            ]
            wanted.append(methods.dense(replicate, family, "token"))
        return FigureCells(cells=wanted, traces=wanted)

    def collect(self, profile: LabProfile, replicates: Sequence[int], results) -> pd.DataFrame:
        frames = [random_steps(replicate).assign(replicate=replicate) for replicate in replicates]
        frames += [random_trees(replicate).assign(replicate=replicate) for replicate in replicates]
        for replicate in replicates:
            for cell in self.cells(profile, replicate).traces:
                labels = {
                    "replicate": replicate,
                    "family": cell.family,
                    "method": cell.method,
                    "target_ratio": cell.target_ratio,
                }
                tokens = results.rows(results.resolve(cell), "trace")
                tokens = tokens[tokens["seed"] == 0]
                kept = [
                    "objective",
                    "prompt",
                    "step",
                    "entropy",
                    "steered",
                    *(f"{n}_{loss}" for n in ("divergence", "range") for loss in LOSSES),
                ]
                opens = {}
                for ratio in profile.sweep.reduced_ratios:  # what the gate of SIA would do here
                    sparse = results.resolve(
                        methods.steered(replicate, cell.family, "token", ratio=ratio)
                    )
                    opens[f"opens_{ratio:g}"] = methods.gate_opens_at(tokens, sparse).astype("int8")
                tokens = tokens[kept].assign(**opens, **labels, experiment="lab")
                if cell.gate != "never":  # the bound is looked at in base states alone
                    tokens = tokens.assign(**{f"range_{loss}": np.nan for loss in LOSSES})
                frames.append(tokens)
                rows = results.rows(results.resolve(cell))[
                    ["objective", "prompt", "seed", "training_reward", "kl"]
                ]
                rows = rows[rows["seed"] == 0]  # whose training reward it is
                gained = profile.training.reward_scale * rows["training_reward"] - rows["kl"]
                frames.append(
                    rows.assign(**labels, experiment="objective", objective_reached=gained).drop(
                        columns=["training_reward", "kl"]
                    )
                )
        table = pd.concat(
            frames, ignore_index=True
        )  # numbers of random instances stay exact: their deviations are what is asked
        measured = [
            "objective_reached",
            *(f"{name}_{loss}" for name in ("divergence", "range") for loss in LOSSES),
        ]
        table[measured] = table[measured].astype("float32").round(5)
        return table.astype(
            dict.fromkeys(("experiment", "family", "method", "objective"), "category")
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Return one estimate per law.

        Of random instances: shares and largest deviations over all of them (low and high are the number itself), losses
        by noise with intervals over the steps. Of the lab: means with intervals. `states` names the policy whose states
        are averaged over.
        """
        records = [
            *_steps(rows[rows["experiment"] == "step"], profile),
            *_trees(rows[rows["experiment"] == "tree"]),
        ]
        lab, reached = rows[rows["experiment"] == "lab"], rows[rows["experiment"] == "objective"]
        for family in profile.families:
            records += _lab(lab[lab["family"] == family], family, profile)
            records += _objective(reached[reached["family"] == family], family, profile)
        further = ["experiment", "states", "noise"]
        return estimates.summary_frame(
            records, further, digits=9
        )  # deviations of identities are tiny

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the laws: random steps and trees in the first two panels, the lab in the others."""
        from benchmarks.figures import style

        table = estimates.pooled(table)
        lab = table[table["experiment"] == "lab"]
        figure, axes = style.plt.subplots(3, 2, figsize=(style.PAGE, 6.9))
        _draw_laws(axes[0, 0], table)
        _draw_noise(axes[0, 1], table)
        _draw_sums(axes[1, 0], lab, "unsteered_kl", profile)
        axes[1, 0].set(ylabel="nats per response", title="KL of unsteered steps (Theorem 2.2)")
        _draw_sums(axes[1, 1], lab, "junction_kl_share", profile)
        axes[1, 1].set(ylabel="share of the KL of all steps", title="KL at junctions")
        _draw_losses(axes[2, 0], lab, profile)
        _draw_bounds(axes[2, 1], lab, profile)
        handles = [
            style.plt.Rectangle((0, 0), 1, 1, color=style.COLOURS[key], label=f"states of {name}")
            for key, name in STATES.items()
        ]
        note = style.sample_size_note(lab[lab["low"].notna()].assign(seeds=1), profile, "Lines")
        caption = (
            "Exact on random steps and trees (top), measured in the lab with per-token values unless "
            f"labelled otherwise (β = 1; J = E[reward] − KL). {note}"
        )
        return style.finish(figure, handles, caption, folder, "theory", stale=stale)


def _draw_laws(axis, table: pd.DataFrame) -> None:
    """Draw how often, or how far, the laws fail on random steps and trees, in percent."""
    from benchmarks.figures import style

    laws = table[table["metric"].isin(LAWS)].set_index("metric")["estimate"]
    values = pd.Series({label: 100 * laws[metric] for metric, label in LAWS.items()})
    style.sns.barplot(x=values.values, y=values.index, ax=axis, color=style.NEUTRAL, width=0.6)
    axis.bar_label(axis.containers[0], fmt="%.0f", padding=2, fontsize=style.SMALL)
    axis.tick_params(axis="y", labelsize=6)
    axis.set(title="random steps and trees", xlabel="%", ylabel="")


def _draw_noise(axis, table: pd.DataFrame) -> None:
    """Draw the regret of steering by noisy values beside that of leaving a step alone."""
    from benchmarks.figures import style

    exact = table[table["experiment"] == "step"].set_index("metric")
    for ending, label, colour in SIDES:
        noisy = exact.loc[[f"noise_regret_{ending}"]]
        axis.plot(
            noisy["noise"],
            noisy["estimate"],
            "o-",
            color=colour,
            markersize=3,
            label=f"noise, {label}",
        )
        alone = exact.loc[f"regret_left_alone_{ending}", "estimate"]
        axis.axhline(
            alone, color=colour, linestyle="--", linewidth=1.1, label=f"left alone, {label}"
        )
    axis.set(xscale="log", yscale="log", xlabel="SD of the noise in V", ylabel="mean regret (nats)")
    axis.set_title("random steps: what noise costs")
    axis.legend(frameon=False, fontsize=style.SMALL, loc="lower right")


def _draw_sums(axis, lab: pd.DataFrame, metric: str, profile: Profile) -> None:
    """Draw one metric by family, ratio and the policy whose states are visited."""
    from benchmarks.figures import style

    rows = lab[(lab["metric"] == metric) & (lab["value_model"] == "value-token")]
    rows = rows[rows["target_ratio"].isin(profile.sweep.reduced_ratios)]
    rows = rows.assign(
        cell=[
            f"{family_label(family)}\n{ratio:.0%}"
            for family, ratio in zip(rows["family"], rows["target_ratio"], strict=True)
        ]
    )
    order = [family for family in profile.families for _ in profile.sweep.reduced_ratios]
    rows = rows.sort_values(
        ["family", "target_ratio"],
        key=lambda column: column.map(order.index) if column.name == "family" else column,
    )
    (
        style.so.Plot(rows, x="cell", y="estimate", color="states")
        .add(style.so.Bar(alpha=1, edgewidth=0, width=0.8), style.so.Dodge(), legend=False)
        .add(
            style.so.Range(color="#222222", linewidth=0.9),
            style.so.Dodge(),
            ymin="low",
            ymax="high",
            legend=False,
        )
        .scale(color={states: style.COLOURS[states] for states in STATES})
        .label(x="")
        .on(axis)
        .plot()
    )


def _draw_losses(axis, lab: pd.DataFrame, profile: Profile) -> None:
    """Draw the measured loss of SIA against the sum that the theory equates with it."""
    from benchmarks.figures import style

    gaps = lab[lab["metric"] == "objective_gap_to_dense"]
    sums = lab[
        (lab["metric"] == "unsteered_kl")
        & (lab["value_model"] == "value-token")
        & (lab["states"] == "sia")
    ]
    both = sums.merge(gaps, on=["family", "target_ratio"], suffixes=("", "_gap"))
    first_ratio = profile.sweep.reduced_ratios[0]
    for row in both.itertuples():
        axis.errorbar(
            row.estimate,
            row.estimate_gap,
            xerr=[[row.estimate - row.low], [row.high - row.estimate]],
            yerr=[[row.estimate_gap - row.low_gap], [row.high_gap - row.estimate_gap]],
            color=style.COLOURS["sia"],
            marker="os"[profile.families.index(row.family)],
            markersize=5,
            markerfacecolor=None if row.target_ratio == first_ratio else "white",
            linestyle="none",
            elinewidth=0.8,
            label=f"{family_label(row.family)}, {row.target_ratio:.0%}",
        )
    ends = [0, max(both["high"].max(), both["high_gap"].max())]
    axis.plot(ends, ends, color=style.ZERO, linewidth=0.8, linestyle=":", label="equal")
    axis.set(
        xlabel="KL of unsteered steps (nats)",
        ylabel="J(dense) − J(SIA)",
        title="is the sum the loss?",
    )
    axis.legend(frameon=False, fontsize=style.SMALL)


def _draw_bounds(axis, lab: pd.DataFrame, profile: Profile) -> None:
    """Draw mean regret and mean entropy bound of the steps below τ = 1."""
    from benchmarks.figures import style

    rows = lab[lab["metric"].isin(BOUNDS)]
    rows = rows.assign(
        cell=[
            f"{family_label(family)}\n{LOSS_LABELS[value_model]}".replace(" loss", "\nloss")
            for family, value_model in zip(rows["family"], rows["value_model"], strict=True)
        ],
        shown=rows["metric"].map(BOUNDS),
    )
    order = {family: place for place, family in enumerate(profile.families)}
    rows = rows.sort_values("family", key=lambda column: column.map(order), kind="stable")
    style.sns.barplot(rows, x="cell", y="estimate", hue="shown", hue_order=BOUNDS.values(), ax=axis,
                      palette=[side[2] for side in SIDES[::-1]],
                      errorbar=None, saturation=1)  # fmt: skip
    top = 8 * rows["estimate"].max()  # room for the legend
    axis.set(
        yscale="log",
        ylim=(None, top),
        xlabel="",
        ylabel="nats",
        title="steps below τ = 1 (no intervals)",
    )
    axis.legend(frameon=False, fontsize=style.SMALL)


def random_steps(replicate: int) -> pd.DataFrame:
    """Single steps: π from normal logits of spread 0 to 4, V normal of spread 0 to 3, β from 0.1 to 4. noise_regret_SD: what steering by V
    with independent normal errors of this size loses, mean of DRAWS."""
    import torch

    from sia import theory

    generator = torch.Generator().manual_seed(replicate)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(STEPS, 1, generator=generator, dtype=torch.float64)

    def normal() -> torch.Tensor:
        return torch.randn(STEPS, CANDIDATES, generator=generator, dtype=torch.float64)

    base, values, beta = (
        (uniform(0, 4) * normal()).softmax(-1),
        uniform(0, 3) * normal(),
        uniform(0.1, 4),
    )
    best = theory.optimal_policy(base, values, beta)
    regret = theory.objective(best, base, values, beta[:, 0]) - theory.objective(
        base, base, values, beta[:, 0]
    )
    spread, entropy = values.amax(1) - values.amin(1), torch.special.entr(base).sum(-1)
    noise = {}
    for size in methods.NOISES:
        draws = (
            theory.divergence(theory.optimal_policy(base, values + size * normal(), beta), best)
            for _ in range(DRAWS)
        )
        noise[f"noise_regret_{size:g}"] = (sum(draws) / DRAWS / beta[:, 0]).float()
    columns = {
        "entropy": entropy,
        "beta": beta[:, 0],
        "regret": regret,
        "kl_base_optimum": theory.divergence(base, best) / beta[:, 0],
        "kl_optimum_base": theory.divergence(best, base) / beta[:, 0],
        "bound": torch.from_numpy(
            regret_bounds(entropy.numpy(), spread.numpy(), beta[:, 0].numpy())
        ),
        "hoeffding": beta[:, 0] * spread**2 / 8,
        "noise_predicted": beta[:, 0]
        / 2
        * (1 - best.square().sum(-1)),  # `theory.expected_noise_regret` of SD 1, by β
        **noise,
    }
    return pd.DataFrame({name: column.numpy() for name, column in columns.items()}).assign(
        experiment="step"
    )


def random_trees(replicate: int) -> pd.DataFrame:
    """Responses of 4 tokens out of 3; about half of the states are steered, those of highest entropy. β = 1."""
    import torch

    from sia.theory import Tree

    generator, records = torch.Generator().manual_seed(1000 + replicate), []
    for _ in range(TREES):
        tree = Tree.random(4, 3, 1.5, 2.0, generator)
        entropies = [torch.special.entr(base).sum(-1) for base in tree.base]
        middle = torch.cat(entropies).median()
        policy, optimum = (
            tree.sparse([entropy >= middle for entropy in entropies], 1.0),
            tree.optimum(1.0),
        )
        regret = tree.objective(optimum, 1.0) - tree.objective(policy, 1.0)
        sums = {
            name: tree.regret_by_steps(policy, states, 1.0)
            for name, states in (("own", policy), ("optimum", optimum), ("base", list(tree.base)))
        }
        records.append(
            {"regret": regret.item()}
            | {f"sum_under_{name}": value.item() for name, value in sums.items()}
        )
    return pd.DataFrame.from_records(records).assign(experiment="tree")


def _steps(steps: pd.DataFrame, profile: Profile) -> list[dict]:
    steps = steps.sort_values("replicate", kind="stable")
    common = {"experiment": "step", "n": len(steps)}
    regret, low = steps["regret"], steps["entropy"] < methods.TAU
    large = regret > 1e-3
    relative = ((steps["kl_optimum_base"] - regret).abs() / regret)[large]
    to_bound, to_hoeffding = regret / steps["bound"], steps["bound"] / steps["hoeffding"]
    values = {
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
    }
    records = [_exact(common, metric, value) for metric, value in values.items()]
    replicates = steps["replicate"].nunique()
    shape = (replicates, 1, len(steps) // replicates, 1)
    for size in methods.NOISES:
        noise = steps[f"noise_regret_{size:g}"].astype(np.float64)
        sums = np.stack([noise * low, noise * ~low, regret * low], axis=1)
        counts = np.stack([low, ~low, low], axis=1).astype(np.float64)
        draws = estimates.ratio_draws(sums, counts, shape, profile)
        below, above, alone = (draws[:, :, i] for i in range(3))
        means = {
            "noise_regret_below_tau": below,
            "noise_regret_above_tau": above,
            "noise_regret_below_to_above_tau": below / above,
            "left_alone_to_noise_regret_below_tau": alone / below,
        }
        labels = common | {"noise": size, "replicates": replicates}
        for metric, draws_of_metric in means.items():
            records += estimates.estimate_rows(
                labels | {"metric": metric}, draws_of_metric, profile
            )
        correlation = noise.corr(steps["entropy"], method="spearman")
        predicted = (steps["noise_predicted"] * size**2).sum()
        records.append(_exact(labels, "noise_regret_entropy_correlation", correlation))
        records.append(_exact(labels, "noise_regret_to_prediction", noise.sum() / predicted))
    return records


def _exact(labels: dict, metric: str, value: float) -> dict:
    return labels | {"metric": metric} | dict.fromkeys(estimates.NUMBERS, float(value))


def _trees(trees: pd.DataFrame) -> list[dict]:
    common = {"experiment": "tree", "n": len(trees)}
    regret = trees["regret"]
    deviation = (regret - trees["sum_under_own"]).abs().max()
    records = [_exact(common, "tree_regret_minus_own_sum_max", deviation)]
    for states in ("optimum", "base"):
        total = trees[f"sum_under_{states}"]
        beyond, ratio = (regret > total + 1e-6).mean(), (total / regret).median()
        records.append(_exact(common, f"trees_beyond_{states}_sum", beyond))
        records.append(_exact(common, f"{states}_sum_to_regret", ratio))
    return records


def _lab(tokens: pd.DataFrame, family: str, profile: Profile) -> list[dict]:
    """Return what the gate opens and skips, and the entropy bound, in states of lab policies."""
    records, common = [], _lab_labels(tokens, family, profile)
    for ratio in profile.sweep.reduced_ratios:
        opens = f"opens_{ratio:g}"
        for states, target in (("sia", ratio), ("base", 0.0), ("dense", 1.0)):
            at_target = np.isclose(tokens["target_ratio"], target)
            part = tokens[(tokens["method"] == states) & at_target]
            for loss in LOSSES:
                kl = part[f"divergence_{loss}"]
                skipped = kl.where(part[opens] == 0, 0.0)
                ratios = {
                    "unsteered_kl": (skipped, None),
                    "junction_kl_share": (kl - skipped, kl),
                    "gate_open_share": (part[opens].astype(float), pd.Series(1.0, part.index)),
                }
                labels = common | {"method": "sia", "target_ratio": ratio, "states": states}
                labels["value_model"] = f"value-{loss}"
                for metric, (top, bottom) in ratios.items():
                    draws = _per_prompt(part, top, bottom, profile)[:, :, 0]
                    records += estimates.estimate_rows(labels | {"metric": metric}, draws, profile)
    low = tokens[(tokens["method"] == "base") & (tokens["entropy"] < methods.TAU)]
    for loss in LOSSES if len(low) else ():  # an untrained model is never that sure
        entropy, regret, spread = (
            low[name].to_numpy(np.float64)
            for name in ("entropy", f"divergence_{loss}", f"range_{loss}")
        )
        bound = regret_bounds(entropy, spread)
        labels = common | {"value_model": f"value-{loss}", "states": "base", "n": len(low)}
        values = {
            "steps_below_tau_beyond_bound": (regret > bound + 1e-4).mean(),
            "steps_below_tau_regret_to_bound": regret.sum() / bound.sum(),
            "steps_below_tau_regret": regret.mean(),
            "steps_below_tau_bound": bound.mean(),
        }
        records += [
            labels | {"metric": metric, "estimate": float(value)}
            for metric, value in values.items()
        ]
    return records


def _per_prompt(
    part: pd.DataFrame, top: pd.Series, bottom: pd.Series | None, profile: Profile
) -> np.ndarray:
    """Return resamples, over replicates and prompts, of Σ top / Σ bottom (None: the responses)."""
    index, shape = estimates.unit_indices(part, "prompt", profile.evaluation.prompts_per_objective)
    size = np.prod(shape)
    sums = np.bincount(index, top.to_numpy(np.float64), size)
    counts = np.ones(size)
    if bottom is not None:
        counts = np.bincount(index, bottom.to_numpy(np.float64), size)
    return estimates.ratio_draws(sums[:, None], counts[:, None], shape, profile)


def _lab_labels(rows: pd.DataFrame, family: str, profile: Profile) -> dict:
    replicates, prompts = rows["replicate"].nunique(), profile.evaluation.prompts_per_objective
    return {
        "experiment": "lab",
        "family": family,
        "objective": "all",
        "replicates": replicates,
        "n": replicates * len(OBJECTIVES) * prompts,
    }


def _objective(reached: pd.DataFrame, family: str, profile: Profile) -> list[dict]:
    """Return what each lab policy reaches of J = E[R] − KL, and what it lacks to dense steering."""
    records, common = [], _lab_labels(reached, family, profile)
    by_policy = reached.sort_values(estimates.UNIT).groupby(
        ["method", "target_ratio"], observed=True
    )
    reached_by = {key: part["objective_reached"].to_numpy(float) for key, part in by_policy}
    dense = next(values for (method, _), values in reached_by.items() if method == "dense")
    prompts = profile.evaluation.prompts_per_objective
    shape = (common["replicates"], len(OBJECTIVES), prompts, 1)
    for (method, target), values in reached_by.items():
        labels = common | {"method": method, "target_ratio": float(target)}
        labels["value_model"] = "value-token"
        for metric, numbers in (
            ("objective_reached", values),
            ("objective_gap_to_dense", dense - values),
        ):
            draws = estimates.ratio_draws(
                numbers[:, None], np.ones((len(numbers), 1)), shape, profile
            )
            records += estimates.estimate_rows(labels | {"metric": metric}, draws[:, :, 0], profile)
    return records
