"""What alignment costs: judge score against token positions, FLOPs and measured time, of every method; cost against length.

Counted costs come from every response; time is measured on one core, all methods in turns, as a ratio to plain decoding in the same
round (rows with `seconds`; prompt: number of the round). The reported accounting charges one forward pass per candidate of a
junction: passes of the language model + K · junctions; of GenARM one per junction, which gives all candidates; of Transfer Q* also the
tokens of each rollout. "Up to 6 times" is read as the largest ratio of a baseline's cost to that of
SIA at 20% (method "largest"), among dense steering, ARGS, GenARM, best-of-N and chunk beam search, Transfer Q* apart, which costs more
by orders of magnitude; `versus` names each pair, so that every other reading can be looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import LOSSES, family_label, metric_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import CellRequest, FigureCells
from benchmarks.spec.methods import ARGS, AUTOREGRESSIVE, drawn_in
from benchmarks.spec.profile import Profile

METRICS = ("judge", "positions", "megaflops", "reported", "tokens")
MEASURED = (
    "judge",
    "steered",
    "tokens",
    "forwards",
    "junctions",
    "model_tokens",
    "value_tokens",
    "megaflops",
)
RIVALS = drawn_in("cost")  # "base": best of N. Transfer Q* costs more by orders of magnitude
LENGTHS = 10  # tokens, of a bin
ROUNDS = 6  # twice each objective
COST_LABELS = {
    "positions_ratio": "token positions (× base)",
    "seconds_ratio": "time (× base)",
}
POINT_LABELS = {
    "base": "base",
    "dense": "dense",
    "instruct": "instruct\n(judge)",
    "instruct-reward": "instruct\n(reward)",
    "best-of-n": "best of N",
    "beams": "beams",
    "args": "ARGS",
    "transfer-q": "Transfer Q*",
    "genarm": "GenARM",
}
OFFSETS = {"best-of-n": (5, 1), "beams": (5, 1), "args": (5, 0), "transfer-q": (-18, -12),
           "genarm": (5, 0), "instruct": (-12, 12), "instruct-reward": (-12, -14)}  # fmt: skip
TEXT = {"textcoords": "offset points", "va": "center", "fontsize": 6}
FACES = {"value-token": {}, "value-mean": {"markerfacecolor": "white"}}  # by value model


class Cost(Figure):
    """Cost of alignment."""

    title = "Cost of alignment"
    measured = MEASURED
    reported = ("reported", "positions", "megaflops", "judge")

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        wanted = []
        for family in profile.families:
            wanted += methods.baselines(profile, replicate, family)
            for loss in profile.losses:
                wanted += methods.curve(profile, replicate, family, loss)
        return FigureCells(wanted)

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        rows = super().collect(profile, replicates, results)
        return pd.concat(
            [rows, *(results.timings(timed(profile, r), ROUNDS) for r in replicates)],
            ignore_index=True,
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Every method in score and counted costs, and as ratios: cost over that of the base (metric "… / base"), and each baseline's over
        that of SIA at the smallest claimed ratio (versus "sia …"); seconds likewise, as ratios within a round."""
        counted, timing = rows[rows["seconds"].isna()], rows[rows["seconds"].notna()]
        k = profile.decoding.candidates
        passes = (
            counted["method"]
            .astype(str)
            .map({"genarm": 1, "transfer-q": k * (1 + profile.sweep.rollout_tokens)})
            .fillna(k)
        )
        counted = counted.assign(
            positions=counted["model_tokens"] + counted["value_tokens"],
            reported=counted["forwards"] + passes * counted["junctions"],
        )
        metrics = profile.available_metrics(METRICS)
        found = [
            e
            for e in estimates.method_scores(counted, metrics)
            if e.labels["search"] != "best-of" or e.labels["best_of"] == profile.sweep.beams
        ]
        table = estimates.summarize(found, metrics, profile)
        ratios, smallest = [], min(profile.sweep.main_ratios)
        for family in profile.families:
            of_family = estimates.select(found, family=family)
            base = estimates.select_one(of_family, method="base", search="")
            for entry in of_family:
                ratios += _ratios([entry], base, "base", profile)
                for loss in methods.values(profile):
                    sparse = estimates.select_one(
                        of_family, method="sia", value_model=loss, target_ratio=smallest
                    )
                    if (
                        entry.labels["value_model"] not in methods.values(profile)
                        or entry.labels["value_model"] == loss
                    ):
                        ratios += _ratios([entry], sparse, f"sia {smallest:.0%}, {loss}", profile)
            for loss in methods.values(profile):
                sparse = estimates.select_one(
                    of_family, method="sia", value_model=loss, target_ratio=smallest
                )
                rivals = [
                    e
                    for e in of_family
                    if e.labels["method"] in RIVALS
                    and e.labels["value_model"] in ("", str(ARGS), str(AUTOREGRESSIVE), loss)
                ]
                rivals = [
                    e
                    for e in rivals
                    if e.labels["method"] != "base" or e.labels["search"] == "best-of"
                ]
                ratios += _ratios(
                    rivals, sparse, f"sia {smallest:.0%}, {loss}", profile, method="largest"
                )
        parts = [
            table,
            pd.DataFrame.from_records([*ratios, *_times(timing, profile)]),
            _lengths(counted),
        ]
        return pd.concat(parts, ignore_index=True)[[*estimates.COLUMNS, "length"]].round(
            {"estimate": 4, "low": 4, "high": 4}
        )

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the score against each cost relative to the base, and positions against length."""
        from benchmarks.figures import style

        table = estimates.pooled(table)
        points = scores_and_costs(table, profile)
        panels = points.groupby(["family", "cost"], sort=False)
        columns = -(-(len(panels) + 1) // 2)
        figure, axes = style.plt.subplots(2, columns, figsize=(style.PAGE, 5.2), squeeze=False)
        *score_axes, length_axis = axes.flat[: len(panels) + 1]
        for axis, ((family, cost), rows) in zip(score_axes, panels, strict=True):
            _draw_points(axis, rows)
            axis.set(xscale="log", xlabel=COST_LABELS[cost], title=family_label(family))
            axis.margins(x=0.14, y=0.1)
        for axis in axes[:, 0]:
            axis.set_ylabel(metric_label(profile, profile.score))
        lengths = lengths_of(table, profile)
        style.curves(lengths, "length").on(length_axis).plot()
        for row in lengths.drop_duplicates("method", keep="last").itertuples():
            label = f"SIA {row.target_ratio:.0%}" if row.method == "sia" else row.method
            length_axis.annotate(label, (row.length, row.estimate), (-4, 4), ha="right", **TEXT)
        length_axis.set(
            xlabel="length of the response (tokens, at most)",
            ylabel="token positions",
            title=f"{family_label(profile.families[0])}, {style.first_loss(profile)}",
        )
        for axis in axes.flat[len(panels) + 1 :]:
            axis.remove()
        handles = [
            style.handle("sia", f"SIA, {LOSSES[value_model]}", linestyle="none", **look)
            for value_model, look in FACES.items()
            if value_model in set(points["value_model"])
        ]
        handles += [
            style.handle("base", label, color="#AAAAAA", linestyle=line)
            for label, line in (("Pareto front", "-"), ("front on the base model", "--"))
        ]
        caption = (
            "Score against cost relative to decoding the base model. Percentages: share of tokens "
            f"that SIA steers. {style.sample_size_note(points, profile, 'Lines')}"
        )
        return style.finish(figure, handles, caption, folder, "cost", stale=stale)


def scores_and_costs(table: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return a row for each family, cost and method: both estimates with intervals, and a label."""
    pooled = table[table["objective"] == "all"]
    scores = pooled[(pooled["metric"] == profile.score) & (pooled["versus"] == "")]
    costs = pooled[pooled["metric"].isin(COST_LABELS) & (pooled["versus"] == "base")]
    names = [name for name in estimates.LABELS if name not in ("beta", "tau")]
    points = scores.merge(costs, on=names, suffixes=("", "_cost"))
    points = points.rename(columns={"metric_cost": "cost"}).assign(
        method=list(map(estimates.display_name, points["method"], points["search"]))
    )
    labels = points["method"].map(POINT_LABELS)
    shares = points["target_ratio"].map("{:.0%}".format)
    points = points.assign(label=labels.where(points["method"] != "sia", shares))
    order = {name: place for place, name in enumerate((*profile.families, *COST_LABELS))}
    return points.sort_values(
        ["family", "cost"], key=lambda column: column.map(order), kind="stable"
    )


