"""Figure 2: alignment against the share of steered tokens, beside static baselines, in four settings.

Settings: values by the paper's loss ("mean") or by the per-token loss ("token"), each at β = 1 and with every method at
its own best β, chosen by the judge on validation prompts.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import metric_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.methods import label_of
from benchmarks.spec.profile import Profile

METRICS = ("judge", "reward", "fluency_errors", "kl")
MEASURED = (*METRICS, "steered", "tokens")
SETTINGS = {
    ("value-mean", False): "paper's loss, β = 1",
    ("value-mean", True): "paper's loss, best β",
    ("value-token", False): "per-token loss, β = 1",
    ("value-token", True): "per-token loss, best β",
}


class Figure2(Figure):
    """Figure 2: alignment against the share of steered tokens."""

    title = "Figure 2: alignment against the share of steered tokens"
    measured = MEASURED

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        wanted, sweep = [], profile.sweep
        for family in profile.families:
            wanted += methods.baselines(profile, replicate, family)
            for loss in profile.losses:
                wanted += methods.curve(profile, replicate, family, loss)
                wanted += [
                    methods.steered(replicate, family, loss, gate="random", ratio=r)
                    for r in sweep.ratios
                ]
                if sweep.tuning:
                    wanted += methods.curve(profile, replicate, family, loss, tuned=True)
            if sweep.tuning:
                wanted += [
                    methods.steered(
                        replicate, family, profile.losses[0], gate="random", ratio=r, tuned=True
                    )
                    for r in sweep.ratios
                ]
        return FigureCells(wanted)

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Every method, and paired: SIA − dense, SIA − random, the mean of SIA over the claimed ratios − dense; SIA at each ratio against
        every baseline. Family "all": the mean over both."""
        metrics = profile.available_metrics(METRICS)
        found = [
            e
            for e in estimates.method_scores(rows, metrics)
            if e.labels["search"] != "best-of" or e.labels["best_of"] == profile.sweep.beams
        ]
        differences = []
        for family in profile.families:
            static = [
                e
                for e in estimates.select(found, family=family)
                if e.labels["value_model"] not in methods.values(profile)
            ]
            for value_model, tuned in settings(profile):
                setting = {"family": family, "value_model": value_model, "tuned": tuned}
                dense = estimates.select_one(found, **setting, method="dense")
                sparse = estimates.select(found, **setting, method="sia")
                for sia in sparse:
                    others = estimates.select(
                        found, **setting, method="random", target_ratio=sia.labels["target_ratio"]
                    )
                    differences += [estimates.difference(sia, other) for other in [dense, *others]]
                    differences += [
                        estimates.difference(
                            sia,
                            e,
                            versus=estimates.display_name(e.labels["method"], e.labels["search"]),
                        )
                        for e in static
                    ]
                claimed = [
                    e for e in sparse if e.labels["target_ratio"] in profile.sweep.main_ratios
                ]
                differences.append(
                    estimates.difference(estimates.mean_of(claimed, method="sia-claimed"), dense)
                )
        return estimates.summarize(
            [*found, *differences, *estimates.over_families(differences)], metrics, profile
        )

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Of each family a picture of the score, and for the lab one of the evaluation reward: figure2, figure2-reward for the first family,
        with the name of the family for others. Rows: settings; columns: objectives."""
        table = estimates.pooled(table)
        paths = []
        for metric in profile.available_metrics(("judge", "reward")):
            name = "figure2" if metric == profile.score else f"figure2-{metric}"
            for family in profile.families:
                ending = "" if family == profile.families[0] else f"-{family}"
                paths += picture(table, profile, stale, folder, metric, family, name + ending)
        return paths


def settings(profile: Profile) -> list[tuple[str, bool]]:
    """Those of SETTINGS that the profile measures."""
    return [
        (value, tuned)
        for value, tuned in SETTINGS
        if value in methods.values(profile) and (not tuned or profile.sweep.tuning)
    ]


STATIC = (
    "base",
    "instruct",
    "instruct-reward",
    "best-of-n",
    "beams",
    "args",
    "transfer-q",
    "genarm",
)


def picture(
    table: pd.DataFrame,
    profile: Profile,
    stale: bool,
    folder: Path,
    metric: str,
    family: str,
    name: str,
) -> list[Path]:
    from benchmarks.figures import style

    level = table[
        (table["versus"] == "")
        & (table["objective"] != "all")
        & (table["metric"] == metric)
        & (table["family"] == family)
    ]
    drawn = settings(profile)
    figure, axes = style.grid(len(drawn), len(OBJECTIVES), 2.6, 2.1, sharex=True)
    for j, objective in enumerate(OBJECTIVES):
        column = level[level["objective"] == objective]
        static = column[~column["value_model"].isin(methods.values(profile))]
        for axis, (value_model, tuned) in zip(axes[:, j], drawn, strict=True):
            for row in static.itertuples():
                style.horizontal(axis, estimates.display_name(row.method, row.search), row)
            steered = column[(column["value_model"] == value_model) & (column["tuned"] == tuned)]
            dense = steered[steered["method"] == "dense"]
            for method in ("random", "sia"):
                style.curve(axis, method, pd.concat([steered[steered["method"] == method], dense]))
            style.curve(axis, "dense", dense)
            axis.set_xlim(0, 1.03)
            axis.set_xticks((0, 0.5, 1))
        style.share_y(axes[:, j])
        axes[0, j].set_title(f"{style.FAMILIES[family]}, {objective}")
        axes[-1, j].set_xlabel("share of tokens steered")
    for axis, setting in zip(axes[:, 0], drawn, strict=True):
        axis.set_ylabel(f"{metric_label(profile, metric)}\n{SETTINGS[setting]}", fontsize=9)
    tuned = "their own best β" if profile.sweep.tuning else "β = 1"
    there = {estimates.display_name(row.method, row.search) for row in level.itertuples()}
    guided = ", ".join(
        label_of(method) for method in ("args", "genarm", "transfer-q") if method in there
    )
    caption = (
        f"{style.FAMILIES[family]}. Solid: steered with the entropy gate (SIA) or at random; both end in dense steering at 1. Other "
        f"lines: static baselines; N = {profile.sweep.beams} responses for best of N and chunk beam search; {guided} at {tuned} "
        f"(Transfer Q*: the first {profile.sweep.rollout_prompts} prompts of each objective and replicate). "
        f"{style.measured(level, profile)}"
    )
    if profile.trains_models:
        caption += (
            " Instruct: the base trained on its own responses that the judge or the reward model likes. Best β: chosen by the judge on "
            "validation prompts, for each method and ratio."
        )
    plain = {} if profile.trains_models else {"instruct": "instruct"}
    handles = [
        style.handle(m, plain.get(m, "")) for m in ("sia", "random", "dense", *STATIC) if m in there
    ]
    return style.finish(figure, handles, caption, folder, name, stale=stale, legend_columns=4)
