"""Verdicts for readers: docs/results.md has them all, a table in the README one of each question.

`make claims` writes both.
"""

import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd

from benchmarks.analysis.claims import (
    DENSE_GAINS,
    MARKS,
    TOO_FEW,
    VERDICTS,
    criterion,
    dagger,
    interval_text,
    is_decided,
    p_text,
    read_document,
    settings_of,
    smallest_shares,
    source_text,
    tested_rows,
)
from benchmarks.analysis.estimates import TOLERANCE, pooled
from benchmarks.analysis.intervals import interval_kind
from benchmarks.analysis.labels import (
    METRICS,
    WEAKEST,
    family_label,
    metric_label,
    objective_label,
    plural,
    share_label,
    with_minus,
)
from benchmarks.analysis.multiplicity import needed_distances
from benchmarks.analysis.tables import folder
from benchmarks.figures.registry import FIGURES
from benchmarks.report import editions, forest
from benchmarks.report.render import pictures_of
from benchmarks.runtime.files import write_text
from benchmarks.runtime.fingerprints import ROOT
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import Profile, load_profile

RESULTS_PAGE, README = ROOT / "docs" / "results.md", ROOT / "README.md"
BEGIN, END = "<!-- headline: written by make claims -->", "<!-- end of headline -->"
CLOSING = Path(__file__).with_name("closing.md.j2")
WIDTH = 110  # characters of a line of text

HEAD = """# Results of the lab

Written by `make claims` from the committed tables; not edited by hand.
"""
READING = (
    "The headline claims are decided in two metrics, the judge's score and the evaluation reward, "
    "under up to three settings: {settings}. A verdict is *reproduced* if the whole interval meets "
    "the criterion, *not reproduced* if none of it does, and *undecided* otherwise. Headline "
    "verdicts must also pass Holm's test at {alpha:.0%} over all {rows} headline rows with an "
    "interval. To *reach* another method means at most {tolerance:g} standard deviations (SD) of "
    "base responses below it, in the same metric; to *beat* it means more than 0 "
    "([method](method.md#intervals-and-verdicts)). Marks: ✓ reproduced, ✗ not reproduced, "
    "? undecided, – too few prompts; (✓) and (✗): so by the interval alone, undecided by Holm's "
    'test. "Worlds" gives the verdict of each replicate alone. †: dense steering itself scores '
    "below the base model there, so that reaching it is no merit."
)
POWER = (
    "Over {worlds} worlds the interval alone decides a row whose estimate lies {alone:.1f} "
    "standard errors from the margin, and Holm's test passes its first row only at {first:.1f}. A "
    'row may therefore be undecided although every world agrees: "by its interval" tells what the '
    "interval alone decides."
)
DECIDED = ("reproduced", "not reproduced", "undecided")
GROUPS = {  # of headline claims, by the kinds of verdicts that they have in all cases
    ("reproduced",): "Reproduced in every case",
    ("not reproduced",): "Not reproduced in any case",
    ("reproduced", "not reproduced"): "Depends on setting or metric",
    ("reproduced", "undecided"): "Reproduced in some cases, undecided in others",
    ("not reproduced", "undecided"): "Not reproduced in some cases, undecided in others",
    ("reproduced", "not reproduced", "undecided"): "Depends on setting or metric",
    ("undecided",): "Undecided in every case",
}
GAINS = {DENSE_GAINS: "dense", "twenty-percent-gains": "SIA at 20%"}  # claims
CLEAR = tuple(GROUPS.values())[:2]  # groups that the README names
EDITIONS = """## What depends on the tokens of the lab

In the first edition of the lab (profile `lab-words`) every word is a token, true statements have no
synonyms, errors may happen at any word of a sentence, and responses are shorter. Few steps
therefore have low entropy, and 20% of the tokens are a different 20%. The first edition has only
two worlds, so its intervals are wide: where its verdict is undecided, compare the estimates. The
claims of figures 1 and 2 that both editions measure:
"""
ACCEPTED = ("sure_steps", "uncertain_steps", "entropy_p80")
CORRELATED = {  # models that score responses
    "reward": "reward model",
    "evaluation-reward": "evaluation reward",
    "value-mean": "values, paper's loss",
    "value-token": "values, per-token loss",
}
FITTED = (  # of the gate and heads
    "fitted_prompts", "predictor_captured_20", "q_head_explained", "vocabulary_head_explained",
)  # fmt: skip
COLUMNS = ["case", "verdict", "estimate [interval]", "in SD", "needs", "adjusted p", "worlds"]


