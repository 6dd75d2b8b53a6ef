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
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.profile import LabProfile, Profile

STEPS, TREES, CANDIDATES, DRAWS = 3000, 1000, 10, 64
LOSSES = ("token", "mean")


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
        """What the laws come to: random steps and trees first, the lab in the others."""
        from benchmarks.figures import style

        table = estimates.pooled(table)

        figure, axes = style.grid(3, 2, 3.9, 2.5)
        axes = axes.reshape(1, 6)
        exact = table[table["experiment"].isin(["step", "tree"])]
        laws = exact[exact["noise"].isna()].set_index("metric")["estimate"]
        shares = {
            "KL(π*‖π)/β for a step's regret:\nmedian relative error": "regret_vs_kl_optimum_base_median",
            "trees beyond the sum under\nthe optimum's states": "trees_beyond_optimum_sum",
            "trees beyond the sum under\nthe base's states": "trees_beyond_base_sum",
            "steps beyond the\nentropy bound": "steps_beyond_bound",
            "regret / entropy bound,\nentropy < 1 (median)": "regret_to_bound_below_tau",
            "the same, entropy ≥ 1": "regret_to_bound_above_tau",
        }
        axes[0, 0].barh(
            list(shares), [100 * laws[metric] for metric in shares.values()], color=style.NEUTRAL
        )
        axes[0, 0].invert_yaxis()
        axes[0, 0].tick_params(axis="y", labelsize=7)
        axes[0, 0].set_title("random steps and trees", loc="left")
        axes[0, 0].set_xlabel("%")
        for where, stretch, colour in (
            ("below 1", "below_tau", "#9ECAE1"),
            ("1 and more", "above_tau", "#08306B"),
        ):
            noisy = exact[exact["metric"] == f"noise_regret_{stretch}"]
            axes[0, 1].plot(
                noisy["noise"],
                noisy["estimate"],
                color=colour,
                marker="o",
                markersize=3,
                label=f"noise, entropy {where}",
            )
            alone = laws[f"regret_left_alone_{stretch}"]
            axes[0, 1].axhline(
                alone, color=colour, linestyle="--", linewidth=1.1, label=f"left alone, {where}"
            )
        axes[0, 1].set(
            xscale="log", yscale="log", xlabel="SD of the noise in V", ylabel="regret (mean)"
        )
        axes[0, 1].set_title("random steps: what noise costs", loc="left")
        axes[0, 1].legend(frameon=False, fontsize=7, loc="lower right")
        axes[0, 2].set_ylabel("nats for a response")
        axes[0, 3].set_ylabel("share of the KL of all steps")
        lab = table[table["experiment"] == "lab"]
        colours = {
            "sia": style.COLOURS["sia"],
            "base": style.COLOURS["base"],
            "dense": style.COLOURS["dense"],
        }
        few = profile.sweep.reduced_ratios
        for axis, metric, title in (
            (axes[0, 2], "unsteered_kl", "lab: Theorem 2.2's sum"),
            (
                axes[0, 3],
                "junction_kl_share",
                "lab: share at junctions",
            ),
        ):
            part = lab[(lab["metric"] == metric) & (lab["value_model"] == "value-token")]
            place, ticks = 0, []
            for family in profile.families:
                for ratio in few:
                    for offset, states in enumerate(colours):
                        row = part[
                            (part["family"] == family)
                            & np.isclose(part["target_ratio"], ratio)
                            & (part["states"] == states)
                        ].iloc[0]
                        style.bars(axis, place + 0.28 * offset - 0.28, row, colours[states], 0.26)
                    ticks.append(f"{style.FAMILIES[family]}\n{ratio:.0%}")
                    place += 1
            axis.set_xticks(range(place), ticks, fontsize=style.SMALL)
            axis.set_title(title, loc="left")
        gaps = lab[lab["metric"] == "objective_gap_to_dense"]
        sums = lab[
            (lab["metric"] == "unsteered_kl")
            & (lab["value_model"] == "value-token")
            & (lab["states"] == "sia")
        ]
        for family, marker in zip(profile.families, ("o", "s"), strict=False):
            for ratio, hollow in zip(few, (False, True), strict=False):
                x, y = (
                    part[(part["family"] == family) & np.isclose(part["target_ratio"], ratio)].iloc[
                        0
                    ]
                    for part in (sums, gaps)
                )
                axes[0, 4].errorbar(
                    x["estimate"], y["estimate"], xerr=[[x["estimate"] - x["low"]], [x["high"] - x["estimate"]]],
                    yerr=[[y["estimate"] - y["low"]], [y["high"] - y["estimate"]]], marker=marker, color=style.COLOURS["sia"], markersize=5,
                    markerfacecolor="white" if hollow else None, linestyle="none", elinewidth=0.8,
                    label=f"{style.FAMILIES[family]}, {ratio:.0%}",
                )  # fmt: skip
        ends = [0, max(sums["high"].max(), gaps["high"].max())]
        axes[0, 4].plot(ends, ends, color="#999999", linewidth=0.8, linestyle=":")
        axes[0, 4].set_xlabel("sum, own states (nats)")
        axes[0, 4].set_ylabel("J(dense) − J(SIA)")
        axes[0, 4].set_title("lab: is the sum the loss?", loc="left")
        axes[0, 4].legend(frameon=False, fontsize=style.SMALL)
        bounds = lab[lab["metric"].isin(["steps_below_tau_regret", "steps_below_tau_bound"])]
        names = []
        for place, (family, loss) in enumerate(
            (family, loss) for family in profile.families for loss in LOSSES
        ):
            rows = bounds[
                (bounds["family"] == family) & (bounds["value_model"] == f"value-{loss}")
            ].set_index("metric")["estimate"]
            names.append(f"{style.FAMILIES[family]}\n{style.LOSSES[f'value-{loss}'].split()[0]}")
            for offset, (metric, colour) in enumerate(
                (("regret", "#08306B"), ("bound", "#9ECAE1"))
            ):
                if len(rows):
                    axes[0, 5].bar(
                        place + 0.4 * offset - 0.2,
                        rows[f"steps_below_tau_{metric}"],
                        0.36,
                        color=colour,
                    )
        axes[0, 5].set_xticks(range(len(names)), names, fontsize=7)
        axes[0, 5].set(yscale="log", ylabel="nats, mean")
        axes[0, 5].set_title(
            "lab, steps below τ = 1:\nregret (dark) and bound (pale)", loc="left", fontsize=9
        )
        handles = [
            style.handle(
                m,
                f"states of {m if m != 'sia' else 'SIA'}",
                linestyle="-",
                marker=None,
                linewidth=5,
            )
            for m in colours
        ]
        steps, trees = (
            int(table[table["experiment"] == name]["n"].iloc[0]) for name in ("step", "tree")
        )
        caption = (
            f"First two panels, exact: {steps} random steps, {trees} random trees; not drawn are the identities, true to rounding: a step's "
            f"regret is KL(π‖π*)/β, and that of a sparse policy the sum over its own unsteered states. Entropy bounds a step's regret "
            f"below ln 2 = 0.69 nats alone: above, the bound is Hoeffding's. Others: the lab, per-token values where not said, β = 1, "
            f"{' and '.join(f'{r:.0%}' for r in few)} of the tokens; J = E[reward (SD 2)] − KL. Dotted: equality, as it would be if the values "
            f"were exact; last panel: no intervals. {style.measured(lab[lab['low'].notna()].assign(seeds=1), profile)}"
        )
        return style.finish(figure, handles, caption, folder, "theory", stale=stale)


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
