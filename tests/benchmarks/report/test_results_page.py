"""The results page and the README's table say what the verdicts are."""

import re
from collections import defaultdict

import pandas as pd
import pytest
from PIL import Image
from scipy import stats

from benchmarks.analysis import claims, labels, tables
from benchmarks.report import editions, forest, render, results_page
from benchmarks.spec.profile import load_profile

SMOKE = load_profile("smoke")
NUMBERS = {"replicate": "all", "n": 800, "replicates": 8}
NUMBERS |= {"estimate": 0.4, "low": 0.38, "high": 0.42, "sd": 2.0}


@pytest.fixture(scope="module")
def verdicts() -> pd.DataFrame:
    """Verdicts where all estimates are 0.4, but for costs, which are not measured."""
    asked, rows = claims.claims_for(SMOKE), defaultdict(list)
    for claim in asked:
        rows[claim.figure] += [labels | NUMBERS for labels in claim.selectors.values()]
    summaries = {
        figure: pd.DataFrame(of_figure).drop_duplicates()
        for figure, of_figure in rows.items()
        if figure != "cost"
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "base_sd", lambda *_: 2.0)
        patch.setattr(claims, "reaching_margin", lambda *_: -0.1)
        return claims.pooled_verdicts(claims.verdicts(summaries, asked, 0.95))


@pytest.fixture
def page(verdicts, monkeypatch, tmp_path) -> str:
    monkeypatch.setattr(tables, "FIGURES", tmp_path)
    return results_page.results_page(SMOKE, verdicts)


def test_the_page_has_every_claim_question_and_verdict(page, verdicts):
    text = re.sub(r"\s+", " ", page).replace(r"\*", "*")
    for statement in verdicts["statement"]:
        assert statement in text
    for number, question in claims.read_document()["questions"].items():
        assert f"## {number}. {question['question']}" in page
        caveat = results_page._fill_placeholders(question["caveat"], verdicts).replace(r"\*", "*")
        assert caveat in text
        assert "{{" not in caveat
    assert not verdicts["would_change"].str.contains("{", regex=False).any()
    for reason in set(verdicts["would_change"]) - {""}:
        assert reason in text
    kinds = "|".join(claims.VERDICTS)  # the table of headlines begins with their numbers
    rows = re.findall(rf"^\| (?!\d+\. ).* \| ({kinds}) \|", page, re.M)
    assert sorted(rows) == sorted(verdicts["verdict"])
    assert {"reproduced", "not reproduced", "not measured"} <= set(rows)


def test_numbers_in_the_text_are_those_of_the_verdicts(page):
    assert "SIA at 20% against dense\n  steering is +0.20 SD (6 cases)." in page
    assert "Gain over the base in SD of its responses, judge score / evaluation reward" in page
    assert "dense +0.20 / +0.20, SIA at 20% +0.20 / +0.20 (paper's loss, β = 1);" in " ".join(
        page.split()
    )
    assert "the regret exceeds the sum in 40% of random trees" in page
    assert "The largest ratio that we find is\n  not measured" in page
    assert "Reproduced in all 6 cases (+0.20 SD)." in " ".join(page.split())
    assert "95% t intervals over replicates; n = 800 prompts." in page
    assert re.search(r"`make figure2 PROFILE=qwen3-1.7b` \| \d+\.\d \|", page)
    assert "| paper's loss, β = 1 | judge score | 5% | 5%, 10%, 20%, 30%, 40%, 60%, 80% |" in page