def lengths_of(table: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return the cost of responses by their length: base, SIA at the smallest ratio, dense."""
    usual, ratio = methods.values(profile)[0], min(profile.sweep.main_ratios)
    rows = table[
        (table["metric"] == "positions_at_length") & (table["family"] == profile.families[0])
    ]
    shown = {"base": ("", 0.0), "sia": (usual, ratio), "dense": (usual, 1.0)}
    selected = [
        rows[
            (rows["method"] == method)
            & (rows["value_model"] == value_model)
            & (rows["target_ratio"] == target_ratio)
        ]
        for method, (value_model, target_ratio) in shown.items()
    ]
    return pd.concat(selected, ignore_index=True)


def _draw_points(axis, rows: pd.DataFrame) -> None:
    """Draw methods as labelled points with intervals, and the Pareto fronts."""
    from benchmarks.figures import style

    for row in rows.itertuples():
        hollow = row.value_model == "value-mean"
        axis.errorbar(
            row.estimate_cost,
            row.estimate,
            yerr=[[row.estimate - row.low], [row.high - row.estimate]],
            xerr=[[row.estimate_cost - row.low_cost], [row.high_cost - row.estimate_cost]],
            color=style.COLOURS[row.method],
            marker=style.MARKERS[row.method],
            markerfacecolor="white" if hollow else None,
            markersize=4,
            elinewidth=0.7,
        )
        if row.method != "sia":
            offset, side = OFFSETS.get(row.method, (5, -6)), "left"
        elif row.target_ratio < (0.4 if hollow else 0.6):
            offset, side = ((5, -5), "left") if hollow else ((-4, 4), "right")
        else:
            offset, side = (0, -7 if 0.5 < row.target_ratio < 0.7 else 7), "center"
        axis.annotate(row.label, (row.estimate_cost, row.estimate), offset, ha=side, **TEXT)
    on_base = rows[(rows["model"] == "base") & (rows["value_model"] != str(AUTOREGRESSIVE))]
    for methods_shown, line in ((rows, "-"), (on_base, "--")):
        cost, score = (methods_shown[name].to_numpy() for name in ("estimate_cost", "estimate"))
        front = pareto(cost, score)
        axis.plot(cost[front], score[front], color="#AAAAAA", linewidth=1, linestyle=line, zorder=0)


def timed(profile: Profile, replicate: int) -> list[CellRequest]:
    """What is timed, of the first family: tuned cells as they were settled."""
    family, sweep = profile.families[0], profile.sweep
    loss = profile.losses[0]
    steered = [methods.steered(replicate, family, loss, ratio=r) for r in sweep.reduced_ratios] + [
        methods.dense(replicate, family, loss)
    ]
    return [*methods.baselines(profile, replicate, family), *steered]


def _ratios(
    scores: Sequence[estimates.MethodScores],
    other: estimates.MethodScores,
    versus: str,
    profile: Profile,
    method: str = "",
) -> list[dict]:
    """Return ratios of mean costs, resampled together.

    Args:
        scores: One method, or several, of which the largest ratio counts.
        other: What is divided by.
        versus: Its name.
        profile: Says how many resamples.
        method: The name of the largest ratio; empty for a single method.
    """
    metrics = profile.available_metrics(METRICS)
    prompts = slice(min(scores[0].shape[2], other.shape[2]))
    scores, other = [one.restrict(prompts) for one in scores], other.restrict(prompts)
    labels, chosen = scores[0].labels, scores[0].chosen
    if method:
        labels = {k: other.labels[k] for k in ("family", "model", "value_model")}
        labels, chosen = labels | {"method": method}, {}
    labels = labels | {"objective": "all", "versus": versus, "seeds": other.shape[3]}
    labels |= {"n": int(np.prod(other.shape[:3])), "replicates": other.shape[0]}
    records = []
    for metric in ("positions", "megaflops", "reported"):
        column = metrics.index(metric)
        tops = np.stack([one.values[:, column] for one in scores], axis=1)
        bottoms = np.repeat(other.values[:, [column]], len(scores), axis=1)
        draws = estimates.ratio_draws(tops, bottoms, other.shape, profile).max(2)
        ratio = labels | {"metric": f"{metric}_ratio"}
        records += estimates.estimate_rows(ratio, draws, profile, chosen)
    return records


def _lengths(counted: pd.DataFrame) -> pd.DataFrame:
    """Mean cost of responses of like length (metric "positions_at_length", of the bin that `length` ends): it stays linear."""
    part = counted[
        (counted["search"] == "")
        & counted["method"].isin(["base", "sia", "dense"])
        & ~counted["tuned"].astype(bool)
    ]
    part = part.assign(length=(part["tokens"] + LENGTHS - 1) // LENGTHS * LENGTHS)
    keys = ["family", "model", "value_model", "method", "gate", "target_ratio", "length"]
    found = (
        part.groupby(keys, observed=True)
        .agg(estimate=("positions", "mean"), n=("positions", "size"))
        .reset_index()
    )
    common = {"metric": "positions_at_length", "objective": "all", "replicate": estimates.POOLED}
    return found[found["n"] >= 30].assign(**common)


def _times(timing: pd.DataFrame, profile: Profile) -> list[dict]:
    """Ratios of seconds within a round, geometric means over the rounds: of every method to plain decoding (versus "base") and to SIA at
    the smallest ratio that is timed, and the largest of the latter among the rivals (method "largest"). Intervals: bootstrap over
    replicates and rounds."""
    names_of = [name for name in estimates.LABELS if name not in ("beta", "tau")]
    rounds = timing.groupby(names_of, observed=True, dropna=False)
    methods = [dict(zip(names_of, labels, strict=True)) for labels, _ in rounds]
    by_round = [
        part.set_index(["replicate", "prompt"])["seconds"].sort_index() for _, part in rounds
    ]
    logs = np.log(
        pd.concat(by_round, axis=1, join="outer").to_numpy(np.float64)
    )  # (rounds, methods)
    replicates = timing["replicate"].nunique()
    shape = (replicates, 1, len(logs) // replicates, 1)
    plain = next(i for i, m in enumerate(methods) if (m["method"], m["search"]) == ("base", ""))
    sparse = min(
        (i for i, m in enumerate(methods) if m["method"] == "sia"),
        key=lambda i: methods[i]["target_ratio"],
    )
    records = []

    def note(labels: dict, many: list[int], other: int, versus: str) -> None:
        ratio = logs[:, many] - logs[:, [other]]
        draws = np.exp(estimates.ratio_draws(ratio, np.ones_like(ratio), shape, profile).max(2))
        labels = labels | {
            "objective": "all",
            "metric": "seconds_ratio",
            "versus": versus,
            "n": len(logs),
            "replicates": replicates,
        }
        records.extend(estimates.estimate_rows(labels, draws, profile))

    against = f"sia {methods[sparse]['target_ratio']:.0%}, {methods[sparse]['value_model']}"
    for i, labels in enumerate(methods):
        note(labels, [i], plain, "base")
        note(labels, [i], sparse, against)
    rivals = [
        i
        for i, m in enumerate(methods)
        if m["method"] in RIVALS and (m["method"] != "base" or m["search"] == "best-of")
    ]
    note(
        {k: methods[sparse][k] for k in ("family", "model", "value_model")} | {"method": "largest"},
        rivals,
        sparse,
        against,
    )
    return records


def pareto(costs: np.ndarray, scores: np.ndarray) -> list[int]:
    """Which points no other beats in both, by ascending cost."""
    front: list[int] = []
    for i in np.lexsort((-scores, costs)):
        if not front or scores[i] > scores[front[-1]]:
            front.append(int(i))
    return front
