"""Verdicts: every claim of claims.toml held against the summary of its figure.

A claim names one row of a summary (an estimate with its interval, a paired difference as a rule) and what it takes: "more" than
the margin, "less" than it, or "at least" it. Reproduced: the whole interval agrees; not reproduced: the whole interval disagrees;
undecided: neither. The same is said of each replicate alone.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from benchmarks.spec.profile import JUDGE_METRICS, Profile

NEEDS = {"more": ">", "less": "<", "at least": "≥"}
FAMILY_CONDITIONS = ("Qwen3", "Llama")  # that are about one family
VERDICTS = ("reproduced", "not reproduced", "undecided", "not measured")
ENDS = ["estimate", "low", "high"]
MARKS = {"reproduced": "✓", "not reproduced": "✗", "undecided": "?"}
CLAIMS = Path(__file__).with_name("claims.toml")
COLUMNS = [
    "claim", "says", "source", "figure", "condition", "test", "margin", "verdict", "estimate", "low", "high", "n", "replicates",
    "verdict_by_replicate", "estimate_by_replicate", "unit",
]  # fmt: skip
UNITS = {
    "judge": "points",
    "reward": "points",
    "kl": "nats",
    "fluency_errors": "of the responses",
    "gain of steering": "in J",
}


@dataclass(frozen=True)
class Claim:
    """says: in our words. source: where the paper says it. where: labels that pick one row of the figure's summary. condition: under which
    setting, in words. test and margin: see above."""

    name: str
    says: str
    source: str
    figure: str
    condition: str
    where: dict
    test: str
    margin: float


def unit_of(metric: str) -> str:
    """What an estimate is counted in; empty for shares of random instances and the like."""
    if metric.startswith(("entropy after", "fall", "rebound")):
        return "nats"
    return "times" if metric.endswith(", ratio") or " / " in metric else UNITS.get(metric, "")


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """Each claim once for each of its conditions. Errors: ValueError for an unknown test or condition."""
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    conditions, claims = document["conditions"], []
    for name, entry in document["claims"].items():
        if entry["test"] not in ("more", "less", "at least"):
            raise ValueError(
                f'{path.name}: the test of {name} must be "more", "less" or "at least", got {entry["test"]!r}'
            )
        for condition in entry.get("conditions", [""]):
            if condition and condition not in conditions:
                raise ValueError(f"{path.name}: {name} names the unknown condition {condition!r}")
            further = dict(conditions.get(condition, {}))
            where = entry["where"] | {key: value for key, value in further.items() if key != "says"}
            claims.append(
                Claim(
                    name,
                    entry["says"],
                    entry["source"],
                    entry["figure"],
                    further.get("says", ""),
                    where,
                    entry["test"],
                    entry["margin"],
                )
            )
    return claims


def claims_for(profile: Profile, unsupported: Collection[str] = ()) -> list[Claim]:
    """The claims as this profile can decide them. Of the Hub: in its own score and family, without conditions on losses and tuning that it
    does not have, and without what only the lab has. unsupported: figures that it cannot measure."""
    if profile.trains_models:
        return read_claims()
    values, (family,) = [f"value-{loss}" for loss in profile.losses], profile.families
    adapted = []
    for claim in read_claims():
        where = dict(claim.where)
        if where.get("metric") == "judge":
            where["metric"] = profile.score
        asked = where.get("family", family)
        if asked == "all" or (asked != family and claim.condition not in FAMILY_CONDITIONS):
            where["family"] = asked = family
        named = str(where.get("value_model", where.get("versus", "")))
        foreign = named.rpartition("value-")[1] and not named.endswith(tuple(values))
        tuned = where.get("tuned") and not profile.sweep.tuning
        if foreign or tuned or asked != family or claim.figure in unsupported:
            continue
        if where.get("metric") not in JUDGE_METRICS and where.get("versus") != "instruct-reward":
            adapted.append(
                replace(
                    claim,
                    where=where,
                    says=claim.says.replace(" (the judge's favourites)", "").removeprefix(
                        "Qwen3, per-token loss: "
                    ),
                )
            )
    return adapted


def decide(test: str, margin: float, low: float, high: float) -> str:
    """ "reproduced", "not reproduced" or "undecided", from the ends of an interval."""
    if test == "less":
        low, high, margin = -high, -low, -margin
    if low > margin or (test == "at least" and low == margin):
        return "reproduced"
    if high < margin or (test != "at least" and high == margin):
        return "not reproduced"
    return "undecided"


def find(claim: Claim, summary: pd.DataFrame) -> pd.Series | None:
    """The row of the summary that the claim is about; None where this profile has not measured it.

    Errors: LookupError if several rows fit.
    """
    fits = pd.Series(True, index=summary.index)
    for name, value in claim.where.items():
        column = summary[name]
        fits &= column.isna() | (column == "") if value == "" else column == value
    if fits.sum() > 1:
        raise LookupError(
            f"{claim.name} ({claim.condition}) fits {fits.sum()} rows of {claim.figure}: {claim.where}"
        )
    return summary[fits].iloc[0] if fits.any() else None


def verdicts(summaries: dict[str, pd.DataFrame], claims: list[Claim]) -> pd.DataFrame:
    """One row for each claim and condition; "not measured" where a table has no such row."""
    records = []
    for claim in claims:
        row = find(claim, summaries[claim.figure]) if claim.figure in summaries else None
        record = {
            "claim": claim.name, "says": claim.says, "source": claim.source, "figure": claim.figure, "condition": claim.condition,
            "test": claim.test, "margin": claim.margin, "verdict": "not measured", "unit": unit_of(claim.where.get("metric", "")),
        }  # fmt: skip
        if row is not None:
            record |= {
                name: row[name]
                for name in ("estimate", "low", "high", "n", "replicates", "estimate_by_replicate")
                if name in row
            }
            record["verdict"] = decide(claim.test, claim.margin, row["low"], row["high"])
            ends = [row.get(f"{end}_by_replicate", "") for end in ("low", "high")]
            lows, highs = (end.split("|") if isinstance(end, str) and end else [] for end in ends)
            single = [
                decide(claim.test, claim.margin, float(a), float(b))
                for a, b in zip(lows, highs, strict=True)
            ]
            record["verdict_by_replicate"] = "|".join(single)
        records.append(record)
    return pd.DataFrame.from_records(records).reindex(columns=COLUMNS)


def sentence(row: pd.Series) -> str:
    """One verdict for people."""
    if row["verdict"] == "not measured":
        return f"not measured    {row['says']} {_condition(row)}"
    alone = marks(row)
    worlds = f"; replicates alone: {alone}" if len(alone) > 1 else ""
    return f"{row['verdict']:15} {row['says']} {_condition(row)}{numbers(row, '.3f')}, needs {needs(row)}{worlds}"


def numbers(row: pd.Series, form: str) -> str:
    """Estimate and interval, the numbers in this format; what is exact has no interval."""
    if row["low"] == row["high"]:
        return f"{row['estimate']:.3g}"
    estimate, low, high = (told(row[name], row["unit"], form) for name in ENDS)
    return f"{estimate} [{low}, {high}]"


def told(number: float, unit: str, form: str) -> str:
    """A number in this format: a difference with its sign, a ratio without."""
    return format(number, form if unit == "times" else f"+{form}")


def needs(row: pd.Series) -> str:
    """What the interval is held against, with its unit."""
    return f"{NEEDS[row['test']]} {row['margin']:g} {row['unit']}".rstrip()


def _condition(row: pd.Series) -> str:
    return f"({row['condition']}) " if row["condition"] else ""


def markdown(found: pd.DataFrame) -> str:
    """Tables for the README, a line for each claim, its verdicts in the order of the conditions, with MARKS of replicates:
    of claims that both value losses decide, with a column for each, then of the others."""
    from benchmarks.figures.style import LOSSES  # with matplotlib, which verdicts do without

    losses = LOSSES.values()
    by_loss = ["| claim | where | needs | " + " | ".join(losses) + " |", "|---|---|---|---|---|"]
    others = ["| claim | where | needs | verdict |", "|---|---|---|---|"]
    for (_, says, source), part in found.groupby(["claim", "says", "source"], sort=False):
        sides = [
            [_cell(row, loss) for _, row in part.iterrows() if loss in row["condition"].split(", ")]
            for loss in losses
        ]
        both = all(sides) and sum(map(len, sides)) == len(part)
        cells = sides if both else [[_cell(row) for _, row in part.iterrows()]]
        (by_loss if both else others).append(
            "| " + " | ".join([says, source, needs(part.iloc[0]), *map("<br>".join, cells)]) + " |"
        )
    return "\n\n".join("\n".join(table) for table in (by_loss, others) if len(table) > 2)


def _cell(row: pd.Series, loss: str = "") -> str:
    """loss: what the column says already."""
    condition = ", ".join(part for part in row["condition"].split(", ") if part != loss)
    if row["verdict"] == "not measured":
        return f"{condition}: not measured".removeprefix(": ")
    return f"{condition}: **{row['verdict']}** {numbers(row, '.2f')} {marks(row)}".removeprefix(
        ": "
    ).rstrip()


def marks(row: pd.Series) -> str:
    """What each replicate alone says, in their order; empty where there are none."""
    alone = row["verdict_by_replicate"]
    return (
        "".join(MARKS[verdict] for verdict in alone.split("|"))
        if isinstance(alone, str) and alone
        else ""
    )
