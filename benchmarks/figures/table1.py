"""Table 1: every method, objective and family: quality, drift and cost, with intervals; best bold.

win: share of responses that score above the base's to the same prompt under the same noise, ties
half. distinct-2: different bigrams among all of a prompt's samples (Li et al., "A
diversity-promoting objective function for neural conversation models", 2016).
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pandas as pd

from benchmarks.analysis import estimates, labels
from benchmarks.analysis.intervals import interval_kind
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.runtime.files import write_text
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.methods import BASELINES, REWARD
from benchmarks.spec.profile import Profile

HEADS = {
    "reward": "reward",
    "judge": "judge",
    "win": "win rate",
    "distinct": "distinct-2",
    "kl": "KL (nats)",
    "surprise": "−ln π (nats)",
    "tokens": "length",
    "positions": "cost (positions)",
}
METRICS = tuple(HEADS)
KEYS = ["method", "target_ratio", "value_model", "search", "tuned"]
BETTER = {metric: labels.METRICS[metric].better or None for metric in METRICS}
DIGITS = {"positions": 0, "tokens": 1, "surprise": 1}  # after the point; else 2
TEX = str.maketrans({"β": r"$\beta$", "π": r"$\pi$", "–": "--", "−": "-"})
NOTE = (
    "{stale}Estimates with {intervals}; for each objective, {size}, "
    "profile {profile}{few}. Bold: best of its column, as printed. {strength}. Win rate: against "
    "the base under the same noise, ties count half. KL: of steered steps from the base, without "
    "the effect of choosing in a search (never bold there); for instruct models, the "
    "log-likelihood ratio of the first sample. −ln π: surprise of the base. Cost: token positions "
    "processed by all models."
)


class Table1(Figure):
    """Table 1: quality, drift and cost of every method."""

    measured = (*METRICS[:2], "distinct", "kl", "surprise", "steered", "tokens", "model_tokens",
                "value_tokens")  # fmt: skip
    reported = ()

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return the cells of all baselines, of SIA and of best-of-N with SIA.

        SIA and dense steering, with the fitted gate and heads, at β = 1 and at the best β.
        """
        requests, ratios = [], profile.sweep.reduced_ratios
        for family in profile.families:
            unit = (profile, replicate, family)
            requests += methods.baselines(*unit)
            for loss in profile.losses:
                requests += methods.curve(*unit, loss, ratios)
                requests += methods.predictors_and_heads(*unit, loss)
            for loss in methods.tuned_losses(profile):
                requests += methods.curve(*unit, loss, ratios, tuned=True)
                requests += methods.predictors_and_heads(*unit, loss, tuned=True)
            if profile.has(REWARD):
                sparse = methods.steered(*unit[1:], profile.losses[0], ratio=min(ratios))
                requests.append(methods.with_best_of(sparse, profile.sweep.beams))
        return FigureCells(requests)

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """Return the rows of responses with `win`, against the base under the same noise."""
        rows = super().collect(profile, replicates, results)
        rows = rows[(rows["search"] != "best-of") | (rows["best_of"] == profile.sweep.beams)]
        unit, score = ["family", *estimates.UNIT], rows[profile.score]
        keys = pd.MultiIndex.from_frame(rows[unit].astype({"family": str, "objective": str}))
        base = (rows["method"] == "base") & (rows["search"] == "")
        paired = pd.Series(score[base].to_numpy(), keys[base]).reindex(keys).to_numpy()
        win = (score > paired) + 0.5 * (score == paired)
        return rows.assign(win=win.astype("float32"))

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Estimate every method, and the paired difference of each judge score to the base's."""
        rows = rows.assign(positions=rows["model_tokens"] + rows["value_tokens"])
        metrics = profile.available_metrics(METRICS)
        scores = estimates.method_scores(rows, metrics)
        base = {
            one.labels["family"]: one for one in estimates.select(scores, method="base", search="")
        }
        differences = [
            estimates.difference(one, base[one.labels["family"]], versus="base") for one in scores
        ]
        return estimates.summarize([*scores, *differences], metrics, profile)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """Write the table as Markdown and LaTeX (results hold the whole summary)."""
        level = estimates.pooled(table)
        level = level[level["versus"] == ""]
        first = level[(level["method"] == "base") & (level["objective"] != "all")].iloc[0]
        note = NOTE.format(
            stale="Stale: measured under conditions that have changed since. " if stale else "",
            intervals=interval_kind(profile.statistics.level, int(first["replicates"])),
            size=style.sample_size(first),
            profile=profile.name,
            few=few_prompts_note(profile),
            strength=strength_note(profile),
        )
        markdown, latex = ["# Table 1", note], [f"% {note}"]
        for family, objective in product(profile.families, (*OBJECTIVES, "all")):
            rows = level[(level["family"] == family) & (level["objective"] == objective)]
            text, best = cells_of(rows, profile)
            title = f"{labels.family_label(family)}, {labels.objective_label(objective)}"
            markdown += [f"## {title}", text.mask(best, "**" + text + "**").to_markdown()]
            latex.append(_latex(text.rename_axis(columns=title), best))
        paths = [folder / "table1.md", folder / "table1.tex"]
        write_text(paths[0], "\n\n".join(markdown) + "\n")
        write_text(paths[1], "\n".join(latex))
        return paths


