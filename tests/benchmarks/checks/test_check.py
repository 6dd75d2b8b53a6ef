"""`make check`: that nothing changed passes, that every planted fault is seen, and that noise is not taken for a fault."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sia._decoding
import sia.batch
import sia.scorers.base
import sia.scorers.reward
import sia.scorers.value_model
import sia.search
import sia.theory
from benchmarks.__main__ import main
from benchmarks.analysis import bootstrap, claims, estimates, tables
from benchmarks.checks import check, exact, exact_settings, regression
from benchmarks.engine import calibration, measure
from benchmarks.figures import cost, figure1, figure5
from benchmarks.figures.registry import FIGURES
from benchmarks.spec import cells
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab import judge, quality, replicate
from sia import _prefix_cache, _sampling, gates, likelihood, training
from sia.integrations import transformers
from sia.scorers import published
from tests.helpers.fake import FakeResults

EXPECTED = json.loads(
    (check.reference(load_profile("check")) / check.EXACT).read_text(encoding="utf-8")
)["values"]
ARITHMETIC = json.loads(
    (check.reference(load_profile("check")) / check.MODELS).read_text(encoding="utf-8")
)["arithmetic"]
SMOKE = load_profile("smoke")


def wrong(section: str, only: str = "") -> list[str]:
    """What the exact half of the check says of this section, of one family where it has several. only: one case of it."""
    expected = {
        case: values for case, values in EXPECTED[section].items() if not case.startswith("llama")
    }
    if only:
        expected = {case: expected[case] for case in (f"qwen3, {only}", "qwen3, calibrated")}
    return list(exact.differences(exact.compute([section])[section], expected, section))


@pytest.fixture(autouse=True)
def one_family(monkeypatch):
    monkeypatch.setattr(exact, "FAMILIES", ("qwen3",))


@pytest.mark.parametrize("section", EXPECTED)
def test_nothing_changed_passes(section, monkeypatch):
    monkeypatch.setattr(exact, "FAMILIES", ("qwen3", "llama"))
    assert list(exact.differences(exact.compute([section])[section], EXPECTED[section])) == []


def wrap(monkeypatch, owner, name, change) -> None:
    """Puts change(original, *arguments) in the place of owner.name."""
    original = getattr(owner, name)
    monkeypatch.setattr(
        owner, name, lambda *arguments, **further: change(original, *arguments, **further)
    )


def stale_cache(original, self, rows, totals, last, outputs=0, branches=None):
    """The caches of the candidates are not cropped off: the first of them is taken for the token that followed."""
    output = original(self, rows, totals, last, outputs, branches)
    self.cached[rows] = (totals + (branches is not None)).clamp(max=self.capacity - 1)
    return output


def mask_of_another_row(original, self, cached, fresh, prefix, *arguments):
    return original(self, cached.roll(1).clamp(max=prefix), fresh, prefix, *arguments)


def value_of_the_prefix(original, session, rows, responses, branches, ends):
    before = session.prefixes.last(rows, responses, torch.full_like(rows, responses.shape[1]))
    return before[:, None].expand(-1, branches.shape[1])


class Forgetful(dict):
    """Counts nothing."""

    def __missing__(self, key):
        return 0

    def __setitem__(self, key, value):
        pass


FAULTS = {
    "β with its sign flipped": (sia._decoding, "tilt", lambda tilt, base, values, beta: tilt(base, values, -beta), "decoding: entropy"),
    "gate inverted": (gates.ThresholdGate, "opens", lambda opens, *a: ~opens(*a), "decoding: entropy"),
    "candidate values shuffled": (sia.scorers.value_model.ValueSession, "score", lambda score, *a: score(*a).flip(1), "decoding: entropy"),
    "mask of another row": (_prefix_cache.CachedPrefixes, "_mask", mask_of_another_row, "decoding: entropy"),
    "entropy in bits": (sia._decoding, "entropy", lambda entropy, logits: entropy(logits) / math.log(2), "decoding: entropy"),
    "value read one position early": (sia.scorers.base.CachedSession, "read_branches", value_of_the_prefix, "decoding: dense"),
    "temperature ignored": (_sampling, "choose", lambda choose, logits, noise, _: choose(logits, noise, 1.0), "decoding: greedy"),
    "stale cache after a junction": (_prefix_cache.CachedPrefixes, "_catch_up", stale_cache, "decoding: random"),
    "floor ignored": (sia._decoding, "drop_improbable", lambda _, steered, *a: steered, "decoding: floor"),
    "KL the other way round": (sia._decoding, "kl_divergence", lambda kl, q, p: kl(p, q), "decoding: entropy"),
    "seed ignored": (_sampling, "prompt_keys", lambda keys, p, seeds, *a: keys(p, [0] * len(seeds), *a), "decoding: another seed"),
    "values behind the temperature": (
        sia._decoding, "tilt", lambda tilt, base, values, beta: tilt(base, values, 0.6 * beta), "decoding: dense",
    ),
    "noise of another step": (_sampling, "step_keys", lambda keys, rows, steps: keys(rows, steps + 1)[:, 1:], "decoding: unsteered"),
    "worst of N": (sia.scorers.reward.CachedRewards, "score_responses", lambda rate, *a: -rate(*a), "searches"),
    "likelihood without tilt": (likelihood, "tilt", lambda _, base, values, beta: base, "likelihoods"),
    "other loss": (training, "distillation_loss", lambda loss, v, m, r, _: loss(v, m, r, "mean"), "losses"),
    "prompt among the response": (training, "pad_pairs", lambda pad, p, r, d: pad([[1]] * len(p), r, d), "losses"),
    "judge forgives repetition": (judge, "cut", lambda cut, points: cut(points + 0.8), "lab_texts"),
    "entropies a little off": (exact, "entropy", lambda entropy, logits: entropy(logits) * 1.001, "equations"),
    "half an interval": (bootstrap, "interval", lambda interval, v, w, level: interval(v, w, level / 2), "statistics"),
    "undecided is reproduced": (
        claims, "decide", lambda decide, *a: decide(*a).replace("undecided", "reproduced"), "statistics",
    ),
    "quality of another half": (quality, "heldout_value_loss", lambda loss, v, r, kind: loss(v, r, "mean"), "models"),
    "thresholds as first found": (calibration, "choose_threshold", lambda choose, target, found, *a: found[0], "settling"),
    "the weakest β": (calibration.Calibrator, "score", lambda score, self, cell: -cell.beta, "settling"),
    "all samples of a prompt alike": (transformers, "Counter", lambda counter: Forgetful(), "entry_points"),
    "published head doubled": (published, "linear_head", lambda head, s, f: head({k: 2 * v for k, v in s.items()}, f), "entry_points"),
    "texts without a beginning": (
        sia.batch, "tokenize", lambda ids, *a: [one[one[0] == 1 and len(one) > 1 :] for one in ids(*a)], "entry_points",
    ),
    "searches at temperature 1": (
        sia.search, "begin", lambda begin, *a, **k: begin(*a[:7], 1.0, *a[8:], **k), "further_searches",
    ),
    "rewards of prompts in another template": (
        sia.search, "prompt_ids", lambda ids, tokenizer, prompts, other, name: ids(tokenizer, prompts, None, name), "further_searches",
    ),
    "value of a response read early": (
        sia.scorers.value_model.ValueSession, "score_responses", lambda rate, self, rows, r, n: rate(self, rows, r, (n - 1).clamp(min=1)), "further_searches",
    ),
    "likelihood without floor": (likelihood, "drop_improbable", lambda _, steered, *a: steered, "further_likelihoods"),
    "steps in any order": (judge, "judge_howto", lambda score, item, said: score(item, said[::-1]), "rubric"),
    "evidence for anything": (
        judge, "judge_fact", lambda score, item, said: score(item, [s for s in said if s.kind != "evidence"]), "rubric",
    ),
    "one world for all replicates": (replicate, "WorldConfig", lambda config, **k: config(**{**k, "seed": 0}), "replicates"),
    "worlds that drift alike": (replicate, "WorldConfig", lambda config, **k: config(**{**k, "drift": 0.16}), "replicates"),
    "bound over twice the range": (sia.theory, "largest_regret", lambda bound, a, r, beta: bound(a, 2 * r, beta), "bounds"),
    "differences the other way round": (estimates, "difference", lambda minus, a, b: minus(b, a), "summaries"),
    "a window too long": (_prefix_cache, "attention_windows", lambda windows, *a: [w and w + 1 for w in windows(*a)], "architectures"),
    "regret of the wrong policy": (sia.theory, "optimal_policy", lambda best, base, values, beta: best(base, values, 2 * beta), "laws"),
    "stopping criteria ignored": (transformers, "StoppingCriteriaList", lambda make, given: make([]), "transformers_way"),
    "greedy is sampled": (
        transformers, "Decoding", lambda make, *a, **k: make(*a, **{**k, "temperature": 1.0}), "transformers_way",
    ),
    "processors see a token less": (
        sia._decoding.Decoding, "_ids", lambda ids, self, tokens: ids(self, max(0, tokens - 1)), "transformers_way",
    ),
    "one end alone": (sia.batch, "eos_token_ids", lambda ids, config, further: [further], "ends"),
    "ends of rewards ignored": (
        sia.scorers.reward.RewardScorer, "__init__", lambda make, self, model, end=None, stops=(): make(self, model, end), "ends",
    ),
    "rewards of another row": (
        sia.scorers.reward.WholeRewards, "_rewards", lambda rewards, self, rows, texts: rewards(self, rows.flip(0), texts), "shapes",
    ),
    "rollouts out of their window": (
        _prefix_cache.CachedPrefixes, "grow", lambda grow, self, tokens, depth: grow(self, tokens, depth + 4), "shapes",
    ),
    "opens above its threshold alone": (
        gates.ThresholdGate, "opens",
        lambda opens, self, step: opens(replace(self, threshold=float(np.nextafter(np.float32(self.threshold), np.float32(9)))), step),
        "edges",
    ),
    "lengths in a byte": (
        measure, "lengths", lambda lengths, r: {k: v.astype("int8") for k, v in lengths(r).items()}, "edges",
    ),
    "the other end of the Pareto front": (cost, "pareto", lambda front, costs, scores: front(costs, -scores), "drawings"),
    "a store deaf to the sweep": (cells.Shard, "key", lambda key, self, what, digest, *a: key(self, what, digest), "places"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    owner, name, change, section = FAULTS[fault]
    section, _, only = section.partition(": ")
    if only:  # one of its cases, which is quicker
        wrap(monkeypatch, exact, "cases", lambda cases, *a: {only: cases(*a)[only]})
        assert wrong(section, only) == []
    wrap(monkeypatch, owner, name, change)
    assert wrong(section, only) != []


def test_a_second_replicate_that_is_the_first_again_is_seen(monkeypatch):
    """By the summaries of two; of one figure, which is quicker."""
    monkeypatch.setattr(exact_settings, "FIGURES", {"figure1": FIGURES["figure1"]})
    expected = EXPECTED["two_replicates"]["figure1"]
    assert (
        list(
            exact.differences(
                exact.compute(["two_replicates"])["two_replicates"]["figure1"], expected
            )
        )
        == []
    )
    wrap(monkeypatch, estimates, "ends_of", lambda ends, part, profile: ends(part[:1], profile))
    assert (
        list(
            exact.differences(
                exact.compute(["two_replicates"])["two_replicates"]["figure1"], expected
            )
        )
        != []
    )


def test_rows_with_a_wrong_column_are_seen(monkeypatch):
    """Of what the sweep makes of responses, not of the responses."""
    wrap(
        monkeypatch,
        measure,
        "distinct_bigrams",
        lambda distinct, *a: [2 * share for share in distinct(*a)],
    )
    found = wrong("lab_rows")
    assert found
    assert all("/distinct" in text for text in found)


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        ({"a": 1}, {"a": 2}, ["s/a is 1, expected 2"]),
        ({"a": 1.0}, {"a": 1.00001}, []),
        ({"a": 1.0}, {"a": 1.001}, ["s/a is 1.0, expected 1.001"]),
        ({"a": True}, {"a": 1}, ["s/a is True, expected 1"]),
        ({"a": [1, 2]}, {"a": [1]}, ["s/a has 2 entries, expected 1"]),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["s/a[1] is 2, expected 3"]),
        ({"a": 1}, {"b": 1}, ["s/b is missing", "s/a is new"]),
        ({"a": "inf"}, {"a": 1.0}, ["s/a is 'inf', expected 1.0"]),
        ({"a": 1.0}, {"a": 1}, ["s/a is 1.0, expected 1"]),
    ],
)
def test_differences_say_where(found, expected, said):
    assert list(exact.differences(found, expected, "s")) == said


# --- statistics


def slow_sign_flip(differences: np.ndarray, tolerance: float) -> float:
    """Over all sign patterns."""
    mean = differences.mean()
    if abs(mean) <= tolerance:
        return 1.0
    shifted = differences - np.sign(mean) * tolerance
    means = [
        abs(np.mean(np.array(signs) * shifted))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    return float(np.mean(np.array(means) >= abs(shifted.mean()) - 1e-9))


@given(st.lists(st.integers(-8, 8), min_size=3, max_size=9), st.sampled_from([0.0, 0.5]))
@settings(max_examples=15, deadline=None)
def test_sign_flips_are_those_of_the_plain_loop(values, tolerance):
    differences = np.array(values, float)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regression, "FLIPS", 2**16)
        p = regression.sign_flip(
            differences[None], np.array([tolerance]), np.random.default_rng(0)
        )[0]
    assert p == pytest.approx(slow_sign_flip(differences, tolerance), abs=0.01)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.sampled_from([0.01, 0.05, 0.3]))
def test_holm_rejects_step_by_step(p, level):
    rejected, left = np.zeros(len(p), bool), list(range(len(p)))
    while left:
        smallest = min(left, key=lambda i: p[i])
        if p[smallest] > level / len(left):
            break
        rejected[smallest] = True
        left.remove(smallest)
    assert (regression.holm(np.array(p), level) == rejected).all()


def test_false_alarms_are_rare(monkeypatch):
    """Of builds of 40 tests on 45 prompts whose differences are noise, few sound an alarm."""
    monkeypatch.setattr(regression, "FLIPS", 2**14)
    monkeypatch.setattr(regression, "LEVEL", 0.1)
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(60):
        noise = rng.normal(size=(40, 45)) * rng.gamma(2, size=(40, 1))
        alarms += regression.run(noise, np.zeros(40), np.zeros(40), rng).rejected.any()
    assert alarms <= 12  # 10% of 60 expected; more than this with a chance of 1%


@pytest.mark.parametrize("prompts", [24, 45])
def test_what_is_called_visible_is_mostly_seen(prompts):
    """At the level, and among as many tests, as `make check` has; the others hold no difference."""
    rng, tests, seen = np.random.default_rng(prompts), 1100, 0
    for _ in range(12):
        noise = np.zeros((tests, prompts))
        noise[0] = rng.normal(size=prompts)
        visible = (
            regression.run(noise, np.zeros(tests), np.zeros(tests), rng).visible[0] / noise[0].std()
        )
        noise[0] = rng.normal(size=prompts) + visible
        seen += regression.run(noise, np.zeros(tests), np.zeros(tests), rng).rejected[0]
    assert 6 <= seen <= 12  # 9.6 expected


def test_a_shift_within_the_tolerance_is_no_change():
    rng = np.random.default_rng(0)
    shifted = rng.normal(size=(1, 45)) * 0.1 + 0.3
    assert regression.run(shifted, np.zeros(1), np.zeros(1), rng).rejected.all()
    assert not regression.run(shifted, np.zeros(1), np.array([0.35]), rng).rejected.any()


def test_too_few_prompts_are_said_to_be_too_few():
    found = regression.run(
        np.array([[1.0, 1, 1, np.nan], [np.nan] * 3 + [1]]),
        np.zeros(2),
        np.zeros(2),
        np.random.default_rng(0),
    )
    assert np.isnan(found.p).all()
    assert not found.rejected.any()
    assert regression.fewest_prompts(10) == 11


# --- tables


def rows_of(effect=lambda cell: 0.0) -> dict[str, pd.DataFrame]:
    profile = load_profile("smoke")
    results = FakeResults(profile, effect)
    return {
        name: figure.collect(profile, range(1), results)
        for name, figure in (("figure1", figure1), ("figure5", figure5))
    }


@pytest.fixture(scope="module")
def committed() -> dict[str, pd.DataFrame]:
    return rows_of()


def retraining(tolerance: float = 0.0) -> pd.DataFrame:
    metrics = pd.Index(["judge", "reward", "kl", "tokens", "steered", "junctions"], name="metric")
    return pd.DataFrame({"tolerance": tolerance, "others": [0.0, 0.1, *[0.0] * 4]}, metrics)


def compare(again, committed, tolerance=0.0) -> list[str]:
    return check.compare(
        check.per_prompt(again)[0], check.per_prompt(committed)[0], retraining(tolerance)
    )


def noisy(rows: pd.DataFrame, shift: float, seed: int = 0) -> pd.DataFrame:
    """Other samples: each response's score moves by itself, those of the entropy gate by `shift` too."""
    rng = np.random.default_rng(seed)
    moved = rows["judge"] + rng.normal(size=len(rows)) + shift * (rows["gate"] == "entropy")
    return rows.assign(judge=moved.astype("float32"))


