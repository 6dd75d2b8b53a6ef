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

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import metric_label
from benchmarks.figures import methods
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
        """A row for each loss: score, drift and errors of fluency against β for each ratio; the grid of scores; score against drift."""
        from benchmarks.figures import style

        whole, table = table, estimates.pooled(table)
        by_replicate = whole[whole["tuned"].astype("boolean").fillna(False)]

        family, betas = profile.families[0], profile.sweep.betas
        ratios = (*profile.sweep.ratios, 1.0)
        shades = dict(zip(ratios, _shades(len(ratios)), strict=True))
        part = table[
            (table["family"] == family)
            & (table["objective"] == "all")
            & (table["versus"] == "")
            & (table["floor"] == 0)
        ]
        lines = {
            profile.score: ("{loss}: score", score := metric_label(profile, profile.score)),
            "kl_per_token": ("drift", "KL per token (nats)"),
            "fluency_errors": ("fluency", "share with fluency errors"),
        }
        lines = {metric: texts for metric, texts in lines.items() if metric in set(part["metric"])}
        figure, places = style.grid(2 * len(profile.losses), len(lines), 2.8, 2.3)
        axes = np.array(
            [
                [*places[2 * i], *style.join(places[2 * i + 1, :-1]), places[2 * i + 1, -1]]
                for i in range(len(profile.losses))
            ]
        )
        place = {beta: i for i, beta in enumerate(betas)}
        names = ["∞" if np.isinf(beta) else f"{beta:g}" for beta in betas]
        for i, value_model in enumerate(methods.values(profile)):
            of_loss = part[part["value_model"] == value_model]
            grid = of_loss[~of_loss["tuned"].astype(bool)].assign(
                place=lambda x: x["beta"].map(place)
            )
            judge, kl = (grid[grid["metric"] == metric] for metric in (profile.score, "kl"))
            base = part[(part["gate"] == "never") & (part["metric"] == profile.score)].iloc[0]
            style.horizontal(axes[i, 0], "base", base)
            for ratio in ratios:
                look = {
                    "color": shades[ratio],
                    "marker": style.MARKERS["dense"] if ratio == 1 else style.MARKERS["sia"],
                }
                for axis, metric in zip(axes[i], lines, strict=False):
                    points = grid[(grid["metric"] == metric) & (grid["target_ratio"] == ratio)]
                    style.curve(axis, "sia", points, "place", **look)
                scores = judge[judge["target_ratio"] == ratio].set_index("beta")["estimate"]
                drifts = kl[kl["target_ratio"] == ratio].set_index("beta")["estimate"]
                path = [(0.0, base["estimate"]), *((drifts[beta], scores[beta]) for beta in betas)]
                axes[i, -1].plot(*zip(*path, strict=True), markersize=3, linewidth=1.2, **look)
            cells = np.array(
                [
                    [
                        judge[(judge["target_ratio"] == r) & (judge["beta"] == b)]["estimate"].iloc[
                            0
                        ]
                        for b in betas
                    ]
                    for r in ratios
                ]
            )
            style.heatmap(
                axes[i, -2],
                cells,
                names,
                [f"{r:.0%}" for r in ratios],
                span=(max(cells.min(), cells.max() - 4), cells.max()),
            )
            for row, ratio in enumerate(ratios):
                chosen = by_replicate[
                    (by_replicate["family"] == family)
                    & (by_replicate["value_model"] == value_model)
                    & (by_replicate["target_ratio"] == ratio)
                    & (by_replicate["floor"] == 0)
                    & (by_replicate["versus"] == "")
                ]
                for beta in chosen["beta"].dropna().unique():
                    axes[i, -2].add_patch(
                        style.plt.Rectangle(
                            (place[beta] + 0.06, row + 0.08),
                            0.88,
                            0.84,
                            fill=False,
                            color="black",
                            linewidth=1.2,
                        )
                    )
            for axis, (title, label) in zip(axes[i], lines.values(), strict=False):
                axis.set_xticks(range(len(betas)), names)
                axis.set(xlabel="β", ylabel=label)
                axis.set_title(title.format(loss=style.LOSSES[value_model]), loc="left")
            axes[i, 1].set_yscale("symlog", linthresh=0.01)
            axes[i, 1].set_ylim(0, 2 * grid.loc[grid["metric"] == "kl_per_token", "high"].max())
            axes[i, -2].set(xlabel="β", ylabel="share of tokens steered")
            axes[i, -2].set_title(score, loc="left")
            axes[i, -1].set(xlabel="KL per response (nats)", ylabel=score)
            axes[i, -1].set_xscale("symlog", linthresh=1.0)
            axes[i, -1].set_title("score against drift", loc="left")
        handles = [
            style.handle(
                "sia",
                f"{r:.0%}" if r < 1 else "dense",
                color=shades[r],
                marker="D" if r == 1 else "o",
            )
            for r in ratios
        ]
        framed = (
            "Framed cells: β that validation prompts choose for the ratio, of each replicate. "
            if profile.sweep.tuning
            else ""
        )
        caption = (
            f"Strength β and share of steered tokens ({style.FAMILIES[family]}, all objectives). {framed}"
            f"β = ∞: values in place of the logits. In the last panel each line starts at the base and goes through the β in order. "
            f"The grid and the last panel show no intervals (the table has them); scores 4 points below the best and lower have one colour. "
            f"{style.measured(part, profile)}"
        )
        made = style.finish(
            figure,
            [*handles, style.handle("base")],
            caption,
            folder,
            "figure4",
            stale=stale,
            legend_columns=8,
        )
        return made + sparse_against_dense(whole, profile, stale, folder)


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


