"""Figure 4: strength of steering, by the grid of β and share of tokens, and at each method's best.

figure4 shows the first family. figure4-sparse-dense compares sparse and dense steering of both
families in every setting of the claims: at β = 1, at each method's best β, and at equal drift.

At equal drift: SIA at β = 1, or at its best β, against dense steering at the β whose KL per
response is the same, linear in the root of the KL between measured β (and the base, at KL 0) in
every resample. That rewards grow about linearly in the root of the KL is from Gao, Schulman and
Hilton, "Scaling laws for reward model overoptimization", 2023.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates, labels
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "kl", "kl_per_token")


class Figure4(Figure):
    """Figure 4: steering strength."""

    measured = (*METRICS[:4], "steered", "tokens")

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return SIA at β = 1 and tuned, dense steering at every β, and the grid.

        The grid, of β and the reduced ratios, is of the first family.
        """
        requests, sweep = [], profile.sweep
        for family in profile.families:
            requests.append(methods.base(replicate, family))
            for loss in profile.losses:
                unit = (profile, replicate, family, loss)
                requests += methods.curve(*unit)
                ratios = sweep.reduced_ratios if family == profile.families[0] else ()
                requests += [
                    methods.steered(*unit[1:], ratio=ratio, beta=beta)
                    for beta in sweep.betas
                    for ratio in ratios
                ]
                requests += [methods.dense(*unit[1:], beta=beta) for beta in sweep.betas]
            for loss in methods.tuned_losses(profile):
                requests += methods.curve(profile, replicate, family, loss, tuned=True)
        return FigureCells(requests)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate every cell, and the paired differences of SIA and its mean to dense.

        They are taken at the same β, with each at its own best β, and (`matched`: "kl") at equal
        drift. Versus "beta-1": another β against β = 1.
        """
        metrics = profile.available_metrics(METRICS)
        scores = estimates.method_scores(rows, metrics)
        differences, matched = [], []
        for dense in estimates.select(scores, method="dense"):
            setting = {k: dense.labels[k] for k in ("family", "value_model", "tuned")}
            setting |= {} if dense.labels["tuned"] else {"beta": dense.labels["beta"]}
            sparse = estimates.select(scores, method="sia", **setting)
            if not sparse:
                continue
            differences += methods.against_dense(sparse, dense, profile)
            if setting["tuned"] or setting["beta"] == 1:
                matched.append((dense_curve(scores, setting), sparse))
        others = estimates.select(
            scores,
            family=profile.families[0],
            tuned=False,
            value_model=tuple(methods.value_models(profile)),
        )
        usual = {
            (one.labels["value_model"], one.labels["target_ratio"]): one
            for one in estimates.select(others, beta=1.0)
        }
        pooled = estimates.over_families(differences)
        differences += [
            estimates.difference(
                one, usual[one.labels["value_model"], one.labels["target_ratio"]], versus="beta-1"
            )
            for one in others
            if one.labels["beta"] != 1
        ]
        table = estimates.summarize([*scores, *differences, *pooled], metrics, profile)
        return pd.concat([table, at_equal_drift(matched, profile)], ignore_index=True)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the effects of β and of the share of tokens, and sparse against dense steering."""
        return [
            *draw_strength(table, profile, stale, folder),
            *draw_sparse_against_dense(table, profile, stale, folder),
        ]


def dense_curve(
    scores: Sequence[estimates.MethodScores], setting: dict
) -> list[estimates.MethodScores]:
    """Return dense steering by ascending β, from the base on."""
    base = estimates.select_one(scores, family=setting["family"], gate="never")
    same = {k: setting[k] for k in ("family", "value_model")}
    dense = estimates.select(scores, **same, method="dense", tuned=False)
    dense = [one for one in dense if np.isfinite(one.labels["beta"])]
    return [base, *sorted(dense, key=lambda one: one.labels["beta"])]