def test_the_same_rows_pass_and_every_cell_is_listed(committed, capsys):
    assert compare(committed, committed) == []
    printed = capsys.readouterr().out
    cells = check.per_prompt(committed)[0]["cell"].unique()
    assert len(cells) > 20
    for cell in cells:
        assert f"  {cell}: " in printed
    assert "chance of a false alarm 1% (Holm)" in printed
    assert "judge +0 (" in printed


def test_metrics_that_cannot_be_tested_are_named(committed, capsys):
    few = committed["figure1"][committed["figure1"]["prompt"] < 1]
    assert compare({"figure1": few}, {"figure1": few}) == []
    assert "; too few prompts" not in (printed := capsys.readouterr().out)
    assert ": too few prompts to test " in printed
    assert "judge +0" in printed


def test_noise_passes_and_a_shift_does_not(committed):
    for seed in range(3):
        assert (
            compare(committed | {"figure1": noisy(committed["figure1"], 0.0, seed)}, committed)
            == []
        )
    faults = compare(committed | {"figure1": noisy(committed["figure1"], 2.0)}, committed)
    assert faults
    assert all("entropy" in fault and ": judge moved by +" in fault for fault in faults)


def test_other_samples_are_seen_though_their_means_be_alike(committed, capsys):
    """As of models that were trained otherwise. A few other values are rounding."""
    rows = committed["figure1"]
    long, of = check.per_prompt(committed)[0], retraining()
    assert check.values_changed(long, long, of) == []
    faults = check.values_changed(
        check.per_prompt(committed | {"figure1": noisy(rows, 0.0)})[0], long, of
    )
    assert len(faults) > 1
    assert re.fullmatch(
        r"judge: \d\d\.\d% of \d+ values of prompts \(all cells\) are others, where rounding explains 1\.5%",
        faults[0],
    )
    for metric, limit in (
        ("judge", 0.02),
        ("reward", 0.3),
    ):  # of rewards, training again has moved a tenth
        places = long.sort_values("unit", kind="stable").index  # of all cells alike
        places = places[long.loc[places, "metric"] == metric]
        for share, seen in ((limit - 0.01, 0), (limit + 0.01, 1)):
            few = places[: int(share * len(places))]
            assert (
                len(
                    check.values_changed(
                        long.assign(mean=long["mean"] + long.index.isin(few)), long, of
                    )
                )
                == seen
            )
    assert "judge 0.0%" in capsys.readouterr().out


