"""Claims in the terms of a profile, and the verdicts on them."""

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from benchmarks.analysis import claims, estimates
from benchmarks.figures.registry import FIGURES
from benchmarks.spec.profile import HubProfile, Profile, load_profile
from tests.helpers.fake import SMOKE, FakeResults, table_of

LLAMA = load_profile("llama-3.2-1b")
SIZES = load_profile("w2s-qwen3")


def hub(profile: HubProfile, *without: str, **models: str) -> HubProfile:
    """Return a profile without some models, and with others of the same source."""
    kept = {kind: source for kind, source in profile.models.items() if kind not in without}
    further = {kind.replace("_", "-"): profile.models[other] for kind, other in models.items()}
    return replace(profile, models=kept | further)


def supported(profile: Profile) -> list[claims.Claim]:
    """Return the claims on figures that the profile can measure."""
    unsupported = [name for name, figure in FIGURES.items() if figure.why_unsupported(profile)]
    return claims.claims_for(profile, unsupported)


def texts(profile: Profile) -> str:
    """Return statement and condition of every claim, one per line."""
    return "\n".join(f"{claim.statement} ({claim.condition})" for claim in supported(profile))


OF_THE_LAB = "judge|loss|both|GenARM|small and large|lab|fluency|instruct-reward|15 prompts"


@pytest.mark.parametrize(
    ("profile", "said", "unsaid"),
    [
        (SMOKE, "the judge's favourite|Qwen3, per-token loss: the best|paper's loss, β = 1", "Q3"),
        (LLAMA, r"Transfer Q\* \(on few prompts: 20 prompts of each objective\)",
         f"{OF_THE_LAB}|Qwen3|of each model"),
        (replace(LLAMA, families=("mistral",)), "Entropy falls after", f"{OF_THE_LAB}|Qwen3|Llama"),
        (hub(LLAMA, value_token="value-mean"), r"Paper's loss: entropy falls|\(per-token loss, β",
         "judge|both|GenARM|Qwen3"),
        (hub(LLAMA, "value-mean", value_token="value-mean"), "Entropy falls after", OF_THE_LAB),
        (SIZES, "model of the usual size|A smaller value model", "judge|GenARM|loss|Llama"),
        (hub(LLAMA, "reward"), r"ratio among dense steering\.", "ARGS|Transfer|beam|8 base"),
    ],
)  # fmt: skip
def test_claims_say_what_the_profile_has(profile, said, unsaid):
    lines = texts(profile)
    for pattern in said.split("|"):
        assert re.search(pattern, lines), pattern
    assert re.findall(unsaid, lines) == []
    assert "{" not in lines
    assert "Τ" not in lines  # the capital of τ


def test_shares_and_numbers_are_those_of_the_profile():
    sweep = replace(LLAMA.sweep, main_ratios=(0.1, 0.6), beams=4, rollout_prompts=1)
    lines = texts(replace(LLAMA, sweep=sweep))
    for said in ("Steering 10% to 60% of the tokens reaches", "the best of 4 base responses",
                 "beam search over 4 responses", "on few prompts: 1 prompt of each"):  # fmt: skip
        assert said in lines
    assert "20% to 80%" not in lines


@pytest.mark.parametrize("profile", [LLAMA, SIZES, SMOKE], ids=lambda profile: profile.name)
def test_claims_are_unique_and_on_measured_figures_only(profile):
    usable = supported(profile)
    rows = [(claim.figure, claim.test, claim.margin, str(claim.selectors)) for claim in usable]
    assert len(set(rows)) == len(rows)
    keys = [(claim.name, claim.condition) for claim in usable]
    assert len(set(keys)) == len(keys)
    assert all(claim.selector.get("family") in (None, *profile.families, "all") for claim in usable)
    metrics = {claim.selector.get("metric") for claim in usable} - {None}
    assert set(profile.available_metrics(sorted(metrics))) == metrics


# --- verdicts