def at_equal_drift(
    settings: Sequence[tuple[Sequence[estimates.MethodScores], Sequence[estimates.MethodScores]]],
    profile: Profile,
) -> pd.DataFrame:
    """Return SIA − dense where both have the KL of SIA, by ratio and for the claimed ones' mean.

    Args:
        settings: For each family, loss and strength: the base and dense steering by ascending β,
            and SIA by ratio.
        profile: Names the scores and says how many resamples.

    Returns:
        Rows of each family and of the mean over them, with `matched` "kl".
    """
    records, families, metrics = [], {}, profile.available_metrics(estimates.SCORES)
    for (curve, sparse), metric in product(settings, metrics):
        replicates, objectives, prompts, seeds = sparse[0].shape
        mean = sparse[0].labels | {"method": "sia-claimed", "target_ratio": None}
        claimed = [
            number
            for number, one in enumerate(sparse)
            if one.labels["target_ratio"] in profile.sweep.main_ratios
        ]
        for number, objective in [*enumerate(OBJECTIVES), (None, "all")]:
            gains = np.stack(
                [_gains(curve, sparse, metric, number, r, profile) for r in range(replicates)]
            )
            common = {
                "objective": objective,
                "metric": metric,
                "versus": "dense",
                "matched": "kl",
                "n": replicates * prompts * (objectives if number is None else 1),
                "seeds": seeds,
                "replicates": replicates,
            }
            draws_of = [*gains.transpose(2, 0, 1), gains[..., claimed].mean(2)]
            for setting, draws in zip([*(s.labels for s in sparse), mean], draws_of, strict=True):
                names = ("value_model", "method", "target_ratio", "tuned")
                key = (metric, objective, *(setting[name] for name in names))
                families.setdefault(key, []).append((setting | common, draws))
                records += estimates.estimate_rows(setting | common, draws, profile)
    for group in families.values():
        if len(group) > 1:
            draws = np.mean([draws for _, draws in group], axis=0)
            records += estimates.estimate_rows(group[0][0] | {"family": "all"}, draws, profile)
    return estimates.summary_frame(records)


def _gains(
    curve: Sequence[estimates.MethodScores],
    sparse: Sequence[estimates.MethodScores],
    metric: str,
    objective: int | None,
    replicate: int,
    profile: Profile,
) -> np.ndarray:
    """Return the estimate of a replicate, then its resamples: `(1 + resamples, ratios)`."""
    metrics, statistics = profile.available_metrics(METRICS), profile.statistics
    columns = [metrics.index(metric), metrics.index("kl")]
    objectives = slice(None) if objective is None else [objective]
    entries = [*sparse, *curve]
    values = np.stack(
        [one.values[:, columns].reshape(*one.shape, 2)[replicate, objectives] for one in entries],
        axis=-1,
    )  # (objectives, prompts, seeds, 2, entries)
    weights = estimates.resampling_weights(values.shape[:3], statistics.resamples, statistics.seed)
    flat = values.reshape(weights.shape[1], -1)
    centre = flat.mean(0)
    draws = centre + weights @ (flat - centre).astype(np.float32)
    means = np.concatenate([centre[None], draws]).reshape(-1, 2, len(entries))
    # the score is close to linear in the root of the drift
    scores, drifts = means[:, 0], np.sqrt(np.maximum(means[:, 1], 0))
    count, gains = len(sparse), np.empty((len(means), len(sparse)))
    for draw, (score, drift) in enumerate(zip(scores, drifts, strict=True)):
        order = count + np.argsort(drift[count:])
        gains[draw] = score[:count] - np.interp(drift[:count], drift[order], score[order])
    return gains


