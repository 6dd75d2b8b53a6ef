"""Verdicts: every claim of claims.toml held against the summary of its figure.

A claim names one row of a summary (as a rule a paired difference with its interval) and a test:
"more" than a margin, "less", or "at least" as much. It is reproduced where the whole interval
passes, not reproduced where all of it fails, and undecided otherwise; so is each replicate alone.
"""

import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from benchmarks.analysis.estimates import NUMBERS, POOLED
from benchmarks.analysis.labels import LOSSES, METRICS
from benchmarks.spec.model_kinds import value_kind
from benchmarks.spec.profile import JUDGE_METRICS, Profile

SIGNS = {"more": ">", "less": "<", "at least": "≥"}  # of each test
FAMILY_CONDITIONS = ("Qwen3", "Llama")  # that are about one family
VERDICTS = ("reproduced", "not reproduced", "undecided", "not measured")
MARKS = {"reproduced": "✓", "not reproduced": "✗", "undecided": "?"}
CLAIMS = Path(__file__).with_name("claims.toml")
KEY = ["claim", "condition"]
COLUMNS = [
    "claim", "statement", "source", "added_later", "figure", "condition", "replicate", "test",
    "margin", "verdict", "estimate", "low", "high", "n", "replicates", "unit",
]  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One claim under one condition.

    Attributes:
        name: Its key in claims.toml.
        statement: What is claimed, in our words.
        source: Where the paper says it.
        figure: Whose summary decides it.
        condition: The setting, in words; empty if there is one alone.
        selector: Labels that pick one row of the summary.
        test: "more", "less" or "at least".
        margin: What the interval is held against.
        added_later: Whether it was written after the first measurement.
        statement_of_given_models: Statement for profiles of the Hub; empty where it is the same.
    """

    name: str
    statement: str
    source: str
    figure: str
    condition: str
    selector: dict
    test: str
    margin: float
    added_later: bool = False
    statement_of_given_models: str = ""

    @property
    def unit(self) -> str:
        """Unit of the estimate and the margin."""
        metric = self.selector.get("metric")
        return METRICS[metric].unit if metric in METRICS else ""


def read_document(path: Path = CLAIMS) -> dict:
    """Return claims.toml as it is."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """Return each claim, once for each of its conditions.

    Raises:
        ValueError: A test or condition is unknown.
    """
    document, claims = read_document(path), []
    conditions = document["conditions"] | {"": {"label": ""}}
    for name, entry in document["claims"].items():
        if entry["test"] not in SIGNS:
            raise ValueError(
                f'{path.name}: the test of {name} must be "more", "less" or "at least", '
                f"got {entry['test']!r}"
            )
        for key in entry.pop("conditions", [""]):
            if key not in conditions:
                raise ValueError(f"{path.name}: {name} names the unknown condition {key!r}")
            labels = dict(conditions[key])
            claim = Claim(name, condition=labels.pop("label"), **entry)
            claims.append(replace(claim, selector=claim.selector | labels))
    return claims


def claims_for(profile: Profile, unsupported: Collection[str] = ()) -> list[Claim]:
    """Return the claims that this profile can decide.

    For models of the Hub: in their own score and family, without losses and tuning that they do not
    have, without what only the lab has, and without the `unsupported` figures.
    """
    if profile.trains_models:
        return read_claims()
    adapted = (
        _adapted(claim, profile) for claim in read_claims() if claim.figure not in unsupported
    )
    return [claim for claim in adapted if claim is not None]


def _adapted(claim: Claim, profile: Profile) -> Claim | None:
    """Return the claim in terms of a profile of the Hub; None where that cannot decide it."""
    (family,), selector = profile.families, dict(claim.selector)
    if selector.get("metric") == "judge":
        selector["metric"] = profile.score
    requested = selector.get("family", family)
    if requested == "all" or (requested != family and claim.condition not in FAMILY_CONDITIONS):
        selector["family"] = requested = family
    value_models = {selector.get(name) for name in ("value_model", "versus_value_model")}
    undecided = (
        value_models & {*LOSSES} - {str(value_kind(loss)) for loss in profile.losses}
        or (selector.get("tuned") and not profile.sweep.tuning)
        or requested != family
        or selector.get("metric") in JUDGE_METRICS
        or selector.get("versus") == "instruct-reward"
    )
    if undecided:
        return None
    statement = claim.statement_of_given_models or claim.statement
    return replace(claim, selector=selector, statement=statement)


def decide(test: str, margin: float, low: float, high: float) -> str:
    """Return "reproduced", "not reproduced" or "undecided", from the ends of an interval."""
    if test == "less":
        low, high, margin = -high, -low, -margin
    if low > margin or (test == "at least" and low == margin):
        return "reproduced"
    if high < margin or (test != "at least" and high == margin):
        return "not reproduced"
    return "undecided"


def select_rows(claim: Claim, summary: pd.DataFrame) -> pd.DataFrame:
    """Return the row that the claim is about, then those of single replicates with an interval.

    It is empty where this profile has not measured it.

    Raises:
        LookupError: The selector fits several rows.
    """
    fits = pd.Series(True, index=summary.index)
    for name, value in claim.selector.items():
        column = summary[name]
        fits &= column.isna() | (column == "") if value == "" else column == value
    rows = summary[fits]
    pooled = rows["replicate"] == POOLED
    if pooled.sum() > 1:
        raise LookupError(
            f"{claim.name} ({claim.condition}) fits {pooled.sum()} rows of {claim.figure}: "
            f"{claim.selector}"
        )
    alone = rows[~pooled & rows["low"].notna()]
    return pd.concat([rows[pooled], alone.sort_values("replicate")])


def verdicts(summaries: dict[str, pd.DataFrame], claims: list[Claim]) -> pd.DataFrame:
    """Return a row for each claim and condition, and for each replicate that has an interval.

    The verdict is "not measured" where a table has no such row.
    """
    records = []
    for claim in claims:
        record = vars(claim) | {"claim": claim.name, "unit": claim.unit, "replicate": POOLED}
        record["verdict"] = "not measured"
        summary = summaries.get(claim.figure)
        rows = pd.DataFrame() if summary is None else select_rows(claim, summary)
        for row in rows.to_dict("records"):
            numbers = {name: row.get(name) for name in ("replicate", *NUMBERS, "n", "replicates")}
            verdict = decide(claim.test, claim.margin, row["low"], row["high"])
            records.append(record | numbers | {"verdict": verdict})
        if rows.empty:
            records.append(record)
    return pd.DataFrame.from_records(records).reindex(columns=COLUMNS)


def pooled_verdicts(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return the verdicts over all replicates; column `marks`: what each replicate alone says."""
    texts = {name: verdicts[name].astype(object).fillna("") for name in ("condition", "unit")}
    verdicts = verdicts.assign(**texts)
    pooled = verdicts["replicate"] == POOLED
    alone = verdicts[~pooled].assign(marks=verdicts["verdict"].map(MARKS))
    marks = alone.groupby(KEY)["marks"].sum()
    joined = verdicts[pooled].merge(marks, how="left", left_on=KEY, right_index=True)
    return joined.assign(marks=joined["marks"].astype(object).fillna("")).reset_index(drop=True)