def test_cells_that_went_or_came_are_seen(committed):
    rows = committed["figure1"]
    faults = compare(committed | {"figure1": rows[rows["gate"] != "random"]}, committed)
    assert any("random" in fault and "no longer measured" in fault for fault in faults)
    assert any(
        "is new" in fault
        for fault in compare(committed, committed | {"figure1": rows[rows["gate"] != "random"]})
    )


def test_changed_columns_are_named_whatever_their_dtypes(committed):
    rows = committed["figure1"].assign(seconds=1.0)
    assert (
        check.changed_columns(
            rows, rows.assign(seconds=2.0, objective=rows["objective"].astype(str))
        )
        == []
    )
    assert check.changed_columns(
        rows, rows.assign(judge=rows["judge"] + 1e-6, kl=rows["kl"] + 1)
    ) == ["judge", "kl"]
    assert check.changed_columns(rows, rows.iloc[:-1]) == [
        f"rows ({len(rows)} for {len(rows) - 1})"
    ]
    assert check.changed_columns(rows, rows.drop(columns="kl")) == ["columns (kl)"]


def test_every_column_that_measures_is_compared(committed):
    long, shared = check.per_prompt(committed)
    assert shared == []
    assert {
        "judge",
        "reward",
        "fluency_errors",
        "kl",
        "steered",
        "tokens",
        "junctions",
        "junction_places",
    } <= set(long["metric"])
    assert not {"prompt", "seed", "beta", "threshold", "target_ratio", "replicate"} & set(
        long["metric"]
    )


