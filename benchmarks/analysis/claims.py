"""Verdicts: every claim of claims.toml held against the summary of its figure.

A claim names one row of a summary (as a rule a paired difference with its interval) and a test:
"more" than a margin, "less", "at least" as much, or "reaches", which allows the small shortfall of
TOLERANCE standard deviations of base responses in the same metric. It is reproduced where the whole
interval passes, not reproduced where all of it fails, and undecided otherwise; so is each replicate
alone. An estimate over fewer than FEWEST_PROMPTS prompts decides nothing.

A claim may name several rows ("weakest_of") and then stands or falls with the weakest. Headline
claims are asked in two metrics under up to three settings; their verdicts must also pass Holm's
test at the level of the intervals, over all headline rows of the profile. Numbers that are exact
have no interval, are decided directly and do not count there.
"""

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.analysis.estimates import (
    FEWEST_PROMPTS,
    NUMBERS,
    POOLED,
    SCORES,
    TOLERANCE,
    base_sd,
    method_key,
    pooled_family,
    prompt_count,
    reaching_margin,
)
from benchmarks.analysis.labels import (
    METRICS,
    family_label,
    listed,
    loss_label,
    metric_label,
    plural,
    share_label,
)
from benchmarks.analysis.multiplicity import holm, p_value, smallest_passing, t_statistic
from benchmarks.spec.methods import BY_NAME, drawn_in
from benchmarks.spec.model_kinds import LOSSES, ModelKind, value_kind
from benchmarks.spec.profile import Profile

SIGNS = {"more": ">", "less": "<", "at least": "≥", "reaches": "≥"}  # of each test
TOO_FEW, NOT_MEASURED = "too few prompts", "not measured"
VERDICTS = ("reproduced", "not reproduced", "undecided", TOO_FEW, NOT_MEASURED)
RANKS = {"not reproduced": 0, "undecided": 1, "reproduced": 2}
MARKS = {"reproduced": "✓", "not reproduced": "✗", "undecided": "?", TOO_FEW: "–"}
CLAIMS = Path(__file__).with_name("claims.toml")
KEY = ["claim", "condition"]
COLUMNS = [
    "headline", "title", "claim", "statement", "source", "history", "figure", "setting",
    "metric", "target_ratio", "versus", "condition", "replicate", "weakest", "test", "margin",
    "margin_in_sd", "verdict", "by_interval", "estimate", "low", "high", "p", "p_adjusted", "sd",
    "n", "replicates", "unit", "would_change", "in_readme",
]  # fmt: skip
TEXTS = (
    "condition", "unit", "setting", "metric", "title", "weakest", "would_change", "history",
    "versus",
)  # fmt: skip
POOLED_TEXTS = ("statement", "source", "history", "title", "would_change")  # in pooled rows only
HEADLINE_KEYS = ("headline", "title", "would_change", "in_readme")  # of an entry and a Claim
SHARES = ("twenty-percent-is-enough", "share-is-enough")  # claims that a share reaches dense
DENSE_GAINS = "dense-gains"  # the claim that dense steering beats the base