def few_prompts_note(profile: Profile) -> str:
    """Return a note, in parentheses, on the methods that answer fewer prompts."""
    few = [m.label for m in BASELINES if m.few_prompts and all(map(profile.has, m.needs))]
    count = f"{profile.sweep.rollout_prompts} prompts per replicate and objective"
    return f" ({', '.join(few)}: {count})" if few else ""


def strength_note(profile: Profile) -> str:
    """Return a note on the β of the methods."""
    if not profile.sweep.tuning:
        return "β = 1"
    scorers = [m.label for m in BASELINES if m.scorer and all(map(profile.has, m.needs))]
    always = f"; always for {', '.join(scorers)}" if scorers else ""
    return f"β = 1 unless marked best β (chosen on validation prompts{always})"


def cells_of(rows: pd.DataFrame, profile: Profile) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the text of each cell, methods by metrics, and whether it is the best of its column.

    The drift (KL) of the base counts for nothing, and neither does that of searches, which leaves
    out what choosing among responses adds.
    """
    digits = [DIGITS.get(metric, 2) for metric in rows["metric"]]
    texts = [
        f"{estimate:z.{places}f} [{low:z.{places}f}, {high:z.{places}f}]"
        for estimate, low, high, places in zip(
            rows["estimate"], rows["low"], rows["high"], digits, strict=True
        )
    ]
    rounded = [
        round(estimate, places) for estimate, places in zip(rows["estimate"], digits, strict=True)
    ]
    drift = rows["metric"] == "kl"
    base_tokens = (rows["gate"] == "never") & (rows["model"] == "base")
    searched = rows["search"].isin(["best-of", "beams"])
    goodness = pd.Series(rounded, rows.index) * rows["metric"].map(BETTER)
    goodness = goodness.mask(drift & (base_tokens | searched))
    rows = rows.assign(
        text=pd.Series(texts, rows.index).mask(drift & base_tokens, "–"),
        best=goodness == goodness.groupby(rows["metric"]).transform("max"),
    )
    names = {}
    for keys, group in rows.groupby(KEYS, dropna=False):
        method, ratio, value_model, search, tuned = keys
        best_of = int(group["best_of"].iloc[0]) if search == "best-of" else 1
        names[keys] = labels.method_label(profile, method, ratio, value_model, best_of, tuned)
    rows = rows.assign(name=[names[keys] for keys in rows[KEYS].itertuples(index=False, name=None)])
    heads = [metric for metric in HEADS if metric in set(rows["metric"])]
    text, best = (
        rows.pivot(index="name", columns="metric", values=column)
        .loc[list(names.values()), heads]
        .rename(columns=HEADS | {"reward": profile.reward_label.removeprefix("evaluation ")})
        .rename_axis(index=None, columns=None)
        for column in ("text", "best")
    )
    return text, best.astype(bool)


def _latex(text: pd.DataFrame, best: pd.DataFrame) -> str:
    """Return the LaTeX source of a booktabs table.

    Args:
        text: Formatted cells, a row per method and a column per metric.
        best: Whether a cell is set in bold, of the same shape.
    """
    styler = text.style.format(escape="latex")
    for axis in ("index", "columns"):
        styler = styler.format_index(escape="latex", axis=axis)
    bold = best.replace({True: "textbf:--rwrap;", False: ""}).astype(str)
    styler = styler.apply(lambda _: bold, axis=None)
    return styler.to_latex(hrules=True, column_format="l" + "r" * text.shape[1]).translate(TEX)