def write(profile: Profile, verdicts: pd.DataFrame) -> None:
    """Write docs/results.md and the table of the README."""
    write_text(RESULTS_PAGE, results_page(profile, verdicts))
    write_text(README, with_headline(README.read_text(encoding="utf-8"), profile, verdicts))


def results_page(profile: Profile, verdicts: pd.DataFrame) -> str:
    """Return the page in Markdown: headline verdicts, a section for each question, the appendix.

    Args:
        profile: Whose pictures are shown.
        verdicts: As `claims.pooled_verdicts` returns them.
    """
    headline = verdicts[verdicts["headline"] > 0]
    reading = READING.format(
        settings="; ".join(settings_of(profile).values()),
        alpha=1 - profile.statistics.level,
        rows=tested_rows(headline),
        tolerance=TOLERANCE,
    )
    parts = [HEAD, *_picture(profile, forest.NAME, "Headline verdicts")]
    parts += [findings(profile, verdicts), _wrapped(reading), *_power(profile, headline)]
    parts.append(headline_table(profile, headline))
    for number, question in read_document()["questions"].items():
        parts += _section(profile, number, question, verdicts)
        if number == "1":
            parts.append(shares_table(profile, verdicts))
    parts += _lab_facts(profile)
    if picture := _picture(profile, editions.NAME, "Verdicts of both editions of the lab"):
        parts += [EDITIONS, *picture]
    parts += [
        _fill_placeholders(CLOSING.read_text(encoding="utf-8"), verdicts),
        "## Appendix: all other claims\n",
    ]
    return "\n".join([*parts, appendix(verdicts[verdicts["headline"] == 0])])


def _power(profile: Profile, headline: pd.DataFrame) -> list[str]:
    """Return a paragraph on what this number of worlds can decide; none for a single one."""
    worlds = headline["replicates"].max()
    if not worlds > 1:
        return []
    level = profile.statistics.level
    alone, first = needed_distances(level, tested_rows(headline), int(worlds))
    return [_wrapped(POWER.format(worlds=int(worlds), alone=alone, first=first))]


def findings(profile: Profile, verdicts: pd.DataFrame, in_readme: bool = False) -> str:
    """Summarise headline verdicts in Markdown: counts, gains, and a line for each group of claims.

    Args:
        profile: Names settings and metrics.
        verdicts: As `claims.pooled_verdicts` returns them.
        in_readme: Whether to name only clear groups, and only claims of the README's table.
    """
    headline = verdicts[verdicts["headline"] > 0]
    named = headline[headline["in_readme"].astype(bool)] if in_readme else headline
    shown = CLEAR if in_readme else GROUPS.values()
    groups: dict[str, list[str]] = {group: [] for group in GROUPS.values()}
    for title, rows in named.groupby("title", sort=False):
        kinds = tuple(kind for kind in DECIDED if (rows["verdict"] == kind).any())
        if group := GROUPS.get(kinds, ""):
            cases = f"{rows['verdict'].isin(DECIDED).sum()}{_only_setting(profile, rows)}"
            groups[group].append(f"{_escaped(title)} ({cases})")
    claims = plural(headline["claim"].nunique(), "claim")
    claims += f" ({named['claim'].nunique()} of them below)" * in_readme
    lines = [f"{_counts(headline)}, on {claims}. {_left_open(headline)}{_scope(headline)}"]
    lines += _gains(profile, verdicts)
    lines += [
        f"{name}: {'; '.join(groups[name])}." for name in groups if name in shown and groups[name]
    ]
    return "".join(_wrapped(f"- {line}", "  ") for line in lines)