@dataclass(frozen=True)
class Claim:
    """One claim under one condition, in the terms of a profile.

    Attributes:
        name: Its key in claims.toml.
        statement: What is claimed, in our words.
        source: Where the paper says it.
        figure: Whose summary decides it.
        condition: Setting, family, condition and metric in words, where there are several.
        selectors: Labels that pick one row of the summary, by the name of the row; a single row has
            no name. The claim stands or falls with the weakest.
        test: "more", "less", "at least" or "reaches".
        margin: What the interval is held against; None: it follows from TOLERANCE.
        history: When it was added or changed, if that was after the first measurement.
        setting: Key of the setting; empty where the claim has none.
        headline: Number of the question that it answers; 0 in the appendix.
        title: Its short form, of a headline.
        would_change: What would change a headline's verdict.
        in_readme: Whether the README's table has it.
    """

    name: str
    statement: str
    source: str
    figure: str
    condition: str
    selectors: Mapping[str, dict]
    test: str
    margin: float | None = None
    history: str = ""
    setting: str = ""
    headline: int = 0
    title: str = ""
    would_change: str = ""
    in_readme: bool = True

    @property
    def selector(self) -> dict:
        """Labels of the first row: metric, family and share are those of all."""
        return next(iter(self.selectors.values()))

    @property
    def metric(self) -> str:
        """Name of the metric; empty where the claim names none."""
        return self.selector.get("metric", "")

    @property
    def unit(self) -> str:
        """Unit of the estimate and the margin."""
        return METRICS[self.metric].unit if self.metric in METRICS else ""

    def margin_in(self, summary: pd.DataFrame) -> float:
        """Return the margin in units of the metric.

        Args:
            summary: Summary of the figure, which has the spread of base responses.
        """
        if self.margin is not None:
            return self.margin
        return reaching_margin(summary, self.metric, self.selector.get("family", "all"))

    def spread_in(self, summary: pd.DataFrame) -> float:
        """Return the spread of base responses, of a claim about scores; else NaN.

        NaN also where they all score alike, as those of models that learned nothing may.
        """
        if self.metric not in SCORES:
            return float("nan")
        return base_sd(summary, self.metric, self.selector.get("family", "all")) or float("nan")