def test_tables_that_disagree_about_what_they_share_are_seen(committed):
    rows = committed["figure1"]
    other = rows.assign(judge=rows["judge"] + (rows["gate"] == "random") * np.float32(0.5))
    _, shared = check.per_prompt({"figure1": rows, "figure2": other})
    assert shared
    assert all(
        "random" in text and "tables disagree about judge of 45 prompts" in text for text in shared
    )


def test_tolerance_comes_from_how_far_retraining_moves(committed):
    one, _ = check.per_prompt(committed)
    other = one.assign(
        mean=one["mean"]
        + 0.1 * check.scales(one).reindex(pd.MultiIndex.from_frame(one[check.CELL])).to_numpy()
    )
    found = check.retraining_tolerance([one, other]).set_index("metric").loc["judge"]
    assert found["shift"] == pytest.approx(0.1, abs=1e-4)
    assert found["tolerance"] == pytest.approx(0.3, abs=1e-4)
    assert found["runs"] == 2
    assert found["others"] == 1


# --- the command


@pytest.fixture
def quick(monkeypatch, committed):
    """`make check` on one table, with the rows that it would measure at hand."""
    monkeypatch.setattr(
        "benchmarks.__main__.FIGURES", {"figure1": FIGURES["figure1"], "cost": FIGURES["cost"]}
    )
    monkeypatch.setattr("benchmarks.checks.exact.compute", lambda: EXPECTED)
    profile = load_profile("check")
    rows = {"figure1": tables.stack([pd.read_parquet(tables.folder(profile) / "figure1.parquet")])}
    models = json.loads((check.reference(profile) / check.MODELS).read_text())["models"]
    rows["cost"] = tables.stack([pd.read_parquet(tables.folder(profile) / "cost.parquet")])
    monkeypatch.setattr(check, "arithmetic", lambda: ARITHMETIC)
    monkeypatch.setattr(check, "measure_again", lambda figures, profile: (rows, models))
    return rows


