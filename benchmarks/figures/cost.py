"""Cost of alignment: score against positions, FLOPs and measured time, and cost against length.

Counted costs come from every response; time is measured on one core, all methods in turns, as a
ratio to plain decoding in the same round (rows with `seconds`; prompt: number of the round). The
reported accounting charges one forward pass per candidate of a junction: passes of the language
model + K · junctions; of GenARM and the vocabulary head one per junction, which gives all
candidates, of the Q-head none; of Transfer Q* also the tokens of each rollout. "Up to 6 times" is
read as the largest ratio of a baseline's cost to that of SIA at 20% (method "largest"), among dense
steering, ARGS, GenARM, best-of-N and chunk beam search. Transfer Q* costs more by orders of
magnitude and does not count. `versus` names what a cost is divided by, with its ratio and values in
`versus_target_ratio` and `versus_value_model`, so that every other reading can be looked up.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.transforms import Bbox

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import (
    family_label,
    listed,
    loss_label,
    metric_label,
    share_label,
)
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.figures.best_of_n import at_equal_cost
from benchmarks.spec.cells import CellRequest, FigureCells
from benchmarks.spec.methods import drawn_in
from benchmarks.spec.model_kinds import teacher_of
from benchmarks.spec.profile import Profile

METRICS = ("judge", "reward", "positions", "megaflops", "reported", "tokens")
COUNTED = ("positions", "megaflops", "reported")  # costs of a response
RIVALS = drawn_in("cost")
LENGTHS = 10  # tokens, of a bin
FEWEST_RESPONSES = 15  # of a bin
BASE = {"versus": "base"}  # labels of a ratio to the base
COST_LABELS = {
    "positions_ratio": "token positions (× base)",
    "seconds_ratio": "time (× base)",
}
TEXT = {"textcoords": "offset points", "fontsize": 6}
# the line from a label to its point
LEADER = {"arrowstyle": "-", "linewidth": 0.4, "color": "#888888", "shrinkA": 0, "shrinkB": 2}
DIRECTIONS = [  # of a label from its point, the preferred ones first: unit offset and alignment
    (1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"),
    (0, -1, "center", "top"), (0.7, 0.7, "left", "bottom"), (0.7, -0.7, "left", "top"),
    (-0.7, 0.7, "right", "bottom"), (-0.7, -0.7, "right", "top"),
]  # fmt: skip
DISTANCES = (4, 6, 8, 11)  # points
LABEL_WEIGHT = 10  # a label over a label, or outside, is worse than one over a line
FACES = {"value-token": {}, "value-mean": {"markerfacecolor": "white"}}  # by value model


class Cost(Figure):
    """Cost of alignment."""

    measured = (
        "judge",
        "reward",
        "steered",
        "tokens",
        "forwards",
        "junctions",
        "model_tokens",
        "value_tokens",
        "megaflops",
    )
    reported = ("reported", "positions", "megaflops", "judge")

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return the baselines, SIA at every ratio by values of each loss, and what predicts."""
        requests = []
        for family in profile.families:
            requests += methods.baselines(profile, replicate, family)
            for loss in profile.losses:
                requests += methods.curve(profile, replicate, family, loss)
                requests += methods.predictors_and_heads(profile, replicate, family, loss)
        return FigureCells(requests, timed=timed_cells(profile, replicate))

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """Return rows of responses, and those of measured times below."""
        rows = super().collect(profile, replicates, results)
        times = [results.timings(timed_cells(profile, replicate)) for replicate in replicates]
        return pd.concat([rows, *times], ignore_index=True)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate score and counted costs of every method, and ratios of costs.

        Ratios are to the base, and to SIA at the smallest claimed ratio by the values of either
        loss; seconds likewise, as ratios within a round. Differences: SIA at that ratio against
        what costs as much or less: at equal positions best-of-N, and dense steering and beam search
        of a share of the prompts, the base answering the others; and GenARM.
        """
        counted, timing = rows[rows["seconds"].isna()], rows[rows["seconds"].notna()]
        k, losses = profile.decoding.candidates, methods.value_models(profile)
        passes = {"genarm": 1, "transfer-q": k * (1 + profile.sweep.rollout_tokens)}
        passes |= {"vocabulary-value": 1, "q-head": 0, "junction-q-head": 0}
        charged = counted["method"].astype(str).map(passes).fillna(k) * counted["junctions"]
        counted = counted.assign(
            positions=counted["model_tokens"] + counted["value_tokens"],
            reported=counted["forwards"] + charged,
        )
        metrics = profile.available_metrics(METRICS)
        all_scores = estimates.method_scores(counted, metrics)
        scores = methods.measured_at(all_scores, profile.sweep.beams)
        ratios, front, smallest = [], [], min(profile.sweep.main_ratios)
        for family in profile.families:
            of_family = estimates.select(scores, family=family)
            base = estimates.select_one(of_family, method="base", search="")
            sparse = {
                loss: estimates.select_one(
                    of_family, method="sia", value_model=loss, target_ratio=smallest
                )
                for loss in losses
            }
            rivals = {loss: [] for loss in losses}
            for one in of_family:
                ratios += _ratios([one], base, BASE, profile)
                for loss, of_loss in sparse.items():
                    if teacher_of(one.labels["value_model"]) not in ("", loss):
                        continue
                    ratios += _ratios([one], of_loss, _versus(of_loss.labels), profile)
                    rivals[loss] += [one] if _is_rival(one.labels) else []
            for loss, of_loss in sparse.items():
                versus = _versus(of_loss.labels)
                ratios += _ratios(rivals[loss], of_loss, versus, profile, method="largest")
            responses = estimates.select(all_scores, family=family, method="base", search="best-of")
            genarm = estimates.select(of_family, method="genarm")
            for loss, of_loss in sparse.items():
                rival = {"value_model": loss, "tuned": False}
                curves = {"base": responses} | {
                    name: [base, *estimates.select(of_family, method=name, **labels)]
                    for name, labels in (("dense", rival), ("beams", {}))
                }
                front += [
                    estimates.difference(of_loss, other, versus=f"{name}-at-equal-cost")
                    for name, curve in curves.items()
                    if len(curve) > 1
                    for other in at_equal_cost(of_loss, curve, metrics)
                ]
                front += [estimates.difference(of_loss, other) for other in genarm]
        front += estimates.over_families(front)
        tables = [
            estimates.summarize([*scores, *front], metrics, profile),
            pd.DataFrame.from_records([*ratios, *_times(timing, profile)]),
            _lengths(counted),
        ]
        columns = [*estimates.COLUMNS, "versus_target_ratio", "versus_value_model", "length"]
        return pd.concat(tables, ignore_index=True)[columns].round(
            dict.fromkeys(estimates.NUMBERS, 4)
        )

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Draw the score against each cost relative to the base, and positions against length.

        The latter is left out where less than two lengths have enough responses.
        """
        table = estimates.pooled(table)
        points = scores_and_costs(table, profile)
        panels = points.groupby(["family", "cost"], sort=False)
        lengths = cost_by_length(table, profile)
        layout = np.arange(len(panels))[None]
        against_length = lengths["length"].nunique() > 1
        if against_length:
            layout = np.full((2, len(panels) // 2 + 1), -1)  # -1: the last panel, to the right end
            layout.flat[: len(panels)] = range(len(panels))
        figure = style.plt.figure(figsize=(style.PAGE, 2.4 * len(layout) + 1.3))
        axes = figure.subplot_mosaic(layout)
        score_axes = [axes[number] for number in range(len(panels))]
        for axis, ((family, cost), rows) in zip(score_axes, panels, strict=True):
            _draw_points(axis, rows)
            axis.set(xscale="log", xlabel=COST_LABELS[cost], title=family_label(family))
            axis.margins(x=0.14, y=0.1)
        for number in {*layout[:, 0]} - {-1}:
            axes[number].set_ylabel(metric_label(profile, profile.score))
        if against_length:
            title = listed(family_label(profile.families[0]), style.first_loss(profile))
            _draw_lengths(axes[-1], lengths, title)
        figure.set_layout_engine("constrained", rect=(0, 0.07, 1, 0.75))  # about as `finish` does
        figure.draw_without_rendering()
        for axis, (_, rows) in zip(score_axes, panels, strict=True):
            _label_points(axis, rows)
        handles = [
            style.handle(method, linestyle="none", marker=style.PALETTE[method].marker)
            for method in dict.fromkeys(points["method"])
        ]
        handles += [
            style.handle(
                "sia", f"{face}: {loss_label(profile, value_model)}", linestyle="none", **look
            )
            for face, (value_model, look) in zip(("filled", "open"), FACES.items(), strict=True)
            if value_model in set(points["value_model"])
        ]
        handles += [
            style.handle("base", label, color="#AAAAAA", linestyle=line)
            for label, line in (("Pareto front", "-"), ("front on the base model", "--"))
        ]
        rounds = points.loc[points["cost"] == "seconds_ratio", "n_cost"].max()
        too_few = f"Too few responses for the cost by length ({FEWEST_RESPONSES} of a length). "
        caption = (
            "Score against cost, relative to the base. Percentages: tokens that SIA "
            f"steers. Time: {rounds:.0f} rounds. {too_few * (not against_length)}"
            f"{style.sample_size_note(points, profile, 'Lines')}"
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
        method=list(map(estimates.method_key, points["method"], points["search"]))
    )
    labelled = (points["method"] == "sia") & points["target_ratio"].isin(profile.sweep.main_ratios)
    shares = points["target_ratio"].map(share_label)  # of all others the legend tells
    points = points.assign(label=shares.where(labelled, ""))
    return style.ordered(points, family=profile.families, cost=COST_LABELS)


def cost_by_length(table: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """Return the first family's cost by length: of the base, SIA at the smallest ratio, dense."""
    usual, ratio = methods.value_models(profile)[0], min(profile.sweep.main_ratios)
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
    """Draw methods as points with intervals, and the Pareto fronts."""
    for row in rows.itertuples():
        axis.errorbar(
            row.estimate_cost,
            row.estimate,
            yerr=[[row.estimate - row.low], [row.high - row.estimate]],
            xerr=[[row.estimate_cost - row.low_cost], [row.high_cost - row.estimate_cost]],
            color=style.COLOURS[row.method],
            marker=style.PALETTE[row.method].marker,
            markersize=4,
            elinewidth=0.7,
            **marker_face(row.value_model),
        )
    on_base = rows[rows["model"] == "base"]
    for methods_shown, line in ((rows, "-"), (on_base, "--")):
        cost, score = (methods_shown[name].to_numpy() for name in ("estimate_cost", "estimate"))
        front = pareto(cost, score)
        axis.plot(cost[front], score[front], color="#AAAAAA", linewidth=1, linestyle=line, zorder=0)


def _draw_lengths(axis, lengths: pd.DataFrame, title: str) -> None:
    """Draw the cost of responses against their length, a line for each method."""
    style.curves(lengths, "length").on(axis).plot()
    for row in lengths.drop_duplicates("method", keep="last").itertuples():
        label = f"SIA {share_label(row.target_ratio)}" if row.method == "sia" else row.method
        axis.annotate(label, (row.length, row.estimate), (-4, 4), ha="right", va="center", **TEXT)
    axis.set(
        xlabel="length of the response (tokens, end of a bin)",
        ylabel="token positions",
        title=title,
    )


def marker_face(value_model: str) -> dict[str, str]:
    """Return marker options that tell the losses of value models, or of heads, apart."""
    return FACES.get(teacher_of(value_model), {})


def _label_points(axis, rows: pd.DataFrame) -> None:
    """Place each label near its point so that it covers as little else as possible."""
    renderer, point = axis.figure.canvas.get_renderer(), axis.figure.dpi / 72  # pixels
    inside = axis.get_window_extent(renderer)
    ends = (
        axis.transData.transform(rows[[f"{end}_cost", end]].to_numpy(float))
        for end in ("low", "high")
    )
    centres = axis.transData.transform(rows[["estimate_cost", "estimate"]].to_numpy(float))
    obstacles = [Bbox([low - point, high + point]) for low, high in zip(*ends, strict=True)]
    obstacles += [Bbox([centre - 2 * point, centre + 2 * point]) for centre in centres]
    labels: list[Bbox] = []
    # ratios stand close together: they choose first
    labelled = rows[rows["label"] != ""]
    for row in labelled.sort_values("method", key=lambda names: names != "sia").itertuples():
        point_at = (row.estimate_cost, row.estimate)
        text = axis.annotate(row.label, point_at, (0, 0), **TEXT)
        text.set_in_layout(False)
        covered = {}
        for distance, (x, y, ha, va) in product(DISTANCES, DIRECTIONS):
            place = {"position": (distance * x, distance * y), "ha": ha, "va": va}
            text.set(**place)
            box = text.get_window_extent(renderer)
            outside = _overlap(box, box) - _overlap(box, inside)
            area = LABEL_WEIGHT * (outside + sum(_overlap(box, other) for other in labels))
            area += sum(_overlap(box, other) for other in obstacles)
            covered.setdefault(round(area), (place, box))
        place, box = covered[min(covered)]
        text.set(**place)
        axis.annotate("", point_at, place["position"], arrowprops=LEADER, **TEXT)
        labels.append(box.padded(point))


def _overlap(box: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(box, other)
    return shared.width * shared.height if shared else 0.0


def _versus(labels: dict) -> dict:
    """Return the labels of a ratio to SIA with these labels."""
    values = {f"versus_{name}": labels[name] for name in ("target_ratio", "value_model")}
    return {"versus": labels["method"]} | values


def _is_rival(labels: dict) -> bool:
    return estimates.method_key(labels["method"], labels["search"]) in RIVALS


def timed_cells(profile: Profile, replicate: int) -> list[CellRequest]:
    """Return requests of the cells that are timed, all of the first family."""
    unit, loss = (profile, replicate, profile.families[0]), profile.losses[0]
    sparse = methods.curve(*unit, loss, profile.sweep.reduced_ratios)
    return [*methods.baselines(*unit), *sparse, *methods.predictors_and_heads(*unit, loss)]


def _ratios(
    scores: Sequence[estimates.MethodScores],
    other: estimates.MethodScores,
    versus: dict,
    profile: Profile,
    method: str = "",
) -> list[dict]:
    """Return ratios of mean costs, of responses and of their tokens, resampled together.

    A method may cost less for its responses are shorter: its tokens cost what they do.

    Args:
        scores: One method, or several, of which the largest ratio counts.
        other: What is divided by.
        versus: Labels that name it.
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
    replicates, objectives, count, seeds = other.shape
    labels = labels | versus | {"objective": "all", "seeds": seeds}
    labels |= {"n": replicates * objectives * count, "replicates": replicates}
    draws = {
        metric: estimates.ratio_draws(
            np.stack([one.values[:, metrics.index(metric)] for one in scores], axis=1),
            np.repeat(other.values[:, [metrics.index(metric)]], len(scores), axis=1),
            other.shape,
            profile,
        )
        for metric in (*COUNTED, "tokens")
    }
    records = []
    for metric in COUNTED:
        for name, ratios in (
            (f"{metric}_ratio", draws[metric]),
            (f"{metric}_per_token_ratio", draws[metric] / draws["tokens"]),
        ):
            ratio = labels | {"metric": name}
            records += estimates.estimate_rows(ratio, ratios.max(2), profile, chosen)
    return records


def _lengths(counted: pd.DataFrame) -> pd.DataFrame:
    """Return the mean cost of responses of like length: metric "positions_at_length".

    `length` is the end of a bin; it shows that the cost stays linear.
    """
    rows = counted[
        (counted["search"] == "")
        & counted["method"].isin(["base", "sia", "dense"])
        & ~counted["tuned"].astype(bool)
    ]
    rows = rows.assign(length=(rows["tokens"] + LENGTHS - 1) // LENGTHS * LENGTHS)
    keys = ["family", "model", "value_model", "method", "gate", "target_ratio", "length"]
    bins = rows.groupby(keys, observed=True)["positions"].agg(estimate="mean", n="size")
    return bins[bins["n"] >= FEWEST_RESPONSES].reset_index().assign(
        metric="positions_at_length", objective="all", replicate=estimates.POOLED
    )  # fmt: skip


def _times(timing: pd.DataFrame, profile: Profile) -> list[dict]:
    """Return ratios of seconds within a round, geometric means over the rounds.

    Of every method to plain decoding (versus "base") and to SIA at the smallest ratio timed, and
    the largest of the latter among the rivals (method "largest"). Intervals are over
    replicates, or over the rounds of a single one.
    """
    names = [name for name in estimates.LABELS if name not in ("beta", "tau")]
    groups = timing.groupby(names, observed=True, dropna=False)
    settings = [dict(zip(names, labels, strict=True)) for labels, _ in groups]
    by_round = [
        rows.set_index(["replicate", "prompt"])["seconds"].sort_index() for _, rows in groups
    ]
    # (rounds, methods)
    logs = np.log(pd.concat(by_round, axis=1, join="outer").to_numpy(np.float64))
    replicates = timing["replicate"].nunique()
    shape = (replicates, 1, len(logs) // replicates, 1)
    plain = next(i for i, m in enumerate(settings) if (m["method"], m["search"]) == ("base", ""))
    _, sparse = min((m["target_ratio"], i) for i, m in enumerate(settings) if m["method"] == "sia")
    of_sparse = settings[sparse]
    largest = {k: of_sparse[k] for k in ("family", "model", "value_model")} | {"method": "largest"}
    rivals = [i for i, setting in enumerate(settings) if _is_rival(setting)]
    pairs = [
        (setting, [i], other, versus)
        for i, setting in enumerate(settings)
        for other, versus in ((plain, BASE), (sparse, _versus(of_sparse)))
    ]
    records, common = [], {"objective": "all", "metric": "seconds_ratio", "n": len(logs)}
    for setting, columns, other, versus in [
        *pairs,
        (largest, rivals, sparse, _versus(of_sparse)),
    ]:
        ratio = logs[:, columns] - logs[:, [other]]
        draws = np.exp(estimates.ratio_draws(ratio, np.ones_like(ratio), shape, profile).max(2))
        labels = setting | common | versus | {"replicates": replicates}
        records += estimates.estimate_rows(labels, draws, profile)
    return records


def pareto(costs: np.ndarray, scores: np.ndarray) -> list[int]:
    """Return the indices of the undominated points, by ascending cost."""
    front: list[int] = []
    for i in np.lexsort((-scores, costs)):
        if not front or scores[i] > scores[front[-1]]:
            front.append(int(i))
    return front