@pytest.mark.parametrize(("test", "margin", "low", "high", "expected"), [
    ("more", 0.0, 0.1, 0.3, "reproduced"),
    ("more", 0.0, -0.1, 0.3, "undecided"),
    ("more", 0.0, -0.3, -0.1, "not reproduced"),
    ("more", 0.0, 0.0, 0.0, "not reproduced"),
    ("less", 0.0, -0.3, -0.1, "reproduced"),
    ("less", 0.0, -0.3, 0.1, "undecided"),
    ("less", 0.0, 0.0, 0.0, "not reproduced"),
    ("less", 1.0, 0.2, 0.9, "reproduced"),
    ("reaches", -0.1, -0.05, 0.3, "reproduced"),
    ("reaches", -0.1, -0.1, -0.1, "reproduced"),
    ("reaches", -0.1, -0.2, 0.3, "undecided"),
    ("reaches", -0.1, -0.3, -0.2, "not reproduced"),
    ("at least", 6.0, 6.0, 7.0, "reproduced"),
    ("at least", 6.0, 4.0, 5.0, "not reproduced"),
])  # fmt: skip
def test_verdicts_follow_the_interval(test, margin, low, high, expected):
    assert claims.decide(test, margin, low, high) == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('test = "reaches"', 'test = "equal"',
         "claims.toml: the test of twenty-percent-is-enough must be one of more, less, at least, "
         "reaches, got 'equal'"),
        ('conditions = ["positions",', 'conditions = ["nope",',
         "claims.toml: up-to-six-times-cheaper names the unknown condition 'nope'"),
        ('settings = ["paper",', 'settings = ["nope",',
         "claims.toml: twenty-percent-is-enough names the unknown setting 'nope'"),
    ],
)  # fmt: skip
def test_claims_are_checked_when_they_are_read(tmp_path, old, new, message):
    path = tmp_path / "claims.toml"
    text = claims.CLAIMS.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        claims.claims_for(SMOKE, path=path)


def claim(test: str = "more", margin: float | None = 0.0, **labels) -> claims.Claim:
    """Return a claim on figure 1, of SIA against the random gate at 20%."""
    selector = {"method": "sia", "versus": "random", "target_ratio": 0.2, "family": "all"}
    selector |= {"objective": "all", "metric": "judge", "value_model": "value-mean"} | labels
    selectors = {"": selector}
    return claims.Claim("c", "It holds.", "abstract", "figure1", "under", selectors, test, margin)


def test_a_claim_that_fits_several_rows_is_an_error():
    table = pd.DataFrame({"method": ["sia", "sia", "dense"], "replicate": "all"})
    with pytest.raises(LookupError, match=r"c \(under\) fits 2 rows of figure1: {'method': 'sia'}"):
        claims.select_rows(claim(), table, {"method": "sia"})


def test_verdicts_of_single_replicates_stand_beside_the_pooled_one(monkeypatch):
    monkeypatch.setattr(claims, "FEWEST_PROMPTS", 45)  # of a replicate
    table = table_of(
        FIGURES["figure1"], lambda cell: (1.0 - 2.0 * cell.replicate) * (cell.gate == "entropy")
    )
    verdicts = claims.verdicts({"figure1": table}, [claim()], 0.95)
    alone = verdicts[verdicts["replicate"] != "all"]
    assert alone["verdict"].tolist() == ["reproduced", "not reproduced"]
    assert alone["estimate"].tolist() == [1.0, -1.0]
    (row,) = claims.pooled_verdicts(verdicts).to_dict("records")
    assert (row["verdict"], row["marks"]) == ("undecided", "✓✗")
    assert claims.verdict_line(row) == (
        "undecided       It holds. (under) +0.000 [-12.706, +12.706], needs > 0 points; "
        "replicates alone: ✓✗"
    )


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_reaching_has_a_margin_in_standard_deviations_of_base_responses(scale):
    figure = FIGURES["figure1"]
    rows = figure.collect(SMOKE, range(2), FakeResults(SMOKE))
    base = rows[rows["method"] == "base"].groupby(["family", "replicate", "objective"])["judge"]
    expected = np.sqrt(base.var().mean())
    judge = rows["judge"] - 0.04 * expected * (rows["method"] == "sia")
    table = figure.summarize(rows.assign(judge=scale * judge), SMOKE)
    assert estimates.base_sd(table, "judge") == pytest.approx(scale * expected, rel=1e-3)
    tested = [claim("reaches", None), replace(claim("more"), name="d")]
    verdicts = claims.verdicts({"figure1": table}, tested, 0.95)
    pooled = claims.pooled_verdicts(verdicts)
    assert pooled["verdict"].tolist() == ["reproduced", "not reproduced"]
    assert pooled["margin"].tolist() == pytest.approx([-0.05 * scale * expected, 0], rel=1e-3)
    assert pooled["margin_in_sd"].fillna(9).tolist() == [-0.05, 9]
    margin = f"≥ {-0.05 * scale * expected:.2g} points (-0.05 SD of base responses)"
    assert claims.verdict_line(pooled.iloc[0]).endswith(f"needs {margin}; replicates alone: ––")