def _only_setting(profile: Profile, rows: pd.DataFrame) -> str:
    """Return the loss and strength of a claim that is asked under a single one, after a comma."""
    names = [name for name in rows["setting"].unique() if name]
    return f", {settings_of(profile)[names[0]]}" if len(names) == 1 else ""


def _gains(profile: Profile, verdicts: pd.DataFrame) -> list[str]:
    """Return a line on what dense steering and SIA at 20% gain over the base, if measured."""
    rows = verdicts[verdicts["claim"].isin(GAINS) & verdicts["sd"].notna()]
    if rows.empty:
        return []
    texts = []
    for setting, of_setting in rows.groupby("setting", sort=False):
        gains = []
        for claim, name in GAINS.items():
            of_claim = of_setting[of_setting["claim"] == claim]
            if of_claim.empty:
                continue
            in_sd = (of_claim["estimate"] / of_claim["sd"]).map("{:+z.2f}".format)
            gains.append(f"{name} {with_minus(' / '.join(in_sd))}")
        texts.append(f"{', '.join(gains)} ({settings_of(profile)[setting]})")
    metrics = " / ".join(forest.METRICS[name] for name in dict.fromkeys(rows["metric"]))
    return [f"Gain over the base in SD of its responses, {metrics}: {'; '.join(texts)}."]


def _lab_facts(profile: Profile) -> list[str]:
    """Return a section on the acceptance test, the lengths of responses, and the fitted heads."""
    path = folder(profile) / "models.csv"
    if not path.exists():
        return []
    quality = pd.read_csv(path)
    accepted = quality[(quality["model"] == "base") & quality["metric"].isin(ACCEPTED)]
    fitted = quality[quality["metric"].isin(FITTED)]
    worlds = plural(accepted["replicate"].nunique(), "world")
    text = (
        f"The base models of {worlds}: numbers of the acceptance test "
        "([method](method.md#acceptance)), over the whole vocabulary, from the lowest to the "
        "highest world; and the lengths of their responses."
    )
    of_heads = (
        "The junction gate and the heads, on responses to test prompts, from the lowest to the "
        "highest loss and world."
    )
    of_scores = (
        "How well scores agree with the judge: Pearson's correlation over responses to test "
        "prompts, from the lowest to the highest family and world; of values, at this share of the "
        "response."
    )
    head = ["", *map(family_label, profile.families)]
    return [
        "## The lab as measured\n",
        _wrapped(text),
        _table(head, _quality_rows(profile, accepted, ".2f") + _length_rows(profile)),
        _wrapped(of_heads),
        _table(head, _quality_rows(profile, fitted, ".3g")),
        _wrapped(of_scores),
        _table(["", "correlation with the judge"], _correlation_rows(quality)),
    ]


def _quality_rows(profile: Profile, quality: pd.DataFrame, form: str) -> list[list[str]]:
    """Return a row for each metric of `models.csv`: its estimates in each family."""
    return [
        [_escaped(METRICS[metric].label), *_by_family(profile, of_metric, form)]
        for metric, of_metric in quality.groupby("metric", sort=False)
    ]


def _correlation_rows(quality: pd.DataFrame) -> list[list[str]]:
    """Return a row for each model that scores responses: its correlation with the judge."""
    rows = quality[quality["metric"].str.startswith("judge_correlation")]
    names = {
        (model, metric): f"{name}, at {share}%" if (share := metric.partition("_at_")[2]) else name
        for model, name in CORRELATED.items()
        for metric in rows.loc[rows["model"] == model, "metric"].unique()
    }
    places = rows.set_index(["model", "metric"])["estimate"].sort_index()
    return [
        [name, with_minus(_span([f"{number:.2f}" for number in sorted(places.loc[[place]])]))]
        for place, name in names.items()
    ]


