"""Figure 4: strength. The grid of β and ratio for both value losses (first family); what each ratio reaches at its own best β; and
sparse against dense in every setting of the claims (figure4-sparse-dense): at β = 1, at each method's best β, and at equal drift, each
with and without a floor on the candidates' base probability (both families).

At equal drift: SIA at β = 1 against dense steering at the β whose KL per response is the same, linear in the root of the KL between
measured β (and the base, at KL 0) in every resample. A floor alone costs some KL: SIA with a floor stands against the better of
dense steering with and without it. That rewards grow about linearly in the root of the KL is from Gao, Schulman and Hilton, "Scaling laws
for reward model overoptimization", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates, labels
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.profile import Profile

METRICS = ("judge", "content", "fluency_errors", "kl", "kl_per_token")
MEASURED = ("judge", "content", "fluency_errors", "kl", "steered", "tokens")


class Figure4(Figure):
    """Figure 4: steering strength."""

    title = "Figure 4: steering strength"
    measured = MEASURED

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        wanted, sweep, first = [], profile.sweep, profile.families[0]
        for family in profile.families:
            wanted.append(methods.base(replicate, family))
            for loss in profile.losses:
                others = [
                    beta for beta in sweep.betas if beta <= 2
                ]  # of dense steering, to compare with at equal drift
                for beta in sweep.betas if family == first else [1.0]:
                    wanted += methods.curve(profile, replicate, family, loss, beta=beta)
                wanted += [methods.dense(replicate, family, loss, beta=beta) for beta in others]
                if sweep.tuning:
                    wanted += methods.curve(profile, replicate, family, loss, tuned=True)
                floor = {"floor": sweep.floor, "ratios": sweep.main_ratios}
                wanted += methods.curve(profile, replicate, family, loss, **floor)
                if sweep.tuning:
                    wanted += methods.curve(profile, replicate, family, loss, tuned=True, **floor)
                wanted += [
                    methods.dense(replicate, family, loss, beta=beta, floor=sweep.floor)
                    for beta in (0.0, *others)
                ]
        return FigureCells(wanted)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Every cell, and paired: SIA at each ratio, and its mean over the claimed ones, against dense at the same β, with each at its own
        best β, and (`matched`: "kl") at equal drift. Per objective and pooled; family "all": the mean over both."""
        metrics = profile.available_metrics(METRICS)
        found = estimates.method_scores(rows, metrics)
        differences, matched = [], []
        for dense in estimates.select(found, method="dense"):
            setting = {k: dense.labels[k] for k in ("family", "value_model", "tuned", "floor")}
            setting |= {} if dense.labels["tuned"] else {"beta": dense.labels["beta"]}
            sparse = estimates.select(found, method="sia", **setting)
            if not sparse:
                continue
            differences += [estimates.difference(sia, dense) for sia in sparse]
            claimed = [e for e in sparse if e.labels["target_ratio"] in profile.sweep.main_ratios]
            differences.append(
                estimates.difference(estimates.mean_of(claimed, method="sia-claimed"), dense)
            )
            if not setting["tuned"] and setting["beta"] == 1:
                same = {
                    "method": "dense",
                    "tuned": False,
                    "family": setting["family"],
                    "value_model": setting["value_model"],
                }
                base = estimates.select_one(found, family=setting["family"], gate="never")
                curves = [[base, *_by_strength(estimates.select(found, **same, floor=0.0))]]
                if setting["floor"]:
                    curves.append(
                        _by_strength(estimates.select(found, **same, floor=setting["floor"]))
                    )
                matched.append((curves, claimed))
        strong = [
            e
            for e in estimates.select(found, family=profile.families[0], floor=0.0, tuned=False)
            if e.labels["gate"] != "never"
        ]
        for loss in methods.values(
            profile
        ):  # what replacing the logits by the values, or a strong tilt, does
            for ratio in (*profile.sweep.ratios, 1.0):
                same = {"value_model": loss, "target_ratio": ratio}
                usual = estimates.select_one(strong, **same, beta=1.0)
                differences += [
                    estimates.difference(e, usual, versus="beta-1")
                    for e in estimates.select(strong, **same)
                    if e.labels["beta"] != 1
                ]
        pooled = estimates.over_families([d for d in differences if d.labels["versus"] == "dense"])
        table = estimates.summarize([*found, *differences, *pooled], metrics, profile)
        return pd.concat([table, at_equal_drift(matched, profile)], ignore_index=True)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the effects of β and of the share of tokens, and sparse against dense steering."""
        return [
            *draw_strength(table, profile, stale, folder),
            *draw_sparse_against_dense(table, profile, stale, folder),
        ]


def _by_strength(dense: Sequence[estimates.MethodScores]) -> list[estimates.MethodScores]:
    return sorted(dense, key=lambda entry: entry.labels["beta"])


def at_equal_drift(
    settings: Sequence[
        tuple[Sequence[Sequence[estimates.MethodScores]], Sequence[estimates.MethodScores]]
    ],
    profile: Profile,
) -> pd.DataFrame:
    """Return SIA − dense in score where both have the KL of SIA, by ratio and for their mean.

    Args:
        settings: For each family, loss and floor: curves of dense steering by ascending β, the first of which begins
            at the base, and SIA by ratio. Of two curves (without and with a floor), the better at that KL counts.
        profile: Names the score and says how many resamples.

    Returns:
        Rows of each family and of the mean over them, with `matched` "kl".
    """
    records, families = [], {}
    for curves, sparse in settings:
        shape = sparse[0].shape
        mean = sparse[0].labels | {"method": "sia-claimed", "target_ratio": None}
        for number, objective in [*enumerate(OBJECTIVES), (None, "all")]:
            gains = np.stack(
                [
                    _gains(curves, sparse, number, replicate, profile)
                    for replicate in (None, *range(shape[0]))
                ]
            )
            common = {"objective": objective, "metric": profile.score, "versus": "dense"}
            common |= {"matched": "kl", "seeds": shape[3], "replicates": shape[0]}
            common["n"] = int(np.prod(shape[:3])) // (1 if number is None else shape[1])
            draws_of = [*gains.transpose(2, 0, 1), gains.mean(2)]
            for one, draws in zip([*(s.labels for s in sparse), mean], draws_of, strict=True):
                labels = one | common
                records += estimates.estimate_rows(labels, draws, profile)
                names = ("value_model", "floor", "objective", "method", "target_ratio")
                families.setdefault(tuple(labels[k] for k in names), []).append((labels, draws))
    for group in families.values():
        if len(group) > 1:
            draws = np.mean([draws for _, draws in group], axis=0)
            records += estimates.estimate_rows(group[0][0] | {"family": "all"}, draws, profile)
    return estimates.summary_frame(records)


def _gains(
    curves, sparse, objective: int | None, replicate: int | None, profile: Profile
) -> np.ndarray:
    """The estimate, and then every resample of it: `(1 + resamples, ratios)`."""

    metrics = profile.available_metrics(METRICS)

    def part(entry: estimates.MethodScores) -> np.ndarray:
        values = entry.values[:, [metrics.index(profile.score), metrics.index("kl")]].reshape(
            *entry.shape, 2
        )
        values = values if objective is None else values[:, [objective]]
        return values if replicate is None else values[[replicate]]

    parts = np.stack(
        [part(entry) for entry in (*sparse, *(e for curve in curves for e in curve))], axis=-1
    )  # (…, 2, entries)
    statistics = profile.statistics
    weights = estimates.resamples(parts.shape[:4], statistics.resamples, statistics.seed)
    flat = parts.reshape(weights.shape[1], -1)
    centre = flat.mean(0)
    means = np.concatenate(
        [centre[None], centre + weights @ (flat - centre).astype(np.float32)]
    ).reshape(-1, *parts.shape[4:])
    scores, drifts = (
        means[:, 0],
        np.sqrt(np.maximum(means[:, 1], 0)),
    )  # the score is close to linear in the root of the drift
    gains = np.empty((len(means), len(sparse)))
    for draw in range(len(means)):
        start, reached = len(sparse), []
        for curve in curves:
            place = slice(start, start + len(curve))
            order = np.argsort(drifts[draw, place])
            known, there = drifts[draw, place][order], scores[draw, place][order]
            reached.append(np.interp(drifts[draw, : len(sparse)], known, there, left=-np.inf))
            start += len(curve)
        gains[draw] = scores[draw, : len(sparse)] - np.max(reached, axis=0)
    return gains


def draw_strength(table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
    """Draw figure4: for each loss score, drift and fluency by β, the grid, and score by drift."""
    part = table[
        (table["family"] == profile.families[0])
        & (table["objective"] == "all")
        & (table["versus"] == "")
        & (table["floor"] == 0)
    ]
    base = estimates.pooled(part[part["gate"] == "never"])
    ratios, losses = (*profile.sweep.ratios, 1.0), methods.values(profile)
    looks = ratio_looks(ratios)
    figure = style.plt.figure(figsize=(style.PAGE, 3.7 * len(losses) + 0.5))
    for panels, value_model in zip(np.ravel(figure.subfigures(len(losses))), losses, strict=True):
        of_loss = part[part["value_model"] == value_model]
        axes = panels.subplot_mosaic([["score", "drift", "errors"], ["grid", "grid", "path"]])
        untuned = estimates.pooled(of_loss[~of_loss["tuned"].eq(True)])
        draw_by_strength(axes, untuned, base, looks, profile)
        draw_grid(axes["grid"], untuned, of_loss[of_loss["tuned"].eq(True)], profile)
        draw_paths(axes["path"], untuned, base, looks, profile)
        panels.suptitle(labels.LOSSES[value_model], fontsize=9)
    names = {ratio: f"{ratio:.0%}" if ratio < 1 else "dense" for ratio in ratios}
    handles = [*style.handles(looks, names), style.handle("base")]
    caption = (
        "Lines: shares of tokens steered. β = ∞: values in place of the logits. Framed: β chosen on validation "
        f"prompts, one for each replicate. {style.sample_size_note(part, profile)}"
    )
    return style.finish(figure, handles, caption, folder, "figure4", stale=stale)


def ratio_looks(ratios: Sequence[float]) -> dict[float, style.Look]:
    """Return a look for each share of steered tokens, from pale to dark; 1 is dense steering."""
    shades = style.sns.color_palette("YlGnBu", len(ratios) + 1).as_hex()[2:]
    sparse = (style.Look(shade) for shade in shades)
    return dict(zip(ratios, (*sparse, style.PALETTE["dense"]), strict=True))


def beta_labels(profile: Profile) -> dict[float, str]:
    """Return how each strength is written, in order."""
    return {beta: "∞" if np.isinf(beta) else f"{beta:g}" for beta in profile.sweep.betas}


def draw_by_strength(axes, untuned, base, looks, profile: Profile) -> None:
    """Draw score, drift and fluency errors against β, a line for each share of the tokens."""
    strengths = beta_labels(profile)
    untuned = untuned.assign(place=untuned["beta"].map(list(strengths).index))
    metrics = {"score": profile.score, "drift": "kl_per_token", "errors": "fluency_errors"}
    for panel, metric in metrics.items():
        points = untuned[untuned["metric"] == metric].reset_index(drop=True)
        if points.empty:  # models of the Hub have no judge
            axes[panel].set_axis_off()
            continue
        style.curves(points, "place", "target_ratio", looks=looks).on(axes[panel]).plot()
        axes[panel].set_xticks(range(len(strengths)), strengths.values())
        axes[panel].set(xlabel="strength β", ylabel=labels.metric_label(profile, metric))
    style.horizontal(axes["score"], "base", base[base["metric"] == profile.score].iloc[0])
    axes["drift"].set_yscale("symlog", linthresh=0.01)
    axes["drift"].set_ylim(0, 2 * untuned.loc[untuned["metric"] == "kl_per_token", "high"].max())


def draw_grid(axis, untuned, tuned, profile: Profile) -> None:
    """Draw the score of each β and share; scores 4 points below the best have one colour."""
    strengths = beta_labels(profile)
    scores = untuned[untuned["metric"] == profile.score]
    grid = scores.pivot_table(index="target_ratio", columns="beta", values="estimate")
    grid = grid[list(strengths)].rename(columns=strengths)
    low, high = max(grid.min(axis=None), grid.max(axis=None) - 4), grid.max(axis=None)
    style.sns.heatmap(
        grid.rename(index="{:.0%}".format), ax=axis, annot=True, fmt=".2f", cmap=style.BLUES,
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

    Columns setting (of strength and floor), loss and line (share of the tokens, or their mean) say
    where a row is drawn; `single` holds the estimates of single replicates, of the mean alone.
    """
    part = table[
        (table["versus"] == "dense")
        & (table["metric"] == profile.score)
        & (table["objective"] == "all")
        & (table["family"] == estimates.pooled_family(profile))
        & table["method"].isin(["sia", "sia-claimed"])
        & (table["target_ratio"].isin(profile.sweep.main_ratios) | table["target_ratio"].isna())
    ]
    drift, tuned = part["matched"] == "kl", part["tuned"].eq(True)
    strengths = (
        ("β = 1", ~tuned & ~drift & part["beta"].eq(1)),
        ("best β", tuned & ~drift),
        ("equal KL", drift),
    )
    setting = pd.Series("", index=part.index)
    for name, inside in strengths:
        setting[inside & (part["floor"] == 0)] = name
        setting[inside & (part["floor"] > 0)] = f"{name}, floor"
    mean, pooled = part["method"] == "sia-claimed", part["replicate"] == "all"
    lowest, highest = min(profile.sweep.main_ratios), max(profile.sweep.main_ratios)
    part = part.assign(
        setting=setting,
        loss=part["value_model"].map(labels.LOSSES),
        line=part["target_ratio"]
        .map("{:.0%}".format)
        .mask(mean, f"mean, {lowest:.0%} to {highest:.0%}"),
        single=part["estimate"].mask(pooled),
        estimate=part["estimate"].where(pooled),
    )
    order = [name + floor for floor in ("", ", floor") for name, _ in strengths]
    part = part[(setting != "") & (pooled | mean)].sort_values("target_ratio", kind="stable")
    return part.sort_values("setting", key=lambda names: names.map(order.index), kind="stable")