def test_missing_standard_deviations_give_a_one_line_error():
    table = table_of(FIGURES["figure1"])
    for lacking in (table.drop(columns="sd"), table[table["method"] != "base"]):
        with pytest.raises(
            ValueError,
            match=r"expected a summary with the standard deviation of judge over base responses, "
            r"as today's code writes it \(make summaries\), got one without",
        ):
            claims.verdicts({"figure1": lacking}, [claim("reaches", None)], 0.95)


@pytest.mark.parametrize(
    ("metric", "n", "counted", "verdict"),
    [
        ("judge", 50, 50, "not reproduced"),
        ("judge", 49, 1200, "too few prompts"),
        ("seconds_ratio", 6, 50, "not reproduced"),  # rounds of timing, on as many prompts
        ("seconds_ratio", 6, 49, "too few prompts"),
        ("entropy_fall", np.nan, 3, "not reproduced"),  # over no prompts, as the theory's
    ],
)
def test_too_few_prompts_give_no_verdict(metric, n, counted, verdict, monkeypatch):
    monkeypatch.setattr(claims, "base_sd", lambda *_: 1.0)
    row = {"metric": metric, "n": n, "replicates": 2, "replicate": "all"}
    row |= {"estimate": -1.0, "low": -2.0, "high": -0.5, "versus": "base"}
    row |= dict.fromkeys(("family", "method", "search", "value_model", "target_ratio"), "")
    alone = [row | {"replicate": str(i), "n": np.nan, "replicates": np.nan} for i in range(2)]
    others = [
        row | {"metric": "tokens", "n": 1200},
        row | {"metric": "positions_ratio", "n": counted},
    ]
    table = pd.DataFrame([row, *alone, *others])
    tested = replace(claim(), selectors={"": {"metric": metric}})
    verdicts = claims.verdicts({"figure1": table}, [tested], 0.95)
    (pooled,) = claims.pooled_verdicts(verdicts).to_dict("records")
    assert pooled["verdict"] == verdict
    if verdict == "too few prompts":
        assert claims.verdict_line(pooled) == "too few prompts It holds. (under)"
        assert set(verdicts["verdict"]) == {verdict}
    else:
        assert pooled["marks"] == ("✗✗" if np.isnan(n) else "––")


@pytest.mark.parametrize(
    ("margin", "share", "text"),
    [
        (-0.1, -0.05, "≥ -0.1 points (-0.05 SD of base responses)"),
        (0.0, math.nan, "≥ 0 points"),
        (math.nan, -0.05, "≥ -0.05 SD of base responses"),  # its table is not measured
    ],
)
def test_a_criterion_states_its_margin_where_it_is_known(margin, share, text):
    row = {"test": "reaches", "margin": margin, "margin_in_sd": share, "unit": "points"}
    assert claims.criterion(pd.Series(row)) == text


def test_small_p_values_are_not_written_as_nothing():
    texts = [claims.p_text(p) for p in (math.nan, 1.0, 0.0321, 0.0498, 0.05021, 0.0001)]
    assert texts == ["", "1.000", "0.032", "0.0498", "0.0502", "< 0.001"]


# --- headline claims


def test_a_headline_is_tested_in_every_setting_and_metric_of_a_profile():
    def cases(profile: Profile) -> list[tuple[str, str]]:
        asked = supported(profile)
        return [(c.setting, c.metric) for c in asked if c.name == "twenty-percent-is-enough"]

    settings = ("paper", "token", "best")
    assert cases(SMOKE) == [(s, metric) for s in settings for metric in ("judge", "reward")]
    assert cases(LLAMA) == [("paper", "reward")]
    tuned = replace(LLAMA, sweep=replace(LLAMA.sweep, tuning=(1.0, 2.0)))
    assert cases(tuned) == [("paper", "reward"), ("best", "reward")]
    only_token = hub(tuned, "value-mean", value_token="value-mean")
    assert cases(only_token) == [("token", "reward"), ("best", "reward")]


def test_headlines_answer_all_questions_and_the_readme_shows_few():
    document = claims.read_document()
    headlines = [entry for entry in document["claims"].values() if "headline" in entry]
    assert {str(entry["headline"]) for entry in headlines} == set(document["questions"])
    assert all(entry["would_change"].endswith(".") and entry["title"] for entry in headlines)
    assert len({entry["title"] for entry in headlines}) == len(headlines)
    assert sum(entry.get("in_readme", True) for entry in headlines) <= 14