def read_document(path: Path = CLAIMS) -> dict:
    """Return the parsed content of claims.toml."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def claims_for(
    profile: Profile, unsupported: Collection[str] = (), path: Path = CLAIMS
) -> list[Claim]:
    """Return the claims that this profile can decide, one for each of their conditions.

    The claims are phrased for the profile's own score, families and losses. Left out are claims
    about figures, models, tuning or metrics that the profile does not have, and claims that
    coincide with an earlier one in this profile.

    Args:
        profile: Profile to decide claims of.
        unsupported: Names of figures that the profile cannot measure.
        path: File of the claims.

    Raises:
        ValueError: If a test or condition is unknown.
    """
    document = read_document(path)
    claims: dict[tuple, Claim] = {}
    for name, entry in document["claims"].items():
        if entry["test"] not in SIGNS:
            raise ValueError(
                f"{path.name}: the test of {name} must be one of {', '.join(SIGNS)}, "
                f"got {entry['test']!r}"
            )
        for kind in ("conditions", "settings"):
            for key in entry.get(kind, ()):
                if key not in document[kind]:
                    raise ValueError(f"{path.name}: {name} names the unknown {kind[:-1]} {key!r}")
        if entry["figure"] in unsupported:
            continue
        for claim in _variants(name, entry, document, profile):
            rows = str([sorted(labels.items()) for labels in claim.selectors.values()])
            claims.setdefault((claim.figure, rows, claim.test, claim.margin), claim)
    return list(claims.values())


def _variants(name: str, entry: dict, document: dict, profile: Profile) -> Iterator[Claim]:
    """Yield a claim for each setting or loss, family, condition and metric of the profile."""
    first, family = profile.losses[0], entry["selector"].get("family")
    families = {"all": [pooled_family(profile)], "each": profile.families}
    conditions = {key: document["conditions"][key] for key in entry.get("conditions", ())}
    placeholders = _placeholders(profile)
    for (setting, loss, strength), family_name, condition, metric in product(
        _settings_for(entry, document["settings"], profile),
        families.get(family, profile.families[:1]),
        conditions.values() or [{}],
        entry.get("metrics", [entry["selector"].get("metric")]),
    ):
        labels = strength | entry["selector"] | condition
        label, of_first_loss = labels.pop("label", ""), labels.pop("of_first_loss", False)
        rival = labels.pop("rival", "")
        if of_first_loss and loss != first:
            continue
        labels |= {"family": family_name} if family else {}
        labels |= {"metric": metric} if metric and "metric" not in condition else {}
        if column := entry.get("by_loss"):  # the value model, or what is fitted to it
            labels[column] = str(ModelKind(labels.get(column, "value"), loss))
        selectors = {
            part: selector
            for part, further in entry.get("weakest_of", {"": {}}).items()
            if (selector := _selector_for(labels | further, profile, part or rival)) is not None
        }
        if not selectors:
            continue
        each_family = family == "each" and len(profile.families) > 1
        several = len(profile.available_metrics(entry.get("metrics", ()))) > 1
        measured = next(iter(selectors.values())).get("metric", "")
        words = listed(
            loss_label(profile, str(value_kind(loss))) if loss else "",
            _strength_label(strength, labels),
            family_label(family_name) if each_family else "",
            label,
            metric_label(profile, measured) if several else "",
        )
        yield Claim(
            name,
            _statement(entry, profile, placeholders),
            entry["source"],
            entry["figure"],
            words,
            selectors,
            entry["test"],
            entry.get("margin"),
            entry.get("history", ""),
            setting,
            **{key: entry[key] for key in HEADLINE_KEYS if key in entry}
            | {"would_change": entry.get("would_change", "").format(**placeholders)},
        )


def _settings_for(
    entry: dict, settings: Mapping[str, dict], profile: Profile
) -> list[tuple[str, str, dict]]:
    """Return the settings of a claim that the profile has: name, loss, and labels of the strength.

    A claim that lists no settings has one unnamed setting for each loss if it is stated by loss.
    Otherwise it has the setting that figures of a single loss belong to, if any.
    """
    losses = [loss for loss in LOSSES if loss in profile.losses]
    if "settings" not in entry:
        if "by_loss" in entry:
            return [("", loss, {}) for loss in losses]
        of_first = (profile.losses[0], False) if "loss" in entry.get("of_first", ()) else ()
        usual = [
            name
            for name, setting in settings.items()
            if (setting["loss"], setting["tuned"]) == of_first
        ]
        return [("".join(usual), "", {})]
    strengths, named = [], entry.get("names_strength", True)
    for name in entry["settings"]:
        labels = dict(settings[name])
        loss, tuned = labels.pop("loss"), labels["tuned"]
        if tuned and loss not in losses:  # the one loss there is takes the place of the paper's
            loss = profile.losses[0]
        if loss in losses and (profile.sweep.tuning or not tuned):
            strengths.append((name, loss, labels if named else {}))
    return strengths


def settings_of(profile: Profile) -> dict[str, str]:
    """Return the settings that a profile has, by name, in words."""
    settings = read_document()["settings"]
    return {
        name: listed(
            loss_label(profile, str(value_kind(loss))), "best β" if labels["tuned"] else "β = 1"
        )
        for name, loss, labels in _settings_for({"settings": [*settings]}, settings, profile)
    }


def _strength_label(strength: dict, labels: dict) -> str:
    """Return the strength of a setting in words, which a claim's own labels may override."""
    if not strength:
        return ""
    return "each at its best β" if labels["tuned"] else f"β = {labels['beta']:g}"


def _selector_for(selector: dict, profile: Profile, part: str) -> dict | None:
    """Adapt a selector to the profile: its score for "judge"; None if it lacks a model or metric.

    Args:
        selector: Labels of a summary row.
        profile: Profile whose models and metrics count.
        part: Name of the row among several, which may be that of the method compared with.
    """
    named = {part, method_key(selector.get("method", ""), selector.get("search", ""))}
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


def _statement(entry: dict, profile: Profile, placeholders: Mapping[str, str]) -> str:
    """Return the statement phrased for the profile, prefixed with the family and loss it covers."""
    first = {
        "family": family_label(profile.families[0]) if len(profile.families) > 1 else "",
        "loss": loss_label(profile, str(value_kind(profile.losses[0]))),
    }
    about = listed(*(first[name] for name in entry.get("of_first", ())))
    text = entry["statement"].format(**placeholders)
    note = f" ({entry['note_of_lab']})" if profile.trains_models and "note_of_lab" in entry else ""
    text = f"{about}: {text}{note}." if about else f"{text}{note}."
    return text if text[0] == "τ" else text[0].upper() + text[1:]  # whose capital is no τ


