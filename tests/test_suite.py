"""What the benchmarks share: statistics, store, tables, profiles, digests, the summary and the drawing of figure 2."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from benchmarks import digests, figure2, store, tables
from benchmarks.__main__ import main
from benchmarks.cells import Cell, Shard
from benchmarks.profile import load_profile, profile_digest
from benchmarks.stats import bootstrap_weights, interval
from benchmarks.sweep import Results

SMOKE = load_profile("smoke")


# --- statistics


def slow_bootstrap(values, rng, resamples):
    """Means of resamples, drawn one by one: replicates, then prompts per objective, with all their samples."""
    replicates, objectives, prompts, samples = values.shape
    means = []
    for _ in range(resamples):
        drawn = []
        for r in rng.integers(replicates, size=replicates):
            for o in range(objectives):
                for p in rng.integers(prompts, size=prompts):
                    drawn += [values[r, o, p, s] for s in range(samples)]
        means.append(np.mean(drawn))
    return np.array(means)


def test_bootstrap_weights_resample_like_the_plain_loop():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 2, 6, 4)) + rng.normal(size=(3, 1, 1, 1)) + rng.normal(size=(3, 2, 6, 1))
    weights = bootstrap_weights(values.shape, 3000, rng)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    means, slow = weights @ values.ravel(), slow_bootstrap(values, rng, 3000)
    np.testing.assert_allclose(np.quantile(means, [0.025, 0.5, 0.975]), np.quantile(slow, [0.025, 0.5, 0.975]), atol=0.12)
    assert means.std() == pytest.approx(slow.std(), rel=0.08)


def test_objectives_are_strata():
    values = np.zeros((1, 2, 10, 3))
    values[:, 1] = 100
    estimate, low, high = interval(values.reshape(-1, 1), bootstrap_weights(values.shape, 200, np.random.default_rng(0)), 0.95)
    assert [estimate[0], low[0], high[0]] == pytest.approx([50, 50, 50], abs=1e-4)


@pytest.mark.parametrize(("replicates", "spread", "expected"), [(1, 0.0, (0.90, 0.98)), (3, 0.0, (0.95, 1.0)), (3, 0.5, (0.65, 0.88))])
def test_coverage_is_what_the_module_says(replicates, spread, expected):
    """Of 95% intervals, when samples of a prompt vary more than prompts; the spread is between worlds."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        values = spread * rng.normal(size=(replicates, 1, 1, 1)) + 0.5 * rng.normal(size=(replicates, 1, 40, 1))
        values = values + rng.normal(size=(replicates, 1, 40, 4))
        _, low, high = interval(values.reshape(-1, 1), bootstrap_weights(values.shape, 300, rng), 0.95)
        hits += low[0] <= 0 <= high[0]
    assert expected[0] <= hits / 200 <= expected[1]


# --- store, profiles, digests


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(made):
        made.write_text("half")
        raise RuntimeError("disk full")

    path = tmp_path / "folder" / "table.csv"
    store.write_text(path, "whole")
    with pytest.raises(RuntimeError, match="disk full"):
        store.write_atomically(path, fail)
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["table.csv"]


def test_frames_come_back_with_their_notes(tmp_path):
    frame = pd.DataFrame({"a": np.array([1, 2], dtype=np.int8), "b": [0.5, 1.5]})
    frame.attrs["thresholds"] = {"0.2": 1.25}
    for name in ("one", "two"):
        store.write_frame(tmp_path / name, frame)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = store.read_frame(tmp_path / "one")
    pd.testing.assert_frame_equal(found, frame)
    assert found.attrs == frame.attrs


def test_a_truncated_frame_is_an_error(tmp_path):
    store.write_frame(tmp_path / "cell", pd.DataFrame({"a": range(1000)}))
    (tmp_path / "cell").write_bytes((tmp_path / "cell").read_bytes()[:100])
    with pytest.raises(ValueError, match="cell is no readable parquet file"):
        store.read_frame(tmp_path / "cell")


def test_profiles_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown profile 'nope', expected one of: lab, smoke"):
        load_profile("nope")
    text = (digests.ROOT / "benchmarks/profiles/smoke.toml").read_text()
    (tmp_path / "bad.toml").write_text(text.replace("documents =", "document ="))
    monkeypatch.setattr("benchmarks.profile.PROFILES", tmp_path)
    with pytest.raises(ValueError, match=r"bad.toml \[training\]: missing documents, unknown document"):
        load_profile("bad")
    for old, new, message in (
        ("claimed = [0.2, 0.5]", "claimed = [0.2, 0.7]", "figure2.claimed must be some of the targets below 1.0, got (0.2, 0.7)"),
        ("targets = [0.2, 0.5, 1.0]", "targets = [0.2, 0.5]", "figure2.targets must be ratios up to and with 1.0, got (0.2, 0.5)"),
        ("betas = [1.0, 4.0]", "betas = [0.0]", "figure2.betas must be numbers above 0, got (0.0,)"),
        ("level = 0.95", "level = 95", "statistics.level must lie between 0 and 1, got 95"),
        ("resamples = 500", "resamples = 0", "statistics.resamples must be at least 1, got 0"),
        ("favourites = 0.25", "favourites = 1.25", "training.favourites must be a share above 0, at most 1, got 1.25"),
        ("samples = 2", "samples = 0", "evaluation.samples must be at least 1, got 0"),
        ("value_epochs = 1", "value_epochs = 0", "training.value_epochs must be above 0, got 0"),
    ):
        assert old in text
        (tmp_path / "bad.toml").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=re.escape(message)):
            load_profile("bad")


