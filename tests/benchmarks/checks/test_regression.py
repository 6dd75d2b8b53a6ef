"""`make check`: what is equal passes, noise passes, and a metric that moved is named."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from benchmarks.__main__ import main
from benchmarks.analysis import tables
from benchmarks.checks import regression
from benchmarks.spec.profile import load_profile

PROFILE = load_profile("check")
MODELS = {"base": "trained here"}
OTHER_MODELS = {"base": "trained on another processor"}


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(regression, "RESAMPLES", 20_999)  # enough for one of 60 hypotheses


@pytest.fixture(scope="module")
def rows() -> dict[str, pd.DataFrame]:
    """Tables of which the first has all committed metrics, a row for each response."""
    metrics = regression.read_committed(PROFILE).metrics.stack().unstack("metric").reset_index()
    objective, number = zip(*metrics["prompt"].str.split(), strict=True)
    figure1 = metrics.assign(objective=objective, prompt=number, threshold=1.0, seconds=np.nan)
    return {"figure1": figure1, "theory": pd.DataFrame({"regret": [0.1, 0.2, np.nan]})}


def measurement(rows: dict[str, pd.DataFrame], models: dict[str, str] = MODELS):
    return regression.Measurement.of(rows, models)


def moved(rows: dict[str, pd.DataFrame], noise: float, shift: float, seed: int = 0) -> dict:
    """Add noise to every judge score, and `shift` to those of SIA."""
    rng, frame = np.random.default_rng(seed), rows["figure1"]
    change = noise * rng.normal(size=len(frame)) + shift * frame["method"].str.startswith("sia")
    return rows | {"figure1": frame.assign(judge=frame["judge"] + change)}


def test_the_committed_metrics_survive_the_way_through_rows(rows):
    committed = regression.read_committed(PROFILE)
    pd.testing.assert_frame_equal(regression.per_prompt(rows), committed.metrics)
    assert regression.compare(replace(committed, models={}), committed) == []


def test_the_same_models_must_give_the_same_rows(rows, capsys):
    committed, figure1 = measurement(rows), rows["figure1"]
    shuffled_index = {name: frame.set_index(np.zeros(len(frame))) for name, frame in rows.items()}
    timed = figure1.assign(seconds=1.0, threshold=figure1["threshold"] * (1 + 1e-7))
    for same in (shuffled_index, rows | {"figure1": timed.assign(seconds=np.nan)}):
        assert regression.compare(measurement(same), committed) == []
        assert "rows: 2 of 2 tables are equal to the last digit" in capsys.readouterr().out
    changed = {
        "figure1": figure1.assign(kl=figure1["kl"] * np.float32(1.0001), extra=1),
        "theory": rows["theory"].iloc[::-1],
    }
    assert regression.compare(measurement(changed), committed) == [
        "by the same models, figure1 differs in extra, kl",
        "by the same models, theory differs in regret",
    ]
    assert regression.compare(measurement(changed, OTHER_MODELS), committed) == []


def test_noise_passes_and_a_shift_is_named(rows, capsys):
    committed = measurement(rows)
    for seed in range(2):
        noisy = measurement(moved(rows, 1.0, 0.0, seed), OTHER_MODELS)
        assert regression.compare(noisy, committed) == []
    printed = capsys.readouterr().out
    assert "models: 0 of 1 are the committed ones to the last bit" in printed
    assert "visible" in printed
    first, second = regression.compare(measurement(moved(rows, 1.0, 1.5), OTHER_MODELS), committed)
    assert re.fullmatch(r"judge of sia moved by \+1\..* \(p = .*\)", first)
    assert second.startswith("judge of sia, best of several moved by ")


def test_removed_and_added_metrics_are_named(rows):
    frame = rows["figure1"]
    fewer = rows | {"figure1": frame[frame["method"] != "random"]}
    for measured, committed, change in (
        (fewer, rows, "is no longer measured on every prompt"),
        (rows, fewer, "is measured on prompts that have no committed value"),
    ):
        assert regression.compare(measurement(measured, OTHER_MODELS), measurement(committed)) == [
            f"{metric} of random {change}" for metric in ("judge", "kl", "reward", "steered")
        ]


def test_a_new_table_is_named_and_a_new_model_keeps_the_comparison_exact(rows):
    committed = measurement(rows)
    new = {"figure6": pd.DataFrame({"regret": [0.1]})}
    uncovered = "figure6 has no committed columns to compare with: make check FRESH=1 adds them"
    for models in (MODELS, OTHER_MODELS):
        assert regression.compare(measurement(rows | new, models), committed) == [uncovered]
    changed = {"theory": rows["theory"].iloc[::-1]}
    assert regression.compare(
        measurement(rows | new | changed, MODELS | {"large": "new"}), committed
    ) == [uncovered, "by the same models, theory differs in regret"]


def test_about_eighty_hypotheses_are_tested():
    values = regression.read_committed(PROFILE).metrics
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


def test_the_command_passes_fails_and_says_why(rows, monkeypatch, capsys, tmp_path):
    measured = [measurement(rows)]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(regression, "measure_again", lambda *_: measured[-1])
    assert main(["check"]) == 2
    error = capsys.readouterr().err
    assert "provenance.json is missing, there is nothing to compare with: restore it" in error
    assert main(["check", "--fresh"]) == 0
    assert main(["check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "check: passed"
    measured.append(measurement(moved(rows, 0.0, 3.0)))
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "changed: by the same models, figure1 differs in judge" in printed
    assert "changed: judge of sia moved by +3 (p = " in printed


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("sha256", "provenance.json does not say sha256 (damaged?): restore it, or measure again"),
        ("models", "provenance.json lacks models: restore it, or run make check FRESH=1"),
        ("value", "metrics.parquet is missing or not the file that provenance.json describes"),
        ("value, hash", "metrics.parquet lacks value: restore it, or run make check FRESH=1"),
    ],
)
def test_damaged_records_are_named(rows, monkeypatch, capsys, tmp_path, lost, message):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    regression.write(PROFILE, measurement(rows), 0.0)
    path, metrics = (tmp_path / "check" / name for name in ("provenance.json", "metrics.parquet"))
    provenance = json.loads(path.read_text())
    if lost.startswith("value"):
        pd.read_parquet(metrics).drop(columns="value").to_parquet(metrics)
    else:
        del provenance[lost]
    if lost.endswith("hash"):
        provenance["sha256"][metrics.name] = tables.sha256(metrics)
    path.write_text(json.dumps(provenance))
    assert main(["check"]) == 2
    assert message in capsys.readouterr().err
