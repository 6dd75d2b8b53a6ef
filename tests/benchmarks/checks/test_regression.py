"""`make check`: what is equal passes, noise passes, and a metric that moved is named."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.analysis import tables
from benchmarks.checks import regression
from benchmarks.figures.registry import FIGURES
from benchmarks.spec.profile import load_profile

PROFILE = load_profile("check")
MODELS = json.loads((tables.folder(PROFILE) / regression.PROVENANCE).read_text())["models"]
OTHER_MODELS = dict.fromkeys(MODELS, "trained on another processor")


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(regression, "RESAMPLES", 20_999)  # enough for one of 60 hypotheses


@pytest.fixture(scope="module")
def committed() -> dict[str, pd.DataFrame]:
    return regression.read_committed(PROFILE, FIGURES)


def moved(rows: dict[str, pd.DataFrame], noise: float, shift: float, seed: int = 0) -> dict:
    """Add noise to every judge score, and `shift` under the entropy gate."""
    rng, scored = np.random.default_rng(seed), {}
    for name, frame in rows.items():
        if "judge" in frame:
            change = noise * rng.normal(size=len(frame)) + shift * (frame["gate"] == "entropy")
            scored[name] = frame.assign(judge=frame["judge"] + change)
    return rows | scored


def test_the_same_models_must_give_the_same_rows(committed, capsys):
    assert regression.compare(committed, MODELS, committed, MODELS) == []
    assert (
        f"rows: {len(committed)} of {len(committed)} tables are equal to the last digit"
        in capsys.readouterr().out
    )
    rows = dict(committed)
    rows["figure1"] = rows["figure1"].assign(kl=rows["figure1"]["kl"] * np.float32(1.0001))
    rows["figure2"] = rows["figure2"].assign(threshold=rows["figure2"]["threshold"] * (1 + 1e-7))
    rows["table1"] = rows["table1"].assign(threshold=rows["table1"]["threshold"] * (1 + 1e-4))
    rows["theory"] = rows["theory"].iloc[1:]
    assert regression.compare(rows, MODELS, committed, MODELS) == [
        "by the same models, figure1 differs in kl",
        "by the same models, table1 differs in threshold",
        "by the same models, theory has other columns or another number of rows",
    ]
    assert regression.compare(rows, OTHER_MODELS, committed, MODELS) == []


def test_noise_passes_and_a_shift_is_named(committed, capsys):
    rows = [moved(committed, 1.0, 0.0, seed) for seed in range(2)]
    assert [regression.compare(r, OTHER_MODELS, committed, MODELS) for r in rows] == [[], []]
    printed = capsys.readouterr().out
    assert f"models: 0 of {len(MODELS)} are the committed ones to the last bit" in printed
    assert "visible" in printed
    faults = regression.compare(moved(committed, 1.0, 1.5), OTHER_MODELS, committed, MODELS)
    first, second = faults
    assert re.fullmatch(r"judge of sia moved by \+1\..* \(p = .*\)", first)
    assert second.startswith("judge of sia, best of several moved by ")


def test_removed_and_added_metrics_are_named(committed):
    scored = {name: frame for name, frame in committed.items() if "judge" in frame}
    fewer = {name: frame[frame["method"] != "random"] for name, frame in scored.items()}
    for rows, before, change in (
        (fewer, scored, "is no longer measured on every prompt"),
        (scored, fewer, "is measured on prompts that have no committed value"),
    ):
        assert regression.compare(rows, OTHER_MODELS, before, MODELS) == [
            f"{metric} of random {change}" for metric in ("judge", "kl", "reward", "steered")
        ]


def test_about_eighty_hypotheses_are_tested(committed):
    values = regression.per_prompt(committed)
    results, _ = regression.paired_tests(values, values)
    assert 65 <= results["p"].notna().sum() <= 95
    few = results[results["p"].isna()]
    assert set(few["method"]) == {"transfer-q"}  # measured on two prompts of each objective
    assert few["visible"].isna().all()


@pytest.mark.parametrize("prompts", [24, 45])
def test_a_visible_difference_is_mostly_seen_and_noise_is_not(prompts):
    """At the level that the first of 60 hypotheses meets."""
    noises = np.random.default_rng(prompts).normal(size=(16, prompts))
    shifted = [noise + regression.visible(noise, 0.0, 0.1, 60) for noise in noises]
    seen = [regression.p_value(x, 0.1) <= regression.LEVEL / 60 for x in shifted]
    alarms = [regression.p_value(noise, 0.0) <= 0.1 for noise in noises]
    assert 0.6 <= np.mean(seen) <= 0.98
    assert np.mean(alarms) <= 0.3


def test_a_difference_within_the_tolerance_is_no_change():
    difference = np.random.default_rng(0).normal(0.3, 0.1, 45)
    assert regression.p_value(difference, 0.0) < 1e-4
    assert regression.p_value(difference, 0.35) == 1.0


def test_the_command_passes_fails_and_says_why(committed, monkeypatch, capsys, tmp_path):
    measured = dict(committed)
    monkeypatch.setattr(regression, "measure_again", lambda *_: (measured, MODELS))
    assert main(["check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "check: passed"
    measured |= moved(committed, 0.0, 3.0)
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "changed: by the same models, figure1 differs in judge" in printed
    assert "changed: judge of sia moved by +3 (p = " in printed
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert main(["check"]) == 2
    error = capsys.readouterr().err
    assert "provenance.json is missing, there is nothing to compare with: restore it" in error
    assert main(["check", "--fresh"]) == 0
    measured |= committed
    capsys.readouterr()
    assert main(["check"]) == 1
    assert "judge of sia moved by -3" in capsys.readouterr().out


def test_rows_are_compared_in_their_order_whatever_their_index():
    rows = pd.DataFrame({"judge": [1.0, np.nan], "seconds": [1.0, 2.0]})
    measured = {"cost": rows.assign(seconds=3.0).set_index(pd.Index([4, 4]))}
    assert regression.row_differences(measured, {"cost": rows}) == []
    assert regression.row_differences(measured, {"cost": rows[::-1]}) == ["cost differs in judge"]
