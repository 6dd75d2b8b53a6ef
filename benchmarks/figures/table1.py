"""Table 1: every method, objective and family: what it reaches, how far it drifts, what it costs. Best in bold, with intervals.

win: share of responses that score above the base's to the same prompt under the same noise, ties half. distinct-2: different bigrams
among all of a prompt's samples (Li et al., "A diversity-promoting objective function for neural conversation models", 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.analysis import estimates
from benchmarks.analysis.labels import method_label
from benchmarks.figures import methods
from benchmarks.figures.base import Figure
from benchmarks.runtime.files import write_text
from benchmarks.spec.cells import OBJECTIVES, FigureCells
from benchmarks.spec.methods import REWARD
from benchmarks.spec.profile import Profile

METRICS = ("reward", "judge", "win", "distinct", "kl", "surprise", "tokens", "positions")
MEASURED = (
    "reward",
    "judge",
    "distinct",
    "kl",
    "surprise",
    "steered",
    "tokens",
    "model_tokens",
    "value_tokens",
)
HEADS = {
    "reward": "reward (SD)",
    "judge": "judge",
    "win": "win rate",
    "distinct": "distinct-2",
    "kl": "KL (nats)",
    "surprise": "−ln π (nats)",
    "tokens": "length",
    "positions": "cost (positions)",
}
KEYS = ["method", "target_ratio", "value_model", "search", "tuned"]
BETTER = {"reward": 1, "judge": 1, "win": 1, "distinct": 1, "kl": -1, "positions": -1}


class Table1(Figure):
    """Table 1: quality, drift and cost of every method."""

    title = "Table 1: quality, drift and cost of every method"
    measured = MEASURED
    reported = ()

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        wanted, sweep = [], profile.sweep
        for family in profile.families:
            wanted += methods.baselines(profile, replicate, family)
            for loss in profile.losses:
                for tuned in (False, True) if sweep.tuning else (False,):
                    wanted += methods.curve(
                        profile, replicate, family, loss, sweep.reduced_ratios, tuned=tuned
                    )
            if profile.has(REWARD):
                wanted.append(
                    methods.searched(
                        methods.steered(
                            replicate, family, profile.losses[0], ratio=min(sweep.reduced_ratios)
                        ),
                        sweep.beams,
                    )
                )
        return FigureCells(wanted)

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        rows = super().collect(profile, replicates, results)
        rows = rows[(rows["search"] != "best-of") | (rows["best_of"] == profile.sweep.beams)]
        score = profile.score
        base = rows[(rows["method"] == "base") & (rows["search"] == "")]
        unit = ["family", *estimates.UNIT]
        paired = (
            rows[unit]
            .astype({"family": str, "objective": str})
            .merge(
                base[[*unit, score]].astype({"family": str, "objective": str}),
                on=unit,
                how="left",
                validate="many_to_one",
            )[score]
            .to_numpy()
        )
        return rows.assign(
            win=((rows[score] > paired) + 0.5 * (rows[score] == paired)).astype("float32")
        )

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Every method, and the paired difference of each judge score to the base's."""
        rows = rows.assign(positions=rows["model_tokens"] + rows["value_tokens"])
        metrics = profile.available_metrics(METRICS)
        found = estimates.method_scores(rows, metrics)
        differences = [
            estimates.difference(
                entry,
                estimates.select_one(
                    found, family=entry.labels["family"], method="base", search=""
                ),
                versus="base",
            )
            for entry in found
        ]
        return estimates.summarize([*found, *differences], metrics, profile)

    def plot(self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path) -> list[Path]:
        """The table as Markdown and LaTeX (table1.csv in results is the whole summary)."""
        from benchmarks.figures import style

        table = estimates.pooled(table)

        level = table[(table["versus"] == "")]
        sections = [
            (family, objective) for family in profile.families for objective in (*OBJECTIVES, "all")
        ]
        paths = []
        note = "Stale: measured under other settings than the profile has now. " if stale else ""
        first = level[(level["method"] == "base") & (level["objective"] != "all")].iloc[0]
        note += (
            f"Estimates with {profile.statistics.level:.0%} bootstrap intervals; n = {int(first['n'])} prompts × {int(first['seeds'])} samples "
            f"for each objective, {style.together(int(first['replicates']))} of profile {profile.name} (Transfer Q*: "
            f"{profile.sweep.rollout_prompts} prompts a replicate). Bold: best of its column, as it is written. β = 1 unless it says best β "
            f"(chosen on validation prompts; always for ARGS, GenARM and Transfer Q*). Win rate: against the base under the same noise, ties "
            f"half. KL: against the base, of steered steps, without what a search's choice adds (never bold there); of instruct models the "
            f"log-likelihood ratio of the first sample; −ln π: surprise of the base. "
            f"Cost: token positions through all models."
        )
        for suffix, render in (("md", _markdown), ("tex", _latex)):
            path = folder / f"table1.{suffix}"
            write_text(
                path, render([(section, _rows(level, *section)) for section in sections], note)
            )
            paths.append(path)
        return paths