def _length_rows(profile: Profile) -> list[list[str]]:
    """Return a row for each objective: the mean length of base responses in each family."""
    path = folder(profile) / "table1.csv"
    if not path.exists():
        return []
    table = pooled(pd.read_csv(path))
    plain = (table["method"] == "base") & table["search"].isna() & table["versus"].isna()
    return [
        [
            f"mean length of base responses (tokens), {objective_label(objective)}",
            *_by_family(profile, lengths, ".0f"),
        ]
        for objective, lengths in table[plain & (table["metric"] == "tokens")].groupby("objective")
    ]


def _by_family(profile: Profile, rows: pd.DataFrame, form: str) -> list[str]:
    """Return the estimates of each family in this format, the lowest and the highest of several."""
    of_families = (rows.loc[rows["family"] == name, "estimate"] for name in profile.families)
    return [_span([format(number, form) for number in sorted(each)]) for each in of_families]


def _span(texts: Sequence[str]) -> str:
    """Return the first and the last of some texts, or the one that both are."""
    return " to ".join(dict.fromkeys([texts[0], texts[-1]]))


def _fill_placeholders(text: str, verdicts: pd.DataFrame) -> str:
    """Return a text whose {{ numbers(claim) }} and {{ hours(profile) }} are filled in."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    known = set(read_document()["claims"])

    def numbers(claim: str, form: str = ".2f", case: str = "") -> str:
        """Return the estimates of a claim, the least and the largest where it has several cases.

        Only of cases whose condition contains the text `case`, and that rest on enough prompts.
        """
        if claim not in known:
            raise LookupError(f"a text of the results page names the unknown claim {claim!r}")
        measured = verdicts[(verdicts["claim"] == claim) & verdicts["low"].notna()]
        measured = measured[measured["condition"].str.contains(case, regex=False)]
        rows = measured[measured["verdict"] != TOO_FEW]
        if rows.empty:
            return "not measured" if measured.empty else "measured on too few prompts"
        return _range(rows, form) + f" ({len(rows)} cases)" * (len(rows) > 1)

    return environment.from_string(text).render(numbers=numbers, hours=_hours)


def _range(rows: pd.DataFrame, form: str) -> str:
    """Return the least and the largest estimate; scores in standard deviations."""
    in_sd = bool(rows["sd"].notna().all())
    estimates = rows["estimate"] / rows["sd"] if in_sd else rows["estimate"]
    ends = [format(estimate, f"+z{form}" if in_sd else form) for estimate in sorted(estimates)]
    return with_minus(_span(ends)) + " SD" * in_sd


def _hours(profile_name: str, *figures: str) -> str:
    """Return about how many GPU hours figures of a profile of real models take together."""
    from benchmarks.engine.estimate import figure_hours

    profile = load_profile(profile_name)
    needed = FigureCells.union(FIGURES[name].cells(profile, 0) for name in figures)
    return f"{figure_hours(profile, {'run': needed})['run']:.1f}"


def _escaped(text: str) -> str:
    return text.replace("*", r"\*")


def _picture(profile: Profile, name: str, title: str) -> list[str]:
    """Return the image of this name, or the first of the figure, if it has been drawn."""
    paths = [*pictures_of(profile, name), *pictures_of(profile, name.partition("-")[0])]
    named = [path for path in paths if path.stem == name] or paths[:1]
    return [f"![{title}]({_link(path)})\n" for path in named[:1]]


def _link(path: Path) -> str:
    return os.path.relpath(path, RESULTS_PAGE.parent)


def _counts(rows: pd.DataFrame) -> str:
    """Return how many verdicts there are of each kind."""
    counts = rows["verdict"].value_counts()
    kinds = (f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)
    return f"{plural(len(rows), 'verdict')}, {', '.join(kinds)}"


def _left_open(headline: pd.DataFrame) -> str:
    """Return a sentence on what intervals decide and Holm's test leaves open; empty if nothing."""
    decided = headline.loc[headline["left_open"], "by_interval"]
    counts = " and ".join(f"{(decided == kind).sum()} {kind}" for kind in DECIDED[:2])
    return f"Of the undecided, intervals alone would make {counts}. " if len(decided) else ""