def test_check_passes(quick, capsys):
    assert main(["check"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "check: passed"
    assert "rows: 2 of 2 tables have the committed rows to the last digit" in printed


def test_by_the_same_models_nothing_may_differ(quick, capsys, monkeypatch):
    """However little; by other models only what is more than noise counts."""
    rows = quick["figure1"]
    rows["fluency_errors"] ^= (
        (rows["prompt"] == 3) & (rows["objective"] == "honesty") & (rows["gate"] == "random")
    )
    assert main(["check"]) == 1
    assert "changed: figure1: other fluency_errors, by the same models" in capsys.readouterr().out
    monkeypatch.setattr(
        check, "measure_again", lambda figures, profile: (quick, {"qwen3-base": "other"})
    )
    assert (
        main(["check"]) == 1
    )  # all models learned otherwise, on a machine that calculates as the reference's
    assert (
        "changed: model qwen3-base came out of training otherwise, on a machine"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(check, "arithmetic", lambda: "that of another machine")
    assert main(["check"]) == 0
    assert (
        "models: 0 of 26 came out of training as those that the committed rows are of"
        in capsys.readouterr().out
    )


def test_one_model_that_learned_otherwise_is_seen(quick, capsys, monkeypatch):
    """Where any comes out as the reference's to the last bit, the machine is not why another does not."""
    _, models = check.measure_again({}, load_profile("check"))
    monkeypatch.setattr(
        check,
        "measure_again",
        lambda figures, profile: (quick, models | {"qwen3-value-mean-early": "other"}),
    )
    assert main(["check"]) == 1
    assert (
        "changed: model qwen3-value-mean-early came out of training otherwise, on a machine that"
        in capsys.readouterr().out
    )


def test_times_that_cannot_be_are_seen():
    """However noisy the machine."""
    methods = pd.DataFrame(
        {
            "method": ["base", "base", "dense", "sia"],
            "best_of": [1, 4, 1, 1],
            "seconds": [1.0, 3.0, 2.0, 1.5],
        }
    )
    assert check.too_fast(methods) == []
    assert check.too_fast(methods.assign(seconds=[1.0, 0.75, 1.1, 1.0])) == [
        "cost: dense steering took 1.10 × the time of one plain response",
        "cost: the best of several took 0.75 × the time of one plain response",
    ]


def test_a_cell_whose_prompts_have_other_values_is_seen(committed):
    long, of = check.per_prompt(committed)[0], retraining()
    cell = (long["cell"] == long["cell"].iloc[0]) & (long["metric"] == "judge")
    assert (
        check.values_changed(
            long.assign(mean=long["mean"] + (cell & (cell.cumsum() <= 14))), long, of
        )
        == []
    )
    (fault,) = check.values_changed(
        long.assign(mean=long["mean"] + (cell & (cell.cumsum() <= 15))), long, of
    )
    assert fault == f"{long['cell'].iloc[0]}: 33% of 45 prompts have other values (judge)"


def test_check_fails_with_what_has_changed(quick, capsys, monkeypatch):
    quick["figure1"]["judge"] += np.float32(3)
    changed = json.loads(json.dumps(EXPECTED))
    changed["equations"]["KL"][0] += 1
    monkeypatch.setattr("benchmarks.checks.exact.compute", lambda: changed)
    assert main(["check"]) == 1
    printed = capsys.readouterr().out
    assert "exact/equations: 1 differences" in printed
    assert "changed: exact/equations/KL[0] is " in printed
    assert "judge moved by +3" in printed
    assert "changes" in printed.splitlines()[-1]


def test_without_a_reference_there_is_one_sentence(quick, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "reference", lambda profile: tmp_path)
    assert main(["check"]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"error: {tmp_path}/exact.json is missing, there is nothing to compare with: restore it, or run make check FRESH=1\n"
    )
