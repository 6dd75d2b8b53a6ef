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
from benchmarks.analysis.labels import metric_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import CellRequest, FigureCells
from benchmarks.spec.methods import ARGS, AUTOREGRESSIVE
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
RIVALS = (
    "dense",
    "args",
    "genarm",
    "beams",
    "base",
)  # "base": best-of-N. Transfer Q* costs more by orders of magnitude
LENGTHS = 10  # tokens, of a bin
ROUNDS = 6  # twice each objective


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
        """Score against three costs, each relative to plain decoding, with the Pareto front; and cost against length."""
        from benchmarks.figures import style

        table = estimates.pooled(table)

        scores = table[
            (table["objective"] == "all")
            & (table["metric"] == profile.score)
            & (table["versus"] == "")
        ]
        ratios = table[(table["objective"] == "all") & (table["versus"] == "base")]
        axes_of = {
            "positions_ratio": "token positions / base",
            "megaflops_ratio": "FLOPs / base",
            "seconds_ratio": "time / base",
        }
        families = profile.families
        figure, axes = style.grid(2 * len(families), 2, 3.4, 2.3)
        axes = axes.reshape(-1, len(axes_of) + 1)
        used: dict[str, None] = {}
        names = [name for name in estimates.LABELS if name not in ("beta", "tau")]
        for i, family in enumerate(families):
            part = scores[scores["family"] == family]
            for j, (metric, label) in enumerate(axes_of.items()):
                axis = axes[i, j]
                costs = ratios[(ratios["metric"] == metric) & (ratios["family"] == family)]
                if costs.empty:
                    axis.text(
                        0.5,
                        0.5,
                        "timed on the first family",
                        ha="center",
                        va="center",
                        color="#777777",
                        transform=axis.transAxes,
                    )
                    axis.set_axis_off()
                    continue
                both = part.merge(costs, on=names, suffixes=("", "_cost"))
                for row in both.itertuples():
                    method = estimates.display_name(row.method, row.search)
                    used[method] = None
                    hollow = row.value_model == "value-mean"
                    look = {
                        "color": style.COLOURS[method],
                        "marker": style.MARKERS[method],
                        "markerfacecolor": "white" if hollow else None,
                    }
                    axis.errorbar(
                        row.estimate_cost, row.estimate, yerr=[[row.estimate - row.low], [row.high - row.estimate]],
                        xerr=[[row.estimate_cost - row.low_cost], [row.high_cost - row.estimate_cost]], markersize=4.5, elinewidth=0.7, **look,
                    )  # fmt: skip
                    if (
                        method == "sia"
                        and not hollow
                        and row.target_ratio <= max(profile.sweep.reduced_ratios)
                    ):
                        axis.annotate(
                            f"{row.target_ratio:.0%}",
                            (row.estimate_cost, row.estimate),
                            (-5, 3),
                            textcoords="offset points",
                            ha="right",
                            fontsize=7,
                        )
                steered_base = both[
                    (both["model"] == "base") & (both["value_model"] != str(AUTOREGRESSIVE))
                ]
                for some, look in ((both, {"linestyle": "-"}), (steered_base, {"linestyle": "--"})):
                    at, score = (
                        some[column].to_numpy() for column in ("estimate_cost", "estimate")
                    )
                    front = pareto(at, score)
                    axis.plot(
                        at[front], score[front], color="#AAAAAA", linewidth=1, zorder=0, **look
                    )
                axis.set_xscale("log")
                axis.set_xlabel(label)
                axis.set_title(style.FAMILIES[family], loc="left")
            for axis in axes[i, [0, 2]]:
                axis.set_ylabel(metric_label(profile, profile.score))
            lengths = table[
                (table["metric"] == "positions_at_length") & (table["family"] == family)
            ]
            usual = methods.values(profile)[0]
            lines = [
                ("base", "", 0.0),
                ("sia", usual, min(profile.sweep.main_ratios)),
                ("dense", usual, 1.0),
            ]
            for method, value_model, ratio in lines:
                points = lengths[
                    (lengths["method"] == method)
                    & (lengths["value_model"].fillna("") == value_model)
                ]
                points = points[points["target_ratio"] == ratio]
                axes[i, -1].plot(
                    points["length"],
                    points["estimate"],
                    color=style.COLOURS[method],
                    marker=style.MARKERS[method],
                    markersize=3,
                )
            axes[i, -1].set_xlabel("tokens of the response (at most)")
            axes[i, -1].set_ylabel("token positions")
            axes[i, -1].set_title(f"{style.FAMILIES[family]}: against length", loc="left")
        ratios = ", ".join(f"{ratio:.0%}" for ratio in profile.sweep.ratios)
        tuned = "their best β" if profile.sweep.tuning else "β = 1"
        rounds = table.loc[table["metric"] == "seconds_ratio", "n"].max()
        caption = (
            f"What alignment costs, all objectives. Grey: Pareto fronts, solid of all, dashed of the base model without further language "
            f"models (no instruct, no GenARM). SIA at {ratios} of the tokens and dense, β = 1; filled: per-token loss, hollow: paper's loss; "
            f"ARGS, GenARM, Transfer Q* at {tuned} (Transfer Q*: the first {profile.sweep.rollout_prompts} prompts of each objective and "
            f"replicate). Time: {profile.worker}, {style.first_loss(profile)}, some methods; geometric mean of {rounds:.0f} rounds in "
            f"turns, bootstrap over rounds. "
            f"Against length: base, SIA at {min(profile.sweep.main_ratios):.0%} and dense, {style.first_loss(profile)}, means of responses of like "
            f"length without intervals. {style.measured(scores, profile)}"
        )
        return style.finish(
            figure,
            [style.point(method) for method in used],
            caption,
            folder,
            "cost",
            stale=stale,
            legend_columns=5,
        )


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