def _scope(headline: pd.DataFrame) -> str:
    """Return what the intervals of the headline verdicts generalise to."""
    worlds = headline["replicates"].max()
    if worlds > 1:
        return f"Intervals are over {worlds:.0f} worlds."
    return "Only one world is measured: intervals describe new prompts in it, not new worlds."


def _section(profile: Profile, number: str, question: dict, verdicts: pd.DataFrame) -> list[str]:
    """Return question, figure, answer, caveat, and what would change it; nothing unmeasured."""
    rows = verdicts[verdicts["headline"] == int(number)]
    if rows.empty:
        return []
    parts = [f"## {number}. {question['question']}\n"]
    parts += _picture(profile, question["figure"], question["question"])
    for _, of_claim in rows.groupby("claim", sort=False):
        first = of_claim.iloc[0]
        claim = f"**{_escaped(first['statement'])}** ({source_text(first)}.) {_answer(of_claim)}"
        parts += [_wrapped(claim), _table(COLUMNS, of_claim.apply(_cells, axis=1))]
        parts += _sample(profile, of_claim)
        parts.append(_wrapped(f"*What would change it:* {_escaped(first['would_change'])}"))
    caveat = _fill_placeholders(question["caveat"], verdicts)
    parts.append(_wrapped(f"*Caveat.* {_escaped(caveat)}"))
    return parts


def _answer(of_claim: pd.DataFrame) -> str:
    """Return in which cases a claim is reproduced, not reproduced, and so on, with estimates."""
    sentences = []
    for verdict in VERDICTS:
        rows = of_claim[of_claim["verdict"] == verdict]
        if rows.empty:
            continue
        cases = [case or "–" for case in rows["condition"]]
        if len(cases) == len(of_claim):
            every = {1: "", 2: " in both cases"}.get(len(cases), f" in all {len(cases)} cases")
            sentence = f"{verdict.capitalize()}{every}"
        else:
            sentence = f"{verdict.capitalize()}: {'; '.join(cases)}"
        if is_decided(rows.iloc[0]):
            sentence += f" ({_range(rows, '.2f' if rows['sd'].notna().all() else '.3g')})"
        alone = rows.loc[rows["left_open"], "by_interval"].value_counts()
        counts = [f"{alone[kind]} {kind}" for kind in DECIDED if kind in alone]
        sentences.append(sentence + f"; by the interval alone {', '.join(counts)}" * bool(counts))
    return ". ".join(sentences) + "."


def _sample(profile: Profile, of_claim: pd.DataFrame) -> list[str]:
    """Return a line on intervals and sample sizes; none where every number is exact."""
    rows = of_claim[of_claim["n"].notna() & (of_claim["low"] != of_claim["high"])]
    if rows.empty:
        return []
    kind = interval_kind(profile.statistics.level, int(rows["replicates"].max()))
    return [_wrapped(f"{kind}; {forest.sample_note(rows)}.")]


def _wrapped(text: str, indent: str = "") -> str:
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.fill(text, WIDTH, **options) + "\n"


def _cells(row: pd.Series) -> list[str]:
    case = row["condition"] or "–"
    weakest = f"; decided by {WEAKEST[row['weakest']]}" if row["weakest"] else ""
    if not is_decided(row):
        return [case, row["verdict"], "", "", with_minus(criterion(row)), "", ""]
    holm = f" (by its interval: {row['by_interval']})" if row["left_open"] else ""
    verdict = row["verdict"] + holm + dagger(row["dense_loses"])
    in_sd = "" if pd.isna(row["sd"]) else f"{row['estimate'] / row['sd']:+z.2f}"
    p = p_text(row["p_adjusted"]) or "exact"
    cells = [interval_text(row, _format(row)), in_sd, criterion(row)]
    return [case + weakest, verdict, *map(with_minus, cells), p, row["marks"]]


def _format(row: pd.Series) -> str:
    """Return the format that tells the ends of an interval from its margin: 2 decimals to 4."""
    ends = [end for end in (row["low"], row["high"]) if end != row["margin"]]
    apart = (
        digits
        for digits in (2, 3)
        if all(round(end, digits) != round(row["margin"], digits) for end in ends)
    )
    return f".{next(apart, 4)}f"