def _rows(
    level: pd.DataFrame, family: str, objective: str
) -> list[tuple[str, dict[str, pd.Series]]]:
    """Names of methods, and what each reaches by metric."""
    part = level[(level["family"] == family) & (level["objective"] == objective)]
    found = []
    for (method, ratio, value_model, search, tuned), group in part.groupby(KEYS, dropna=False):
        name = method_label(
            method,
            ratio,
            value_model,
            int(group["best_of"].iloc[0]) if search == "best-of" else 1,
            tuned,
        )
        found.append((name, {row["metric"]: row for _, row in group.iterrows()}))
    return found


def _heads(rows: list[tuple[str, dict]]) -> dict[str, str]:
    """The columns that there are."""
    return {metric: head for metric, head in HEADS.items() if metric in rows[0][1]}


def _best(rows: list[tuple[str, dict]]) -> dict[str, float]:
    """The best estimate of each column that has one, as it is written. Drift of the base counts for nothing, and neither does that of
    searches, which leaves out what choosing among responses adds."""
    found = {}
    for metric, sign in BETTER.items():
        if metric not in rows[0][1]:
            continue
        rows_of = [row for _, row in rows if metric != "kl" or _drift_is_whole(row["kl"])]
        values = [_rounded(row[metric]) for row in rows_of]
        found[metric] = sign * max(sign * value for value in values)
    return found


def _drift_is_whole(row: pd.Series) -> bool:
    return not _is_base(row) and row["search"] not in ("best-of", "beams")


def _is_base(row: pd.Series) -> bool:
    """Whether its tokens are the base's own; of a search over them, the choice is another matter."""
    return row["gate"] == "never" and row["model"] == "base"


def _digits(metric: str) -> int:
    return {"positions": 0, "tokens": 1, "surprise": 1}.get(metric, 2)


def _rounded(row: pd.Series) -> float:
    return round(row["estimate"], _digits(row["metric"]))


def _is_best(row: pd.Series, best: dict[str, float]) -> bool:
    return (
        _cell(row) != "–"
        and _rounded(row) == best.get(row["metric"])
        and (row["metric"] != "kl" or _drift_is_whole(row))
    )


def _cell(row: pd.Series) -> str:
    if row["metric"] == "kl" and _is_base(row):
        return "–"
    digits = _digits(row["metric"])
    return f"{row['estimate']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def _markdown(sections: list, note: str) -> str:
    lines = ["# Table 1", "", note, ""]
    for (family, objective), rows in sections:
        best, heads = _best(rows), _heads(rows)
        lines += [
            f"## {family}, {'all objectives' if objective == 'all' else objective}",
            "",
            "| method | " + " | ".join(heads.values()) + " |",
        ]
        lines.append("|---|" + "---|" * len(heads))
        for name, row in rows:
            cells = [
                f"**{_cell(row[m])}**" if _is_best(row[m], best) else _cell(row[m]) for m in heads
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _latex(sections: list, note: str) -> str:
    """Tables of booktabs, one for each family and objective."""
    lines = [f"% {note}"]
    for (family, objective), rows in sections:
        best, heads = _best(rows), _heads(rows)
        lines += [
            r"\begin{tabular}{l" + "r" * len(heads) + "}",
            r"\toprule",
            f"{family}, {objective} & " + " & ".join(map(_tex, heads.values())) + r" \\",
            r"\midrule",
        ]
        for name, row in rows:
            cells = [
                rf"\textbf{{{_tex(_cell(row[m]))}}}"
                if _is_best(row[m], best)
                else _tex(_cell(row[m]))
                for m in heads
            ]
            lines.append(f"{_tex(name)} & " + " & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join(lines)


def _tex(text: str) -> str:
    for plain, escaped in (
        ("%", r"\%"),
        ("−ln π", r"$-\ln\pi$"),
        ("β", r"$\beta$"),
        ("–", "--"),
        ("−", "-"),
        ("Q*", "Q$^*$"),
    ):
        text = text.replace(plain, escaped)
    return text