def draw_strength(table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
    """Draw figure4: for each loss score, drift and fluency by β, the grid, and score by drift.

    Models of the Hub have no fluency errors, and no panel for them.
    """
    rows = table[
        (table["family"] == profile.families[0])
        & (table["objective"] == "all")
        & (table["versus"] == "")
    ]
    base = estimates.pooled(rows[rows["gate"] == "never"])
    ratios, losses = (*profile.sweep.reduced_ratios, 1.0), methods.losses_in_order(profile)
    rows = rows[rows["target_ratio"].isin([0.0, *ratios])]
    looks = {ratio: style.share_look(ratio) for ratio in ratios}
    spread = estimates.base_sd(rows, profile.score)
    figure = style.plt.figure(figsize=(style.PAGE, 3.7 * len(losses) + 0.5))
    for panels, value_model in zip(np.ravel(figure.subfigures(len(losses))), losses, strict=True):
        of_loss = rows[rows["value_model"] == value_model]
        by_strength = list(strength_metrics(profile))
        wide = ["grid"] * (len(by_strength) - 1)
        axes = panels.subplot_mosaic([by_strength, [*wide, "path"]])
        untuned = estimates.pooled(of_loss[~of_loss["tuned"].eq(True)])
        draw_by_strength(axes, untuned, base, looks, profile)
        draw_grid(axes["grid"], untuned, of_loss[of_loss["tuned"].eq(True)], profile, spread)
        draw_paths(axes["path"], untuned, base, looks, profile)
        panels.suptitle(labels.loss_label(profile, value_model), fontsize=9)
    names = {ratio: labels.share_label(ratio) if ratio < 1 else "dense" for ratio in ratios}
    handles = [*style.handles(looks, names), style.handle("base")]
    framed = "Framed: β chosen on validation prompts, in each replicate. "
    caption = (
        f"{labels.family_label(profile.families[0])}; one line per share of steered tokens. "
        "β = ∞: values replace the logits. "
        f"{framed if profile.sweep.tuning else ''}{style.sample_size_note(rows, profile)}"
    )
    return style.finish(figure, handles, caption, folder, "figure4", stale=stale)


def beta_labels(profile: Profile) -> dict[float, str]:
    """Return how each strength is written, in order."""
    special = {0.125: "⅛", 0.25: "¼", 0.5: "½", np.inf: "∞"}
    return {beta: special.get(beta, f"{beta:g}") for beta in profile.sweep.betas}


def strength_metrics(profile: Profile) -> dict[str, str]:
    """Return what is drawn against β, by its panel: metrics that the profile has."""
    metrics = {"score": profile.score, "drift": "kl_per_token", "errors": "fluency_errors"}
    available = profile.available_metrics(tuple(metrics.values()))
    return {panel: metric for panel, metric in metrics.items() if metric in available}


def draw_by_strength(axes, untuned, base, looks, profile: Profile) -> None:
    """Draw score, drift and fluency errors against β, a line for each share of the tokens."""
    strengths = beta_labels(profile)
    untuned = untuned.assign(place=untuned["beta"].map(list(strengths).index))
    for panel, metric in strength_metrics(profile).items():
        points = untuned[untuned["metric"] == metric].reset_index(drop=True)
        style.curves(points, "place", "target_ratio", looks=looks).on(axes[panel]).plot()
        axes[panel].set_xticks(range(len(strengths)), strengths.values())
        axes[panel].set(xlabel="strength β", ylabel=labels.metric_label(profile, metric))
    level, look = base[base["metric"] == profile.score].iloc[0], style.PALETTE["base"]
    axes["score"].axhspan(level["low"], level["high"], color=look.colour, alpha=0.1, linewidth=0)
    axes["score"].axhline(level["estimate"], color=look.colour, linestyle=(0, look.dashes))
    axes["drift"].set_yscale("symlog", linthresh=0.01)
    axes["drift"].set_ylim(0, 2 * untuned.loc[untuned["metric"] == "kl_per_token", "high"].max())


def draw_grid(axis, untuned, tuned, profile: Profile, spread: float) -> None:
    """Draw the score of each β and share; from two SD of the base below the best, one colour."""
    strengths = beta_labels(profile)
    scores = untuned[untuned["metric"] == profile.score]
    grid = scores.pivot_table(index="target_ratio", columns="beta", values="estimate")
    grid = grid[list(strengths)].rename(columns=strengths)
    low, high = max(grid.min(axis=None), grid.max(axis=None) - 2 * spread), grid.max(axis=None)
    style.sns.heatmap(
        grid.rename(index=labels.share_label), ax=axis, annot=True, fmt=".2f", cmap=style.BLUES,
        vmin=low, vmax=high, cbar=False, linewidths=0.5,
    )  # fmt: skip
    chosen = tuned.loc[tuned["metric"] == profile.score, ["target_ratio", "beta"]].dropna()
    for ratio, beta in chosen.drop_duplicates().itertuples(index=False):
        corner = list(strengths).index(beta) + 0.05, list(grid.index).index(ratio) + 0.05
        axis.add_patch(style.plt.Rectangle(corner, 0.9, 0.9, fill=False, edgecolor="black"))
    axis.invert_yaxis()
    axis.tick_params(length=0, labelrotation=0)
    score = labels.metric_label(profile, profile.score)
    axis.set(xlabel="strength β", ylabel="share of tokens steered", title=score)


def draw_paths(axis, untuned, base, looks, profile: Profile) -> None:
    """Draw the score against the drift; each line starts at the base and goes through the β."""
    for ratio, look in looks.items():
        of_ratio = untuned[untuned["target_ratio"] == ratio].sort_values("beta")
        drift, score = (
            [*base.loc[base["metric"] == metric, "estimate"],
             *of_ratio.loc[of_ratio["metric"] == metric, "estimate"]]
            for metric in ("kl", profile.score)
        )  # fmt: skip
        axis.plot(drift, score, color=look.colour, marker=look.marker, markersize=3, linewidth=1.2)
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set(
        xlabel=labels.metric_label(profile, "kl"),
        ylabel=labels.metric_label(profile, profile.score),
        title="score against drift",
    )


def sparse_against_dense(table: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return the paired differences that decide about sparse and dense steering.

    They are in standard deviations of base responses. Columns setting (of strength), loss and line
    (share of the tokens, or their mean) say where a row is drawn; `single` holds the estimates of
    single replicates.
    """
    rows = estimates.differences_from_dense(table, profile, ["sia", "sia-claimed"])
    shares = rows["target_ratio"]
    rows = rows[shares.isin(profile.sweep.main_ratios) | shares.isna()]
    drift, tuned = rows["matched"] == "kl", rows["tuned"].eq(True)
    usual = ~tuned & ~drift & rows["beta"].eq(1)
    setting = pd.Series("", index=rows.index)
    equal = drift & ~tuned
    for name, inside in (("β = 1", usual), ("best β", tuned & ~drift), ("equal KL", equal)):
        setting = setting.mask(inside, name)
    mean, pooled = rows["method"] == "sia-claimed", rows["replicate"] == "all"
    main = profile.sweep.main_ratios
    lowest, highest = map(labels.share_label, (min(main), max(main)))
    shares = rows["target_ratio"].map(labels.share_label)
    rows = rows.assign(
        setting=setting,
        loss=[labels.loss_label(profile, value_model) for value_model in rows["value_model"]],
        line=shares.mask(mean, f"mean, {lowest} to {highest}"),
        single=rows["estimate"].mask(pooled),
        estimate=rows["estimate"].where(pooled),
    )
    rows = rows[setting != ""].sort_values("target_ratio", kind="stable")
    return style.ordered(rows, setting=["β = 1", "best β", "equal KL"])


def draw_sparse_against_dense(
    table: pd.DataFrame, profile: Profile, stale: bool, folder: Path
) -> list[Path]:
    """Draw a forest of the differences: panels are losses and scores, rows are settings."""
    rows = sparse_against_dense(table, profile)
    lines = list(dict.fromkeys(rows["line"]))
    shades = [style.share_look(share) for share in profile.sweep.main_ratios]
    looks = dict(zip(lines, [*shades, style.Look(style.NEUTRAL)], strict=True))
    losses = [labels.loss_label(profile, one) for one in methods.losses_in_order(profile)]
    metrics = profile.available_metrics(estimates.SCORES)
    height = 0.5 * rows["setting"].nunique() * len(metrics) + 1.2
    figure = style.plt.figure(figsize=(style.PAGE, height))
    dodge, colours = style.so.Dodge(), {name: look.colour for name, look in looks.items()}
    (
        style.so.Plot(rows, x="estimate", y="setting", color="line")
        .facet(col="loss", row="metric", order={"col": losses, "row": metrics})
        .add(
            style.so.Range(linewidth=1.3), dodge, xmin="low", xmax="high", orient="y", legend=False
        )
        .add(style.so.Dot(pointsize=4), dodge, orient="y", legend=False)
        .add(style.so.Dash(), dodge, x="single", orient="y", legend=False)
        .scale(color=colours)
        .label(x="SIA − dense (SD of base responses)", y="")
        .on(figure)
        .plot()
    )
    style.name_facets(figure, [labels.metric_label(profile, one) for one in metrics], losses)
    handles, too_few = style.handles(looks), rows["n"].max() < estimates.FEWEST_PROMPTS
    for axis in figure.axes:
        axis.axvline(0, color=style.ZERO, linewidth=0.8)
        if not too_few:
            axis.axvline(-estimates.TOLERANCE, color=style.ZERO, linewidth=0.8, linestyle=":")
    margin_note = (
        f"too few prompts for a verdict, which needs {estimates.FEWEST_PROMPTS}"
        if too_few
        else f"dotted: margin of reaching dense, −{estimates.TOLERANCE:g}"
    )
    ticks = "Ticks: single replicates. " if rows["single"].notna().any() else ""
    caption = (
        f"Right of 0, sparse steering is better; {margin_note}. {ticks}"
        f"{style.sample_size_note(rows, profile, 'Bars')}"
    )
    return style.finish(figure, handles, caption, folder, "figure4-sparse-dense", stale=stale)