def changed(settings, name):
    """The settings with another value in one place, past their own checks."""
    new = copy.copy(settings)
    object.__setattr__(new, name, "changed")
    return new


def test_a_cells_place_in_the_store_follows_the_settings_it_depends_on():
    def places(profile):
        results = Results(profile, None)
        cells = [Cell(0, "qwen3", split) for split in ("test", "validation")]
        return [results.path(shard) for cell in cells for shard in results.shards(cell)[:1]]

    usual = places(SMOKE)
    other_targets = dataclasses.replace(SMOKE, figure2=dataclasses.replace(SMOKE.figure2, targets=(0.2, 0.4, 0.5, 1.0)))
    assert places(other_targets)[0] == usual[0]
    assert places(other_targets)[1] != usual[1]  # it keeps the thresholds of the targets
    more_samples = dataclasses.replace(SMOKE, evaluation=dataclasses.replace(SMOKE.evaluation, samples=3))
    assert places(more_samples) == usual  # a seed's responses do not depend on how many there are
    for field in ("training", "model", "decoding"):
        settings = getattr(SMOKE, field)
        for name in (f.name for f in dataclasses.fields(settings)):
            other = places(dataclasses.replace(SMOKE, **{field: changed(settings, name)}))
            assert not set(other) & set(usual), name


def test_every_setting_changes_the_profile_digest():
    seen = {profile_digest(SMOKE)}
    for field in dataclasses.fields(SMOKE):
        value = getattr(SMOKE, field.name)
        inner = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else [None]
        for name in inner:
            new = changed(value, name) if name else "changed"
            seen.add(profile_digest(dataclasses.replace(SMOKE, **{field.name: new})))
    values = [getattr(SMOKE, field.name) for field in dataclasses.fields(SMOKE)]
    total = 1 + sum(len(dataclasses.fields(value)) if dataclasses.is_dataclass(value) else 1 for value in values)
    assert len(seen) == total


def test_every_part_of_a_cell_changes_its_key():
    cell = Cell(0, "qwen3", "test")
    changes = {"replicate": 1, "family": "llama", "split": "validation", "model": "instruct", "value_model": "value-mean", "gate": "every"}
    changes |= {"target_ratio": 0.3, "threshold": 1.0, "beta": math.inf, "best_of": 2}
    assert set(changes) == {field.name for field in dataclasses.fields(Cell)}
    keys = {Shard(dataclasses.replace(cell, **{name: value}), 0).key("models") for name, value in changes.items()}
    keys |= {Shard(cell, 0).key("models"), Shard(cell, 1).key("models"), Shard(cell, 0).key("other models")}
    assert len(keys) == len(changes) + 3


def test_code_digest_sees_code_and_not_comments():
    same = [digests._without_docstrings(text) for text in ('def f():\n    "A."\n    return 1', "def f():  # note\n    return 1")]
    assert same[0] == same[1] != digests._without_docstrings("def f():\n    return 2")


# --- the summary of figure 2


