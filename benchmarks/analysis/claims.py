"""Verdicts: every claim of claims.toml held against the summary of its figure.

A claim names one row of a summary (as a rule a paired difference with its interval) and a test:
"more" than a margin, "less", "at least" as much, or "reaches", which allows the small shortfall of
TOLERANCE standard deviations of base responses in the same metric. It is reproduced where the whole
interval passes, not reproduced where all of it fails, and undecided otherwise; so is each replicate
alone. An estimate over fewer than FEWEST_PROMPTS prompts decides nothing.
"""

import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.analysis.estimates import (
    FEWEST_PROMPTS,
    NUMBERS,
    POOLED,
    TOLERANCE,
    display_name,
    pooled_family,
    prompts_behind,
    reaching_margin,
)
from benchmarks.analysis.labels import METRICS, family_label, listed, loss_label, plural
from benchmarks.spec.methods import BY_NAME, drawn_in
from benchmarks.spec.model_kinds import LOSSES, ModelKind, value_kind
from benchmarks.spec.profile import Profile

SIGNS = {"more": ">", "less": "<", "at least": "≥", "reaches": "≥"}  # of each test
TOO_FEW, NOT_MEASURED = "too few prompts", "not measured"
VERDICTS = ("reproduced", "not reproduced", "undecided", TOO_FEW, NOT_MEASURED)
MARKS = {"reproduced": "✓", "not reproduced": "✗", "undecided": "?", TOO_FEW: "–"}
CLAIMS = Path(__file__).with_name("claims.toml")
KEY = ["claim", "condition"]
COLUMNS = [
    "claim", "statement", "source", "added_later", "figure", "condition", "replicate", "test",
    "margin", "margin_in_sd", "verdict", "estimate", "low", "high", "n", "replicates", "unit",
]  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """One claim under one condition, in the terms of a profile.

    Attributes:
        name: Its key in claims.toml.
        variant: Loss and condition by their keys.
        statement: What is claimed, in our words.
        source: Where the paper says it.
        figure: Whose summary decides it.
        condition: Loss, family and condition in words, where there are several.
        selector: Labels that pick one row of the summary.
        test: "more", "less", "at least" or "reaches".
        margin: What the interval is held against; None: it follows from TOLERANCE.
        added_later: Whether it was written after the first measurement.
    """

    name: str
    variant: str
    statement: str
    source: str
    figure: str
    condition: str
    selector: dict
    test: str
    margin: float | None = None
    added_later: bool = False

    @property
    def unit(self) -> str:
        """Unit of the estimate and the margin."""
        metric = self.selector.get("metric")
        return METRICS[metric].unit if metric in METRICS else ""

    def margin_in(self, summary: pd.DataFrame) -> float:
        """Return the margin in units of the metric.

        Args:
            summary: Summary of the figure, which has the spread of base responses.
        """
        if self.margin is not None:
            return self.margin
        family = self.selector.get("family", "all")
        return reaching_margin(summary, self.selector["metric"], family)