def _placeholders(profile: Profile) -> dict[str, str]:
    """Return the texts that replace the {placeholders} of statements in claims.toml, by name."""
    sweep, sizes = profile.sweep, profile.further_sizes
    ends = map(share_label, (min(sweep.main_ratios), max(sweep.main_ratios)))
    names = {"best-of-n": f"best of {sweep.beams}", "dense": "dense steering"}
    available = [name for name, one in BY_NAME.items() if all(map(profile.has, one.needs))]
    rivals = [
        names.get(name, BY_NAME[name].label) for name in drawn_in("cost") if name in available
    ]
    shared = {"dense": "dense steering", "best-of-n": "best-of-N", "beams": "chunk beam search"}
    cheap = [label for name, label in shared.items() if name in available]
    genarm = ", and GenARM at its best β" * ("genarm" in available)
    aside = " (Transfer Q*, which costs more by an order of magnitude, left aside)"
    several_models = bool(sizes) or len(profile.families) > 1
    sized = f" ({' and '.join(sizes)} among them)" if sizes else ""
    prompts = f"{plural(sweep.rollout_prompts, 'prompt')} of each objective"
    return {
        "family": family_label(profile.families[0]),
        "claimed": " to ".join(dict.fromkeys(ends)),
        "beams": str(sweep.beams),
        "rollout_prompts": prompts + (" and replicate" if profile.replicates > 1 else ""),
        "rivals": _enumerated(rivals) + aside * ("transfer-q" in available),
        "cheap": f"{_enumerated(cheap)} of as many prompts as that cost allows, the base "
        f"answering the others{genarm}",
        "all_models": f"models{sized} and " if several_models else "",
        "each_model": f"model{' of the usual size' if sizes else ''} and " * several_models,
    }


def _enumerated(names: Sequence[str]) -> str:
    """Return names as in "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


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


def select_rows(claim: Claim, summary: pd.DataFrame, selector: dict) -> pd.DataFrame:
    """Return the row that these labels pick, then those of single replicates with an interval.

    It is empty where this profile has not measured it.

    Raises:
        LookupError: The labels fit several rows.
    """
    fits = pd.Series(True, index=summary.index)
    for name, value in selector.items():
        column = summary[name]
        fits &= column.isna() | (column == "") if value == "" else column == value
    rows = summary[fits]
    pooled = rows["replicate"] == POOLED
    if pooled.sum() > 1:
        raise LookupError(
            f"{claim.name} ({claim.condition}) fits {pooled.sum()} rows of {claim.figure}: "
            f"{selector}"
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
        summaries: Summaries of the figures that have been measured.
    """
    unsupported = [name for name, figure in figures.items() if figure.why_unsupported(profile)]
    level = profile.statistics.level
    return verdicts(summaries, claims_for(profile, unsupported), level)


def verdicts(summaries: dict[str, pd.DataFrame], claims: list[Claim], level: float) -> pd.DataFrame:
    """Return a row for each claim and condition, and for each replicate that has an interval.

    The verdict is NOT_MEASURED where a table has no such row.
    """
    records = []
    for claim in claims:
        record = vars(claim) | {"claim": claim.name, "unit": claim.unit, "replicate": POOLED}
        labels = {name: claim.selector.get(name) for name in ("target_ratio", "versus")}
        record |= labels | {"metric": claim.metric, "verdict": NOT_MEASURED}
        if claim.margin is None:
            record["margin_in_sd"] = -TOLERANCE
        records += _judge_claim(claim, summaries.get(claim.figure), record, level)
    return apply_holm(pd.DataFrame.from_records(records).reindex(columns=COLUMNS), level)