def test_the_readme_shows_a_few_headlines(verdicts):
    readme = f"before\n{results_page.BEGIN}\nold\n{results_page.END}\nafter\n"
    written = results_page.with_headline(readme, SMOKE, verdicts)
    assert written.startswith(f"before\n{results_page.BEGIN}\n")
    assert written.endswith(f"|\n{results_page.END}\nafter\n")
    assert "old" not in written
    assert results_page.with_headline(written, SMOKE, verdicts) == written
    assert "| 1. SIA at 20% reaches dense steering | ✓ +0.20 / ✓ +0.20 |" in written
    assert "| 13. Most junctions lie in the first half |  | ✗ 0.40 |  |" in written
    assert len(re.findall(r"^\| \d", written, re.M)) == 14
    groups = re.findall(r"^- (\D*):", written, re.M)
    assert groups.pop(0).startswith("Gain over the base in SD of its responses")
    assert groups
    assert set(groups) <= {*results_page.CLEAR}
    for worlds, scope in ((1, "Only one world is measured"), (8, "Intervals are over 8 worlds.")):
        of_worlds = verdicts.assign(replicates=worlds)
        texts = (
            results_page.with_headline(readme, SMOKE, of_worlds),
            results_page.findings(SMOKE, of_worlds),
        )
        assert all(scope in " ".join(text.split()) for text in texts)


def test_reaching_dense_steering_that_loses_is_no_merit(verdicts):
    """A dagger marks it in the setting and metric where dense steering loses, and no other."""
    loses = (
        (verdicts["claim"] == claims.DENSE_GAINS)
        & (verdicts["setting"] == "paper")
        & (verdicts["metric"] == "judge")
    )
    lost = verdicts.assign(verdict=verdicts["verdict"].mask(loses, "not reproduced"))
    page = results_page.results_page(
        SMOKE, claims.pooled_verdicts(lost.drop(columns=["marks", "alone"]))
    )
    assert (
        "| 1. SIA at 20% reaches dense steering | ✓ +0.20 † / ✓ +0.20 | ✓ +0.20 / ✓ +0.20 |" in page
    )
    assert "| paper's loss, β = 1, judge score | reproduced † |" in page
    assert "| paper's loss, β = 1 | judge score | 5% † |" in page
    assert "beats the base model (†)" not in page


def test_what_the_interval_alone_decides_stands_beside_holms_verdict(verdicts):
    row = verdicts[verdicts["weakest"] != ""].head(1)
    undecided = row.assign(verdict="undecided", by_interval="reproduced", left_open=True)
    undecided = undecided.assign(p_adjusted=0.0498).iloc[0]
    case, verdict, *_, p, _ = results_page._cells(undecided)
    assert case.endswith(f"; decided by {labels.WEAKEST[undecided['weakest']]}")
    assert (verdict, p) == ("undecided (by its interval: reproduced)", "0.0498")
    assert results_page._mark_and_estimate(undecided).startswith("(✓) +0.20")
    assert render._verdict(undecided)["by_interval"] == "reproduced"
    assert render._verdict(row.iloc[0])["by_interval"] == ""
    open_ = verdicts.assign(verdict="undecided", left_open=True)
    of_all = verdicts.mask(verdicts["headline"] > 0, open_)
    text = results_page.findings(SMOKE, of_all)
    kinds = verdicts.loc[verdicts["headline"] > 0, "verdict"].value_counts()
    assert f"intervals alone would make {kinds['reproduced']} reproduced and" in text
    assert "Of the undecided" not in results_page.findings(SMOKE, verdicts)


def test_the_forest_marks_what_the_interval_alone_decides(verdicts):
    rows = verdicts[verdicts["headline"] > 0]
    open_ = rows.assign(verdict="undecided", left_open=True)
    names = [handle.get_label() for handle in forest.legend([], open_)]
    assert names == ["reproduced", "not reproduced", "undecided", "by interval alone"]
    assert "by interval alone" not in [h.get_label() for h in forest.legend([], rows)]
    _, axis = forest.style.plt.subplots()
    shown = open_[open_["sd"].isna() & (open_["metric"] == "seconds_ratio")].head(1)
    shown = shown.assign(row="row", by_interval="reproduced", estimate=7.0, unit="times")
    forest.write_numbers(axis, shown, ["row"])
    assert [text.get_text() for text in axis.texts] == ["(7.0×), time"]
    forest.style.plt.close()