def read_document(path: Path = CLAIMS) -> dict:
    """Return claims.toml as it is."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def claims_for(
    profile: Profile, unsupported: Collection[str] = (), path: Path = CLAIMS
) -> list[Claim]:
    """Return the claims that this profile can decide, once for each of their conditions.

    They are about its own score, families and losses. Without the `unsupported` figures, without
    models, tuning and metrics that it does not have, and without a claim that asks of this profile
    what an earlier one does.

    Raises:
        ValueError: A test or condition is unknown.
    """
    document = read_document(path)
    conditions, claims = document["conditions"] | {"": {"label": ""}}, {}
    for name, entry in document["claims"].items():
        if entry["test"] not in SIGNS:
            raise ValueError(
                f"{path.name}: the test of {name} must be one of {', '.join(SIGNS)}, "
                f"got {entry['test']!r}"
            )
        for key in entry.setdefault("conditions", [""]):
            if key not in conditions:
                raise ValueError(f"{path.name}: {name} names the unknown condition {key!r}")
        if entry["figure"] in unsupported:
            continue
        for claim in _variants(name, entry, conditions, profile):
            row = tuple(sorted(claim.selector.items()))
            claims.setdefault((claim.figure, row, claim.test, claim.margin), claim)
    return list(claims.values())


def _variants(name: str, entry: dict, conditions: dict, profile: Profile) -> Iterator[Claim]:
    """Yield a claim for each loss, family and condition of the profile that it can decide."""
    losses = [loss for loss in LOSSES if loss in profile.losses]
    first, column, family = profile.losses[0], entry.get("by_loss"), entry["selector"].get("family")
    families = {"all": [pooled_family(profile)], "each": profile.families}
    for loss, family_name, key in product(
        losses if column else [""],
        families.get(family, profile.families[:1]),
        entry["conditions"],
    ):
        labels = dict(conditions[key])
        label, of_first_loss = labels.pop("label"), labels.pop("of_first_loss", False)
        selector = entry["selector"] | labels
        selector |= {"family": family_name} if family else {}
        if column:  # the value model, or what is fitted to it
            selector |= {column: str(ModelKind(selector.get(column, "value"), loss))}
        selector = _in_terms_of(selector, profile)
        if selector is None or (of_first_loss and loss != first):
            continue
        each_family = family == "each" and len(profile.families) > 1
        condition = listed(
            loss_label(profile, str(value_kind(loss))),
            family_label(family_name) if each_family else "",
            label,
        )
        yield Claim(
            name,
            " ".join(filter(None, (loss, key))),
            _statement(entry, profile),
            entry["source"],
            entry["figure"],
            condition,
            selector,
            entry["test"],
            entry.get("margin"),
            entry.get("added_later", False),
        )


def _in_terms_of(selector: dict, profile: Profile) -> dict | None:
    """Return the selector with the profile's score; None if it lacks what is compared."""
    named = {display_name(selector.get("method", ""), selector.get("search", ""))}
    loss = ModelKind.parse(selector.get("value_model", "")).loss
    needed = [
        kind for name in {*named, selector.get("versus")} & BY_NAME.keys()
        for kind in BY_NAME[name].models(loss)
    ]  # fmt: skip
    if not all(map(profile.has, needed)) or (selector.get("tuned") and not profile.sweep.tuning):
        return None
    if "metric" in selector:
        metrics = profile.available_metrics((selector["metric"],))
        return selector | {"metric": metrics[0]} if metrics else None
    return selector


def _statement(entry: dict, profile: Profile) -> str:
    """Return the statement in the profile's terms: what it is about first, notes of the lab."""
    first = {
        "family": family_label(profile.families[0]) if len(profile.families) > 1 else "",
        "loss": loss_label(profile, str(value_kind(profile.losses[0]))),
    }
    about = listed(*(first[name] for name in entry.get("of_first", ())))
    text = entry["statement"].format(**_facts(profile))
    note = f" ({entry['note_of_lab']})" if profile.trains_models and "note_of_lab" in entry else ""
    text = f"{about}: {text}{note}." if about else f"{text}{note}."
    return text[0].upper() + text[1:]


def _facts(profile: Profile) -> dict[str, str]:
    """Return what statements say of the profile, by the names that claims.toml uses."""
    sweep, sizes = profile.sweep, profile.further_sizes
    ends = (f"{share:.0%}" for share in (min(sweep.main_ratios), max(sweep.main_ratios)))
    names = {"best-of-n": f"best of {sweep.beams}", "dense": "dense steering"}
    *rivals, last = (
        names.get(name, BY_NAME[name].label)
        for name in drawn_in("cost")
        if all(map(profile.has, BY_NAME[name].needs))
    )
    aside = " (Transfer Q*, which costs more by an order of magnitude, left aside)"
    several_models = bool(sizes) or len(profile.families) > 1
    sized = f" ({' and '.join(sizes)} among them)" if sizes else ""
    prompts = f"{plural(sweep.rollout_prompts, 'prompt')} of each objective"
    return {
        "family": family_label(profile.families[0]),
        "claimed": " to ".join(dict.fromkeys(ends)),
        "beams": str(sweep.beams),
        "rollout_prompts": prompts + (" and replicate" if profile.replicates > 1 else ""),
        "rivals": " and ".join(filter(None, (", ".join(rivals), last)))
        + aside * all(map(profile.has, BY_NAME["transfer-q"].needs)),
        "all_models": f"models{sized} and " if several_models else "",
        "each_model": f"model{' of the usual size' if sizes else ''} and " * several_models,
    }