def _judge_claim(
    claim: Claim, summary: pd.DataFrame | None, record: dict, level: float
) -> list[dict]:
    """Return one claim's verdicts, pooled and by replicate, each from its weakest row there."""
    parts = {
        name: pd.DataFrame() if summary is None else select_rows(claim, summary, selector)
        for name, selector in claim.selectors.items()
    }
    if any(rows.empty for rows in parts.values()):
        return [record]
    margin, records = claim.margin_in(summary), []
    record |= {"margin": margin, "sd": claim.spread_in(summary)}
    rows = {name: part.set_index("replicate", drop=False) for name, part in parts.items()}
    for replicate in next(iter(rows.values())).index:
        if not all(replicate in part.index for part in rows.values()):
            continue
        statistics = {
            name: _statistic(claim.test, margin, part.loc[replicate], level)
            for name, part in rows.items()
        }
        decided = {
            name: decide(claim.test, margin, *part.loc[replicate, ["low", "high"]])
            for name, part in rows.items()
        }
        # intervals need not be symmetric: their verdicts go before the standard errors
        weakest = min(statistics, key=lambda name: (RANKS[decided[name]], statistics[name][0]))
        row, pooled = rows[weakest].loc[replicate], rows[weakest].iloc[0]
        alone, prompts = replicate != POOLED, prompt_count(pooled, summary)
        verdict = decided[weakest]
        if prompts / (pooled["replicates"] if alone else 1) < FEWEST_PROMPTS:
            verdict = TOO_FEW
        numbers = {name: row.get(name) for name in ("replicate", *NUMBERS, "n", "replicates")}
        counts = not alone and row["low"] != row["high"] and verdict != TOO_FEW
        if claim.headline and counts:
            numbers["p"] = p_value(*statistics[weakest], len(parts))
        of_claim = {k: v for k, v in record.items() if not (alone and k in POOLED_TEXTS)}
        records.append(of_claim | numbers | {"weakest": weakest, "verdict": verdict})
    return records


def _statistic(test: str, margin: float, row: pd.Series, level: float) -> tuple[float, float]:
    """Return by how many standard errors a row passes its test, and the degrees of freedom."""
    passes_by = (row["estimate"] - margin) * (-1 if test == "less" else 1)
    width = row["high"] - row["low"]
    if width == 0:
        return passes_by * float("inf") if passes_by else 0.0, float("inf")
    replicates = row.get("replicates", 1)
    return t_statistic(passes_by, width, 1 if pd.isna(replicates) else replicates, level)


def apply_holm(verdicts: pd.DataFrame, level: float) -> pd.DataFrame:
    """Add Holm's adjusted p values, and turn verdicts that they do not support into "undecided".

    `by_interval` keeps what the interval alone decides.
    """
    counted = verdicts["p"].notna()
    p_adjusted = pd.Series(float("nan"), index=verdicts.index)
    p_adjusted[counted] = holm(verdicts.loc[counted, "p"])
    open_ = counted & ~(p_adjusted < 1 - level)
    return verdicts.assign(
        p_adjusted=p_adjusted,
        by_interval=verdicts["verdict"],
        verdict=verdicts["verdict"].mask(open_, "undecided"),
    )