def test_the_page_tells_what_its_number_of_worlds_can_decide(verdicts):
    rows = int(verdicts.loc[verdicts["headline"] > 0, "p"].notna().sum())
    by_rows = stats.t.isf(0.025 / rows, 7)
    text = " ".join(results_page.results_page(SMOKE, verdicts).split())
    assert "Over 8 worlds the interval alone decides a row whose estimate lies 2.4 standard" in text
    assert f"passes its first row only at {by_rows:.1f}." in text
    alone = results_page.results_page(SMOKE, verdicts.assign(replicates=1))
    assert "the interval alone decides a row" not in " ".join(alone.split())


def test_gains_that_are_not_measured_are_left_out(verdicts):
    there = verdicts[verdicts["claim"] != claims.DENSE_GAINS]
    text = " ".join(results_page.results_page(SMOKE, there).split())
    assert "evaluation reward: SIA at 20% +0.20 / +0.20 (paper's loss, β = 1);" in text


def test_claims_that_the_closing_names_are_known(verdicts, monkeypatch, tmp_path):
    template = tmp_path / "closing.md.j2"
    template.write_text('{{ numbers("nope") }}', encoding="utf-8")
    monkeypatch.setattr(results_page, "CLOSING", template)
    with pytest.raises(LookupError, match=r"the results page names the unknown claim 'nope'"):
        results_page.results_page(SMOKE, verdicts)


@pytest.mark.parametrize(
    ("query", "axis", "unit"),
    [
        ("headline > 0", "; axis linear to ±0.1", " prompts"),
        ("headline > 0 and sd > 0", "; axis linear to ±0.1", " prompts"),
        ("headline > 0 and sd != sd", "", ""),
    ],
)
def test_the_forest_shows_headlines_in_a_caption_of_three_lines(
    verdicts, monkeypatch, tmp_path, query, axis, unit
):
    monkeypatch.setattr("benchmarks.figures.style.DPI", 40)
    png, pdf = forest.draw(verdicts.query(query), SMOKE, False, tmp_path)
    assert (png.name, pdf.name) == ("verdicts.png", "verdicts.pdf")
    with Image.open(png) as image:
        caption = image.info["Description"]
    assert caption == (
        "95% t intervals over replicates, verdicts by Holm at 5%; dotted: margin (0 or −0.05)"
        f"{axis}. n = 800{unit}, profile smoke."
    )
    assert len(caption) <= 3 * forest.style.COLUMN * forest.style.CHARACTERS


def test_without_a_measured_headline_there_is_no_forest(verdicts, tmp_path):
    assert forest.draw(verdicts.query("headline == 0"), SMOKE, False, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_both_editions_of_the_lab_stand_side_by_side(verdicts, monkeypatch, tmp_path):
    lab, first = load_profile("lab"), tmp_path / "results/lab-words/claims.csv"
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("benchmarks.figures.style.DPI", 40)
    assert editions.first_verdicts(lab) is None
    first.parent.mkdir(parents=True)
    verdicts.drop(columns=["marks", "alone"]).to_csv(first, index=False)
    assert editions.first_verdicts(SMOKE) is None
    of_first = editions.first_verdicts(lab).query("figure == 'figure2'")
    of_first = of_first.assign(n=600, replicates=2, alone=[(0.3, 0.5)] * len(of_first))
    (tmp_path / "drawn").mkdir()
    png, _ = editions.draw(verdicts, of_first, lab, False, tmp_path / "drawn")
    with Image.open(png) as image:
        caption = image.info["Description"]
    assert caption == (
        "95% t intervals over replicates (8, n = 800 prompts; 2, n = 600 prompts); dotted: margin "
        "(0, or −0.05 to reach); ticks: single replicates."
    )
    assert editions.draw(verdicts, of_first[:0], lab, False, tmp_path) == []