def decide(test: str, margin: float, low: float, high: float) -> str:
    """Return "reproduced", "not reproduced" or "undecided", from the ends of an interval."""
    equal_passes = SIGNS[test] == "≥"
    if test == "less":
        low, high, margin = -high, -low, -margin
    if low > margin or (equal_passes and low == margin):
        return "reproduced"
    if high < margin or (not equal_passes and high == margin):
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


def judge(
    profile: Profile, figures: Mapping[str, Any], summaries: dict[str, pd.DataFrame]
) -> pd.DataFrame:
    """Return the verdicts on all claims that a profile can decide; see `verdicts`.

    Args:
        profile: Settings of the tables.
        figures: All figures by name (`benchmarks.figures.base.Figure`).
        summaries: Of those that have been measured.
    """
    unsupported = [name for name, figure in figures.items() if figure.why_unsupported(profile)]
    return verdicts(summaries, claims_for(profile, unsupported))


def verdicts(summaries: dict[str, pd.DataFrame], claims: list[Claim]) -> pd.DataFrame:
    """Return a row for each claim and condition, and for each replicate that has an interval.

    The verdict is NOT_MEASURED where a table has no such row.
    """
    records = []
    for claim in claims:
        record = vars(claim) | {"claim": claim.name, "unit": claim.unit, "replicate": POOLED}
        record |= {"verdict": NOT_MEASURED}
        if claim.margin is None:
            record["margin_in_sd"] = -TOLERANCE
        summary = summaries.get(claim.figure)
        rows = pd.DataFrame() if summary is None else select_rows(claim, summary)
        if rows.empty:
            records.append(record)
            continue
        record["margin"] = claim.margin_in(summary)
        prompts = prompts_behind(rows.iloc[0], summary)
        for row in rows.to_dict("records"):
            numbers = {name: row.get(name) for name in ("replicate", *NUMBERS, "n", "replicates")}
            parts = 1 if row["replicate"] == POOLED else rows["replicates"].max()
            verdict = decide(claim.test, record["margin"], row["low"], row["high"])
            too_few = prompts / parts < FEWEST_PROMPTS
            records.append(record | numbers | {"verdict": TOO_FEW if too_few else verdict})
    return pd.DataFrame.from_records(records).reindex(columns=COLUMNS)


def pooled_verdicts(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return the verdicts over all replicates; column `marks`: what each replicate alone says.

    Beside a verdict of too few prompts nothing is said of replicates, which have fewer still.
    """
    texts = {name: verdicts[name].astype(object).fillna("") for name in ("condition", "unit")}
    verdicts = verdicts.assign(**texts)
    pooled = verdicts["replicate"] == POOLED
    alone = verdicts[~pooled].assign(marks=verdicts["verdict"].map(MARKS))
    marks = alone.groupby(KEY)["marks"].sum()
    joined = verdicts[pooled].merge(marks, how="left", left_on=KEY, right_index=True)
    decided = joined["verdict"] != TOO_FEW
    marks = joined["marks"].astype(object).where(decided).fillna("")
    return joined.assign(marks=marks).reset_index(drop=True)


def is_decided(row: pd.Series) -> bool:
    """Return whether there is an estimate that the verdict follows from."""
    return row["verdict"] not in (TOO_FEW, NOT_MEASURED)


def verdict_line(row: pd.Series) -> str:
    """Return one verdict of `pooled_verdicts` in words."""
    condition = f" ({row['condition']})" if row["condition"] else ""
    claim = f"{row['verdict']:15} {row['statement']}{condition}"
    if not is_decided(row):
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
    sign, share = SIGNS[row["test"]], row["margin_in_sd"]
    if pd.isna(row["margin"]):  # not measured: what the share comes to is not known
        return f"{sign} {share:g} SD of base responses"
    in_unit = f"{sign} {row['margin']:.2g} {row['unit']}".rstrip()
    return in_unit if pd.isna(share) else f"{in_unit} ({share:g} SD of base responses)"