def _table(columns: list[str], rows) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shares_table(profile: Profile, verdicts: pd.DataFrame) -> str:
    """Return the smallest share that reaches dense steering, by setting and metric."""
    settings, shares = settings_of(profile), smallest_shares(verdicts)
    rows = [
        [
            settings[row.setting],
            metric_label(profile, row.metric),
            "none"
            if pd.isna(row.smallest)
            else share_label(row.smallest) + dagger(row.dense_loses),
            row.shares,
        ]
        for row in shares.itertuples()
    ]
    text = (
        "The smallest share of the tokens that reaches dense steering, by a fixed-sequence test: "
        "from the largest share down, until one does not reach it. Each row is a sequence of its "
        "own, decided by the intervals, apart from Holm's test."
    )
    columns = ["setting", "metric", "smallest share that reaches dense", "shares measured"]
    return f"{_wrapped(text)}\n{_table(columns, rows)}"


def with_headline(readme: str, profile: Profile, verdicts: pd.DataFrame) -> str:
    """Return the README with findings and table of headline verdicts written anew."""
    headline = verdicts[verdicts["headline"] > 0]
    shown = headline[headline["in_readme"].astype(bool)]
    text = f"{findings(profile, verdicts, in_readme=True)}\n{headline_table(profile, shown)}"
    block = re.compile(f"(?<={re.escape(BEGIN)}\n).*?(?={re.escape(END)})", re.DOTALL)
    return block.sub(lambda _: text, readme)


def headline_table(profile: Profile, headline: pd.DataFrame) -> str:
    """Return a Markdown table with a row for each headline claim and a column for each setting.

    A cell has the verdicts in all metrics. Verdicts without a setting are in the first column.
    """
    settings = settings_of(profile)
    rows = []
    for (number, title), of_claim in headline.groupby(["headline", "title"], sort=False):
        cells = {
            name: " / ".join(of_setting.apply(_mark_and_estimate, axis=1))
            for name, of_setting in of_claim.groupby("setting")
        }
        cells.setdefault(next(iter(settings)), cells.pop("", ""))
        rows.append(
            [f"{number:.0f}. {_escaped(title)}", *(cells.get(name, "") for name in settings)]
        )
    return _table(["claim", *settings.values()], rows)


def _mark_and_estimate(row: pd.Series) -> str:
    """Return a verdict as its mark with the estimate, in standard deviations if it is a score.

    What the interval decides and Holm's test leaves open has its mark in brackets.
    """
    if not is_decided(row):
        return MARKS.get(row["verdict"], "not measured")
    if pd.notna(row["sd"]):
        number = f"{row['estimate'] / row['sd']:+z.2f}"
    else:
        number = forest.format_number(row["estimate"], row["unit"])
    mark = MARKS[row["by_interval"]]
    if row["left_open"]:
        mark = f"({mark})"
    note = " (time)" * (row["metric"] == "seconds_ratio") + " (any setting)" * (not row["setting"])
    return with_minus(f"{mark} {number}{note}{dagger(row['dense_loses'])}")


def appendix(rows: pd.DataFrame) -> str:
    """Return one table of all other claims, whose verdicts follow from their intervals alone."""
    lines, shown = [], ""
    for _, row in rows.iterrows():
        statement = f"{_escaped(row['statement'])} ({source_text(row)})"
        numbers = interval_text(row, _format(row)) if is_decided(row) else ""
        case = row["condition"] or "–"
        name = statement if row["claim"] != shown else "″"
        cells = map(with_minus, (numbers, criterion(row)))
        verdict = row["verdict"] + dagger(row["dense_loses"])
        lines.append([name, case, verdict, *cells, row["marks"]])
        shown = row["claim"]
    columns = ["claim", "case", "verdict", "estimate [interval]", "needs", "worlds"]
    note = (
        f"{_counts(rows)}; here the intervals alone decide, so that some of so many are false by "
        "chance."
    )
    return f"{_wrapped(note)}\n{_table(columns, lines)}"