def rows_of(effect, replicates=2, prompts=6):
    """Rows as a sweep yields them; the judge score of a method is `effect(method, target)` plus noise shared by all methods."""
    seeds = SMOKE.evaluation.samples
    shared = pd.DataFrame(list(np.ndindex(replicates, 3 * prompts, seeds)), columns=["replicate", "prompt", "seed"])
    shared["objective"] = np.array(figure2.OBJECTIVES)[shared["prompt"] // prompts]
    shared["noise"] = np.random.default_rng(0).normal(size=len(shared))
    cells = [("", "base", "never", "", 0.0), ("", "instruct", "never", "", 0.0)]
    for setting in figure2.SETTINGS:
        value_model = figure2.VALUES[setting.split("-")[0]]
        cells += [(setting, "sia", "entropy", value_model, t) for t in (0.2, 0.5)] + [(setting, "dense", "every", value_model, 1.0)]
        if setting != "mean-best":
            cells += [(setting, "random", "random", value_model, t) for t in (0.2, 0.5)]
    constant = {"model": "base", "beta": 1.0, "best_of": 1, "reward": 0.0, "fluency_errors": False, "kl": 0.0, "tokens": 10}
    frames = []
    for family in SMOKE.families:
        for setting, method, gate, value_model, target in cells:
            names = {"family": family, "setting": setting, "method": method, "gate": gate, "value_model": value_model}
            names |= {"target_ratio": target, "steered": int(10 * target), "judge": shared["noise"] + effect(method, target)}
            frames.append(shared.assign(**names, **constant))
    return pd.concat(frames, ignore_index=True)


def pick(summary, **wanted):
    mask = np.logical_and.reduce([summary[name].isna() if value is None else summary[name] == value for name, value in wanted.items()])
    found = summary[mask]
    assert len(found) == 1, found
    return found.iloc[0]


def test_summary_estimates_and_pairs():
    rows = rows_of(lambda method, target: {"sia": 1 + target, "random": target, "dense": 1.5}.get(method, 0.0))
    summary = figure2.summarize(rows.sample(frac=1, random_state=0), SMOKE)
    level = {"setting": "token-1", "family": "qwen3", "metric": "judge", "versus": ""}
    honesty = pick(summary, **level, objective="honesty", method="sia", target_ratio=0.2)
    mask = (rows["setting"] == "token-1") & (rows["family"] == "qwen3") & (rows["method"] == "sia") & (rows["target_ratio"] == 0.2)
    expected = rows[mask & (rows["objective"] == "honesty")]["judge"].mean()
    assert honesty["estimate"] == pytest.approx(expected, abs=1e-4)
    assert honesty["low"] < honesty["estimate"] < honesty["high"]
    assert (honesty["ratio"], honesty["n"], honesty["seeds"], honesty["replicates"]) == (0.2, 12, SMOKE.evaluation.samples, 2)
    assert pick(summary, **level, objective="all", method="sia", target_ratio=0.2)["n"] == 36
    assert honesty["estimate_by_replicate"].count("|") == 1
    assert honesty["beta_by_replicate"] == "1|1"
    # paired: the noise is shared, so a constant effect has an interval of no width, in whatever order the rows come
    common = {"setting": "token-1", "metric": "judge", "objective": "all"}
    for wanted, value in (
        ({"family": "qwen3", "method": "sia", "target_ratio": 0.2, "versus": "dense"}, -0.3),
        ({"family": "llama", "method": "sia", "target_ratio": 0.5, "versus": "random"}, 1.0),
        ({"family": "all", "method": "sia-claimed", "target_ratio": None, "versus": "dense"}, (0.2 + 0.5) / 2 - 0.5),
    ):
        found = pick(summary, **common, **wanted)
        assert [found["estimate"], found["low"], found["high"]] == pytest.approx([value] * 3, abs=2e-4)


def test_summary_columns_begin_as_promised():
    summary = figure2.summarize(rows_of(lambda *_: 0.0), SMOKE)
    promised = "objective family model value_model method gate target_ratio ratio beta best_of metric estimate low high n seeds"
    assert summary.columns[:16].tolist() == promised.split()
    keys = ["objective", "family", "setting", "method", "target_ratio", "versus", "metric"]
    assert not summary.duplicated(keys).any()


@pytest.mark.parametrize(("gain", "says"), [(0.5, "beats dense"), (-0.5, "falls short of dense"), (0.0, "cannot be told from dense")])
def test_verdict_follows_the_interval(gain, says):
    summary = figure2.summarize(rows_of(lambda method, target: gain if method == "sia" else 0.0), SMOKE)
    sentences = figure2.verdict(summary, SMOKE)
    assert len(sentences) == 4
    for sentence in sentences:
        assert f"SIA at 20% to 50% {says}: {gain:+.2f} [{gain:+.2f}, {gain:+.2f}]" in sentence


def test_methods_must_share_prompts_and_seeds():
    rows = rows_of(lambda *_: 0.0)
    dropped = rows[(rows["method"] == "dense") & (rows["prompt"] == 3)].index
    with pytest.raises(ValueError, match="every method must be measured on the same prompts and seeds"):
        figure2.summarize(rows.drop(dropped), SMOKE)


def test_realised_ratios_stand_on_both_sides_of_a_difference():
    rows = rows_of(lambda *_: 0.0)
    rows.loc[(rows["method"] == "random") & (rows["target_ratio"] == 0.2) & (rows["objective"] == "honesty"), "steered"] = 3
    summary = figure2.summarize(rows, SMOKE)
    wanted = {"family": "llama", "setting": "mean-1", "metric": "judge", "method": "sia", "target_ratio": 0.2, "versus": "random"}
    assert pick(summary, **wanted, objective="honesty")[["ratio", "versus_ratio"]].tolist() == [0.2, 0.3]
    assert pick(summary, **wanted, objective="all")[["ratio", "versus_ratio"]].tolist() == [0.2, 0.2333]


def test_agreement_with_the_committed_table():
    rows = rows_of(lambda *_: 0.0)
    committed = figure2.summarize(rows, SMOKE)
    first = figure2.summarize(rows[rows["replicate"] == 0], SMOKE)
    assert "100% are those of the committed first replicate to the last digit (largest difference 0.0000)" in figure2.agreement(
        first, committed
    )
    moved = figure2.summarize(rows_of(lambda *_: 50.0), SMOKE)
    says = figure2.agreement(moved, committed)
    assert "0% are those of the committed first replicate to the last digit (largest difference 50.0000), and 0% lie inside" in says


# --- tables and the command line


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of figure 2 for the smoke profile in a temporary folder."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr("benchmarks.__main__.ROOT", tmp_path)
    rows = rows_of(lambda method, target: target)
    tables.write_table(SMOKE, "figure2", rows, figure2.summarize(rows, SMOKE), range(2), 1.0)
    return tmp_path


def test_figure_is_drawn_from_the_table(table, capsys):
    assert main(["figure2", "--profile", "smoke"]) == 0
    printed = capsys.readouterr().out
    assert "figure2: drawing the table in results/smoke, nothing is measured (FRESH=1 measures again)" in printed
    assert "figure2: figures/smoke/figure2.png, figures/smoke/figure2.pdf" in printed
    drawn = [(table / "figures/smoke" / name).read_bytes() for name in ("figure2.png", "figure2.pdf")]
    assert drawn[0].startswith(b"\x89PNG")
    assert drawn[1].startswith(b"%PDF")
    assert main(["figures", "--profile", "smoke"]) == 0
    assert drawn == [(table / "figures/smoke" / name).read_bytes() for name in ("figure2.png", "figure2.pdf")]


def test_a_table_of_other_settings_is_drawn_as_stale(table, capsys):
    main(["figure2", "--profile", "smoke"])
    fresh = (table / "figures/smoke/figure2.png").read_bytes()
    path = table / "results/smoke/figure2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"profile_digest": "0123456789abcdef"}))
    assert main(["figure2", "--profile", "smoke"]) == 0
    assert "warning: figure2.csv was measured under other settings" in capsys.readouterr().err
    assert (table / "figures/smoke/figure2.png").read_bytes() != fresh


@pytest.mark.parametrize("file", ["figure2.csv", "figure2.parquet"])
def test_a_changed_table_is_refused(table, capsys, file):
    path = table / "results/smoke" / file
    path.write_bytes(path.read_bytes()[:-7])
    assert main(["figure2", "--profile", "smoke"]) == 2
    assert f"{file} is missing or not the file that figure2.json describes" in capsys.readouterr().err


def test_provenance_says_where_the_numbers_come_from(table):
    provenance = json.loads((table / "results/smoke/figure2.json").read_text())
    assert provenance["profile_digest"] == profile_digest(SMOKE)
    assert provenance["sha256"]["figure2.csv"] == tables.sha256(table / "results/smoke/figure2.csv")
    assert {"command", "git_commit", "packages", "hardware", "seeds", "replicates", "wall_seconds", "intervals"} <= set(provenance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure2", "--profile", "nope"], "error: unknown profile 'nope', expected one of: lab, smoke"),
        (["reproduce", "--replicates", "9"], "error: replicates must be 1 to 3 for the profile lab, got 9"),
    ],
)
def test_bad_arguments_end_in_one_sentence(arguments, message, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == message + "\n"


def test_unknown_figures_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["figure9"])
    assert stopped.value.code == 2
    assert "figure2" in capsys.readouterr().err


COMMITTED = digests.ROOT / "results/lab"


@pytest.mark.skipif(not (COMMITTED / "figure2.json").exists(), reason="no measured lab table in results/lab")
def test_the_lab_table_follows_from_its_rows():
    lab = load_profile("lab")
    summary, stale = tables.read_table(lab, "figure2")
    assert not stale
    again = figure2.summarize(store.read_frame(COMMITTED / "figure2.parquet"), lab)
    keys = ["objective", "family", "setting", "method", "target_ratio", "versus", "metric"]
    assert again[keys].fillna(-1).equals(summary[keys].fillna(-1))
    for name in ("estimate", "low", "high"):
        np.testing.assert_allclose(again[name], summary[name], atol=2e-4)


@pytest.mark.skipif(not (COMMITTED / "figure2.json").exists(), reason="no measured lab table in results/lab")
def test_the_readme_says_what_the_committed_table_says():
    lab = load_profile("lab")
    committed = tables.read_reference(lab, "figure2")
    readme = " ".join((digests.ROOT / "README.md").read_text(encoding="utf-8").split())
    for sentence in figure2.verdict(committed, lab):
        assert sentence in readme