def rows_of(**estimates: float) -> pd.DataFrame:
    """Return a summary of differences to other gates over eight replicates, of width 0.2."""
    common = {"replicate": "all", "metric": "kl", "n": 800, "replicates": 8}
    rows = [
        common | {"versus": gate, "estimate": x, "low": x - 0.1, "high": x + 0.1}
        for gate, x in estimates.items()
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("test", "attention", "position", "weakest", "verdict"),
    [
        ("more", 0.5, 0.2, "position", "reproduced"),
        ("more", 0.5, 0.05, "position", "undecided"),
        ("more", -0.9, 0.5, "attention", "not reproduced"),
        ("less", 0.5, -0.2, "attention", "not reproduced"),
    ],
)
def test_a_claim_of_several_rows_stands_or_falls_with_the_weakest(
    test, attention, position, weakest, verdict
):
    parts = {gate: {"metric": "kl", "versus": gate} for gate in ("attention", "position")}
    several = replace(claim(test), selectors=parts, headline=5)
    table = rows_of(attention=attention, position=position)
    (row,) = claims.verdicts({"figure1": table}, [several], 0.95).to_dict("records")
    assert (row["weakest"], row["verdict"]) == (weakest, verdict)
    (row,) = claims.verdicts({"figure1": table[:1]}, [several], 0.95).to_dict("records")
    assert row["verdict"] == "not measured"


def test_an_undecided_row_is_the_weakest_whatever_the_standard_errors():
    """Intervals of a bootstrap are not symmetric."""
    parts = {gate: {"metric": "kl", "versus": gate} for gate in ("attention", "position")}
    table = rows_of(attention=1.0, position=0.9).assign(low=[0.1, -0.05], high=[3.0, 1.0])
    verdicts = claims.verdicts({"figure1": table}, [replace(claim(), selectors=parts)], 0.95)
    assert verdicts[["weakest", "verdict"]].to_numpy().tolist() == [["position", "undecided"]]


def test_each_replicate_is_judged_by_its_own_weakest_part():
    parts = {gate: {"metric": "kl", "versus": gate} for gate in ("attention", "position")}
    worlds = [(0.5, 0.2), (-0.4, 0.9)]  # of the two parts
    table = pd.concat(
        [rows_of(attention=0.5, position=0.2)]
        + [
            rows_of(attention=one, position=other).assign(replicate=str(number))
            for number, (one, other) in enumerate(worlds)
        ]
    )
    verdicts = claims.verdicts({"figure1": table}, [replace(claim(), selectors=parts)], 0.95)
    assert verdicts["weakest"].tolist() == ["position", "position", "attention"]
    (row,) = claims.pooled_verdicts(verdicts).to_dict("records")
    assert (row["verdict"], row["marks"], row["alone"]) == ("reproduced", "✓✗", (0.2, -0.4))


def test_shares_are_tested_from_the_largest_down():
    shares = {0.8: 0.15, 0.4: 0.2, 0.2: -0.5, 0.1: 0.3}
    table = pd.concat([rows_of(dense=x).assign(target_ratio=share) for share, x in shares.items()])
    asked = [
        replace(
            claim(), name="share-is-enough", condition=f"{share}", setting="paper",
            selectors={"": {"metric": "kl", "target_ratio": share}},
        )
        for share in (*shares, 0.05)
    ]  # fmt: skip
    verdicts = claims.pooled_verdicts(claims.verdicts({"figure1": table}, asked, 0.95))
    assert claims.smallest_shares(verdicts).to_dict("records") == [
        {
            "setting": "paper", "metric": "kl", "smallest": 0.4, "shares": "10%, 20%, 40%, 80%",
            "dense_loses": False,
        }
    ]  # fmt: skip


def test_where_all_base_responses_score_alike_there_is_no_spread(monkeypatch):
    headline = next(claim for claim in claims.claims_for(SMOKE) if claim.metric == "judge")
    monkeypatch.setattr(claims, "base_sd", lambda *_: 0.0)
    assert math.isnan(headline.spread_in(pd.DataFrame()))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is damaged (No columns to parse from file)"),
        ("claim,verdict\nx,reproduced\n", "lacks the column headline (damaged, or of other code)"),
    ],
)
def test_damaged_verdicts_are_named(content, reason, tmp_path):
    path = tmp_path / "claims.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} {reason}: make claims writes it anew")):
        claims.read_verdicts(path)