def verdict_line(row: pd.Series) -> str:
    """Return one verdict of `pooled_verdicts` in words."""
    condition = f" ({row['condition']})" if row["condition"] else ""
    claim = f"{row['verdict']:15} {row['statement']}{condition}"
    if row["verdict"] == "not measured":
        return claim
    alone = f"; replicates alone: {row['marks']}" if row["marks"] else ""
    return f"{claim} {interval_text(row, '.3f')}, needs {criterion(row)}{alone}"


def interval_text(row: pd.Series, form: str) -> str:
    """Return estimate and interval, the numbers in this format; what is exact has no interval."""
    if row["low"] == row["high"]:
        return f"{row['estimate']:.3g}"
    estimate, low, high = (number_text(row[name], row["unit"], form) for name in NUMBERS)
    return f"{estimate} [{low}, {high}]"


def number_text(number: float, unit: str, form: str) -> str:
    """Return a number in this format: a difference with its sign, a ratio without."""
    return format(number, form if unit == "times" else f"+{form}")


def source_text(row: pd.Series) -> str:
    """Return where the paper says it, and whether the claim was added later."""
    return f"{row['source']}{', added later' if row['added_later'] else ''}"


def criterion(row: pd.Series) -> str:
    """Return what the interval is held against, with its unit."""
    return f"{SIGNS[row['test']]} {row['margin']:g} {row['unit']}".rstrip()