def draw_sparse_against_dense(
    table: pd.DataFrame, profile: Profile, stale: bool, folder: Path
) -> list[Path]:
    """Draw a forest of the differences: a panel for each loss, a row for each setting."""
    part = sparse_against_dense(table, profile).reset_index(drop=True)
    lines = list(dict.fromkeys(part["line"]))
    shades = ratio_looks((*profile.sweep.main_ratios, 1.0)).values()
    looks = dict(zip(lines, [*list(shades)[:-1], style.Look(style.NEUTRAL)], strict=True))
    figure = style.plt.figure(figsize=(style.PAGE, 0.5 * part["setting"].nunique() + 1.2))
    dodge, colours = style.so.Dodge(), {name: look.colour for name, look in looks.items()}
    (
        style.so.Plot(part, x="estimate", y="setting", color="line")
        .facet(col="loss", order=[labels.LOSSES[name] for name in methods.values(profile)])
        .add(
            style.so.Range(linewidth=1.3), dodge, xmin="low", xmax="high", orient="y", legend=False
        )
        .add(style.so.Dot(pointsize=4), dodge, orient="y", legend=False)
        .add(style.so.Dash(), dodge, x="single", orient="y", legend=False)
        .scale(color=colours)
        .label(x=f"SIA − dense ({labels.metric_label(profile, profile.score)})", y="", title=str)
        .on(figure)
        .plot()
    )
    for axis in figure.axes:
        axis.axvline(0, color=style.ZERO, linewidth=0.8)
        axis.axvline(-0.1, color=style.ZERO, linewidth=0.8, linestyle=":")
    caption = (
        "Right of 0 sparse steering is better than dense; dotted: −0.1, the margin within which it "
        f"counts as reaching dense. Ticks: single replicates. {style.sample_size_note(part, profile, 'Bars')}"
    )
    handles = style.handles(looks, {name: name for name in looks})
    return style.finish(figure, handles, caption, folder, "figure4-sparse-dense", stale=stale)