def sparse_against_dense(
    table: pd.DataFrame, profile: Profile, stale: bool, folder: Path
) -> list[Path]:
    """A forest of the paired differences that decide about sparse and dense steering: a panel for each loss, a row for each setting, and
    within it a point for each share of the tokens and for the mean over those that are claimed."""
    from benchmarks.figures import style

    families = estimates.pooled_family(profile)
    part = table[
        (table["versus"] == "dense")
        & (table["metric"] == profile.score)
        & (table["objective"] == "all")
    ]
    part = part[(part["family"] == families) & part["method"].isin(["sia", "sia-claimed"])]
    tuned, drift, floor = (
        part["tuned"].fillna(False).astype(bool),
        part["matched"] == "kl",
        part["floor"] > 0,
    )
    strengths = {
        "β = 1": ~tuned & ~drift & part["beta"].eq(1),
        "each at its best β": tuned & ~drift,
        "at equal KL": drift,
    }
    without = {name: here & ~floor for name, here in strengths.items()}
    with_floor = {f"{name},\nfloor": here & floor for name, here in strengths.items()}
    settings = {name: here for name, here in (without | with_floor).items() if here.any()}
    claimed = profile.sweep.main_ratios
    shades = dict(
        zip((*profile.sweep.ratios, 1.0), _shades(len(profile.sweep.ratios) + 1), strict=True)
    )
    figure, axes = style.grid(
        1, len(profile.losses), 4.1, 0.62 * len(settings) + 0.6, sharex=True, sharey=True
    )
    for axis, value_model in zip(axes[0], methods.values(profile), strict=True):
        of_loss = part["value_model"] == value_model
        for place, here in enumerate(settings.values()):
            of_setting = part[of_loss & here]
            of_ratio = estimates.pooled(of_setting).set_index("target_ratio")
            rows = [
                (shades[ratio], "o", of_ratio[of_ratio["method"] == "sia"].loc[ratio])
                for ratio in claimed
            ]
            mean = of_ratio[of_ratio["method"] == "sia-claimed"].iloc[0]
            rows.append((style.COLOURS["sia"], "D", mean))
            for i, (colour, marker, row) in enumerate(rows):
                y = place + 0.15 * (i - (len(rows) - 1) / 2)
                axis.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.4)
                edge = (
                    {"markeredgecolor": "black", "markersize": 6}
                    if marker == "D"
                    else {"markersize": 4.5}
                )
                axis.plot(row["estimate"], y, marker=marker, color=colour, linestyle="none", **edge)
            claimed_alone = of_setting["method"].eq("sia-claimed") & of_setting["replicate"].ne("all")
            alone = of_setting[claimed_alone]["estimate"]
            last = place + 0.15 * (len(rows) - 1) / 2
            axis.plot(
                alone,
                [last] * len(alone),
                marker="|",
                markersize=7,
                color="#555555",
                linestyle="none",
            )
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.axvline(-0.1, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_title(style.LOSSES[value_model], loc="left")
        axis.set_xlabel(f"SIA − dense, {metric_label(profile, profile.score)}")
    axes[0, 0].set_yticks(range(len(settings)), settings)
    axes[0, 0].invert_yaxis()
    handles = [
        style.handle("sia", f"{ratio:.0%}", color=shades[ratio], marker="o") for ratio in claimed
    ]
    handles.append(
        style.handle(
            "sia",
            f"mean of {min(claimed):.0%} to {max(claimed):.0%}",
            marker="D",
            markeredgecolor="black",
        )
    )
    handles.append(
        style.handle(
            "sia", "the same, each replicate", color="#555555", marker="|", linestyle="none"
        )
    )
    caption = (
        f"Sparse against dense steering, {style.FAMILIES[families]}: paired differences under each setting of the verdicts. Right of 0 "
        f"sparse steering is better; dotted: −0.1, from which on it counts as reaching dense. Floor: candidates need a base probability of "
        f"{profile.sweep.floor:g} on steered steps. Equal KL: dense at the strength that drifts as far from the base as SIA at β = 1. "
        f"{style.measured(part, profile)}"
    )
    return style.finish(figure, handles, caption, folder, "figure4-sparse-dense", stale=stale)


def _shades(count: int) -> list[str]:
    """From pale to dark blue, and black for dense."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["YlGnBu"](0.35 + 0.6 * i / (count - 1))) for i in range(count - 1)] + [
        "#000000"
    ]