def smallest_shares(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return the smallest share of tokens that reaches dense steering, by setting and metric.

    A fixed-sequence test from the largest share down, by the intervals as they are: column
    `smallest`, missing where even the largest share fails; `shares`, those that were measured;
    `dense_loses`, as in `pooled_verdicts`.

    Args:
        verdicts: As `pooled_verdicts` returns them.
    """
    rows = verdicts[verdicts["claim"].isin(SHARES) & verdicts["low"].notna()]
    records = []
    for (setting, metric), tested in rows.groupby(["setting", "metric"], sort=False):
        passed = [
            (row.target_ratio, decide(row.test, row.margin, row.low, row.high) == "reproduced")
            for row in tested.itertuples()
        ]
        shares = sorted(tested["target_ratio"])
        records.append(
            {
                "setting": setting,
                "metric": metric,
                "smallest": smallest_passing(passed),
                "shares": ", ".join(map(share_label, shares)),
                "dense_loses": bool(tested["dense_loses"].any()),
            }
        )
    return pd.DataFrame.from_records(
        records, columns=["setting", "metric", "smallest", "shares", "dense_loses"]
    )


def read_verdicts(path: Path) -> pd.DataFrame:
    """Return the `pooled_verdicts` of a claims.csv.

    Raises:
        ValueError: The file is damaged, or was written by other code.
    """
    try:
        verdicts = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): make claims writes it anew") from error
    if lacking := [name for name in COLUMNS if name not in verdicts]:
        raise ValueError(
            f"{path} lacks the column {lacking[0]} (damaged, or of other code): make claims writes "
            "it anew"
        )
    return pooled_verdicts(verdicts)


def pooled_verdicts(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return the pooled verdicts; `marks` and `alone` hold the verdict and estimate by replicate.

    Verdicts of too few prompts have no marks, since a single replicate has fewer prompts still.
    `dense_loses` tells of claims to reach dense steering where that is worse than the base model;
    `left_open` is that of the function of this name.
    """
    texts = {name: verdicts[name].astype(object).fillna("") for name in TEXTS}
    verdicts = verdicts.assign(**texts)
    pooled = verdicts["replicate"] == POOLED
    alone = verdicts[~pooled].assign(marks=verdicts["verdict"].map(MARKS))
    of_each = alone.groupby(KEY).agg(marks=("marks", "sum"), alone=("estimate", tuple))
    joined = verdicts[pooled].merge(of_each, how="left", left_on=KEY, right_index=True)
    decided = joined["verdict"] != TOO_FEW
    marks = joined["marks"].astype(object).where(decided).fillna("")
    estimates = [each if isinstance(each, tuple) else () for each in joined["alone"]]
    loses = (joined["claim"] == DENSE_GAINS) & (joined["verdict"] == "not reproduced")
    places = pd.MultiIndex.from_frame(joined[["setting", "metric"]])
    reaches_dense = (joined["versus"] == "dense") & (joined["test"] == "reaches")
    further = {
        "marks": marks,
        "alone": estimates,
        "dense_loses": reaches_dense & places.isin(places[loses]),
        "left_open": left_open(joined),
    }
    return joined.assign(**further).reset_index(drop=True)


def is_decided(row: pd.Series) -> bool:
    """Return whether the verdict rests on an estimate."""
    return row["verdict"] not in (TOO_FEW, NOT_MEASURED)


def left_open(verdicts: pd.DataFrame) -> pd.Series:
    """Return which verdicts the interval alone decides and Holm's test leaves undecided."""
    return verdicts["verdict"] != verdicts["by_interval"]


def tested_rows(verdicts: pd.DataFrame) -> int:
    """Return the number of verdicts that Holm's test corrects for."""
    return int(verdicts["p"].notna().sum())


def dagger(dense_loses: bool) -> str:
    """Return the mark of claims to reach dense steering where that loses, or nothing."""
    return " †" if dense_loses else ""


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
    """Return a number in this format: a difference with its sign, a ratio or share without."""
    return format(number, f"+z{form}" if unit not in ("times", "") else form)


def p_text(p: float) -> str:
    """Return an adjusted p value in three digits, four around 0.05; empty where there is none."""
    if pd.isna(p):
        return ""
    if p < 0.0005:
        return "< 0.001"
    digits = 4 if abs(p - 0.05) < 0.0005 else 3
    return f"{p:.{digits}f}"


def source_text(row: pd.Series) -> str:
    """Return where the paper says it, and when the claim was added or changed, if later."""
    return f"{row['source']}{'; ' if row['history'] else ''}{row['history']}"


def criterion(row: pd.Series) -> str:
    """Return the criterion that the interval must meet, with its unit."""
    sign, share = SIGNS[row["test"]], row["margin_in_sd"]
    if pd.isna(row["margin"]):  # not measured: what the share comes to is not known
        return f"{sign} {share:g} SD of base responses"
    in_unit = f"{sign} {row['margin']:.2g} {row['unit']}".rstrip().replace(" times", "×")
    return in_unit if pd.isna(share) else f"{in_unit} ({share:g} SD of base responses)"
