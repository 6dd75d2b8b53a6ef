"""Summaries of made-up rows: differences, searches, costs."""

import dataclasses
import math
from itertools import product

import numpy as np
import pandas as pd
import pytest

from benchmarks.analysis import estimates
from benchmarks.figures import cost, figure3, table1
from benchmarks.figures.registry import FIGURES
from benchmarks.spec.cells import ROUNDS
from tests.helpers.fake import ROUNDED, SMOKE, FakeResults, ends, pick, table_of

# --- estimates and pairs


def test_estimates_are_means_and_differences_are_paired():
    table = table_of(
        FIGURES["figure1"],
        lambda cell: {"entropy": 1.0, "random": 0.25}.get(cell.gate, 0.0) * cell.target_ratio,
    )
    rows = FakeResults(SMOKE).rows(FIGURES["figure1"].cells(SMOKE, 0).cells[0])
    level = {
        "family": "qwen3",
        "metric": "judge",
        "versus": "",
        "method": "sia",
        "target_ratio": 0.5,
        "value_model": "value-token",
    }
    honesty = pick(table, **level, objective="honesty")
    both = [FakeResults(SMOKE).rows(FIGURES["figure1"].cells(SMOKE, r).cells[0]) for r in range(2)]
    expected = (
        np.mean([rows[rows["objective"] == "honesty"]["judge"].mean() for rows in both]) + 0.5
    )
    assert honesty["estimate"] == pytest.approx(expected, abs=ROUNDED)
    assert honesty["low"] < honesty["estimate"] < honesty["high"]
    samples, prompts = SMOKE.evaluation.samples, SMOKE.evaluation.prompts_per_objective
    assert (honesty["ratio"], honesty["n"], honesty["seeds"], honesty["replicates"]) == (
        0.5,
        2 * prompts,
        samples,
        2,
    )
    assert pick(table, **level, objective="all")["n"] == 6 * prompts
    for replicate, rows_of in enumerate(both):
        alone = pick(table, **level, objective="honesty", replicate=str(replicate))
        mean = rows_of[rows_of["objective"] == "honesty"]["judge"].mean() + 0.5
        assert alone["estimate"] == pytest.approx(mean, abs=ROUNDED)
        assert pd.isna(alone["low"])  # single replicates are judged on all objectives
        alone = pick(table, **level, objective="all", replicate=str(replicate))
        assert alone["low"] < alone["estimate"] < alone["high"]
    # the noise is shared, so a constant effect has an interval of no width
    for family in ("qwen3", "llama", "all"):
        row = pick(table, **(level | {"family": family, "versus": "random"}), objective="all")
        assert ends(row) == pytest.approx([0.375] * 3, abs=ROUNDED)
    alone = table[(table["replicate"] != "all") & (table["versus"].fillna("") != "")]
    assert set(alone["objective"]) == {"all"}  # no figure shows other differences
    assert len(rows) == 3 * prompts * samples


def test_figure2_pairs_sia_with_dense_random_and_every_baseline():
    effects = {"entropy": 1.0, "junction": 1.9, "random": 0.5, "every": 2.0, "never": 0.0}
    table = table_of(
        FIGURES["figure2"], lambda cell: effects[cell.gate] + 3 * (cell.model == "instruct")
    )
    common = {
        "objective": "all",
        "metric": "judge",
        "value_model": "value-mean",
        "target_ratio": 0.2,
        "method": "sia",
        "family": "all",
    }
    for versus, tuned, expected in (
        ("dense", False, -1.0),
        ("dense", True, -1.0),
        ("random", False, 0.5),
        ("base", False, 1.0),
        ("instruct", True, -2.0),
        ("best-of-n", False, 1.0),
        ("args", False, -1.0),
    ):
        row = pick(table, **common, versus=versus, tuned=tuned)
        assert ends(row) == pytest.approx([expected] * 3, abs=ROUNDED), versus
    head = {"method": "q-head", "value_model": "q-head-mean", "target_ratio": 1.0}
    for method, versus, expected in (
        ({"method": "junction"}, "dense", -0.1),
        (head, "dense", 0.0),
        (head, "base", 2.0),
        (head, "dense-gain", 0.2),  # beyond nine tenths of the way from the base to dense steering
    ):
        row = pick(table, **(common | method), versus=versus, tuned=True)
        assert ends(row) == pytest.approx([expected] * 3, abs=ROUNDED), method
    few = pick(table, **common, versus="transfer-q", tuned=False)  # on the prompts that it has
    assert ends(few) == pytest.approx([-1.0] * 3, abs=ROUNDED)
    assert few["n"] == 2 * 3 * SMOKE.sweep.rollout_prompts
    claimed = {"value_model": "value-mean", "method": "sia-claimed", "target_ratio": None}
    mean = pick(table, **(common | claimed), versus="dense", tuned=True)
    assert mean["estimate"] == pytest.approx(-1.0, abs=ROUNDED)
    level = common | {"family": "qwen3", "versus": "", "tuned": True}
    assert math.isnan(pick(table, **level)["beta"])
    assert [pick(table, **level, replicate=r)["beta"] for r in ("0", "1")] == [4.0, 1.0]


def test_methods_must_share_prompts_and_seeds():
    rows = FIGURES["figure1"].collect(SMOKE, range(1), FakeResults(SMOKE))
    dropped = rows[
        (rows["method"] == "dense") & (rows["prompt"] == 3) & (rows["objective"] == "honesty")
    ].index
    with pytest.raises(
        ValueError, match="every method must be measured on the same prompts and seeds"
    ):
        FIGURES["figure1"].summarize(rows.drop(dropped), SMOKE)
    left, right = (
        estimates.MethodScores(
            {"method": m}, np.zeros((n, 1)), np.zeros(n), np.ones(n), (1, 1, n, 1)
        )
        for m, n in (("a", 4), ("b", 6))
    )
    assert estimates.difference(left, right).shape == (1, 1, 4, 1)
    worse = dataclasses.replace(right, shape=(1, 1, 3, 2))
    with pytest.raises(ValueError, match="a difference needs the same units"):
        estimates.difference(left, worse)
    with pytest.raises(LookupError, match=r"expected one method with \{'method': 'c'\}, found 0"):
        estimates.select_one([left, right], method="c")


def test_realised_ratios_stand_on_both_sides_of_a_difference():
    rows = FIGURES["figure1"].collect(SMOKE, range(1), FakeResults(SMOKE))
    rows.loc[
        (rows["method"] == "random")
        & (rows["target_ratio"] == 0.2)
        & (rows["objective"] == "honesty"),
        "steered",
    ] = 6
    table = FIGURES["figure1"].summarize(rows, SMOKE)
    labels = {"family": "llama", "value_model": "value-mean", "metric": "judge", "method": "sia"}
    labels |= {"target_ratio": 0.2, "versus": "random"}
    for objective, ratio in (("honesty", 0.3), ("all", 0.2333)):
        row = pick(table, **labels, objective=objective)
        assert (row["ratio"], row["versus_ratio"]) == (0.2, ratio)


def test_at_equal_drift_dense_is_read_between_the_strengths():
    """Made-up dense steering has KL 3 and score 2 at every β, the base 0 and 0, sparse steering
    KL 3·ratio and score 1. At that KL dense lies √ratio of the way from the base to 2."""

    def effect(cell):
        return {"entropy": 1.0, "every": 2.0}.get(cell.gate, 0.0)

    table = table_of(FIGURES["figure4"], effect)
    common = {"objective": "all", "metric": "judge", "value_model": "value-mean"}
    for family, ratio, tuned, metric in product(
        ("qwen3", "llama", "all"), (0.2, 0.5), (False, True), ("judge", "reward")
    ):
        labels = {"family": family, "target_ratio": ratio, "method": "sia", "tuned": tuned}
        row = pick(table, **(common | labels | {"metric": metric}), matched="kl")
        expected = 1.0 - 2.0 * ratio**0.5 if metric == "judge" else 0.0  # rewards are all alike
        assert ends(row) == pytest.approx([expected] * 3, abs=2e-3)
    claimed = {"family": "all", "matched": "kl", "method": "sia-claimed"}
    mean = pick(table, **(common | claimed | {"value_model": "value-token"}))
    assert mean["estimate"] == pytest.approx(1.0 - (0.2**0.5 + 0.5**0.5), abs=2e-3)
    assert mean["n"] == 6 * SMOKE.evaluation.prompts_per_objective
    alone = {"family": "qwen3", "method": "dense", "versus": "beta-1", "beta": math.inf}
    assert pick(table, **common, **alone)["estimate"] == pytest.approx(0.0, abs=ROUNDED)


def test_weak_to_strong_is_the_mean_over_smaller_value_models():
    gain = {
        ("value-token-small", "base"): 0.3,
        ("value-token-small", "base-large"): 0.6,
        ("value-token", "base-large"): 0.9,
    }
    table = table_of(
        FIGURES["figure3"],
        lambda cell: gain.get((cell.value_model, cell.model), 7.0 * (cell.gate != "never")),
    )
    common = {"objective": "all", "metric": "judge", "target_ratio": 0.2}
    labels = common | {"method": "weak-to-strong sia"}
    assert ends(pick(table, **labels, versus="base")) == pytest.approx([0.6] * 3, abs=ROUNDED)
    assert pick(table, **labels, versus="dense")["estimate"] == 0


def test_value_models_may_all_be_as_large_as_the_language_models(monkeypatch):
    monkeypatch.setattr(figure3, "weak_to_strong_pairs", lambda profile: [])
    table = table_of(FIGURES["figure3"])
    assert not table["method"].str.startswith("weak-to-strong").any()
    assert (table["versus"] == "shortfall-of-smallest").any()


def test_a_larger_model_may_come_closer_to_dense_steering():
    lacks = {"base-small": 0.5, "base": 9.0, "base-large": 0.2}
    table = table_of(FIGURES["figure3"], lambda cell: -lacks[cell.model] * (cell.gate == "entropy"))
    common = {"objective": "all", "metric": "judge", "method": "sia", "target_ratio": 0.2}
    row = pick(table, **common, model="base-large", versus="shortfall-of-smallest")
    assert ends(row) == pytest.approx([0.3] * 3, abs=ROUNDED)


def test_best_of_n_is_paired_with_the_base_at_the_same_n():
    table = table_of(
        FIGURES["best-of-n"], lambda cell: {"entropy": 1.0, "every": 3.0}.get(cell.gate, 0.0)
    )
    common = {"method": "sia", "target_ratio": 0.2, "objective": "all", "metric": "judge"}
    for best_of, versus, expected in (
        (2, "base", 1.0),
        (2, "dense", -2.0),
        (2, "one-response", 0.0),
    ):
        assert ends(pick(table, **common, best_of=best_of, versus=versus)) == pytest.approx(
            [expected] * 3, abs=ROUNDED
        )
    positions = pick(table, **(common | {"metric": "positions"}), best_of=2, versus="")
    assert positions["estimate"] == 30 * 2 + 40


def test_best_of_n_at_equal_cost_is_read_between_the_numbers_of_responses():
    rows = FIGURES["best-of-n"].collect(SMOKE, range(2), FakeResults(SMOKE))
    rows["judge"] = rows["best_of"].where(rows["method"] == "base", 0.0)  # the base scores N
    rows.loc[rows["objective"] == "honesty", "value_tokens"] //= (
        2  # steered responses are cheaper there
    )
    table = FIGURES["best-of-n"].summarize(rows, SMOKE)
    labels = {"method": "sia", "target_ratio": 0.2, "versus": "base-at-equal-cost", "best_of": 1}
    # one response at 20% takes 70 positions (50 of honesty), base responses 30 each: between the
    # best of 2 and of 4 (of 1 and 2)
    for objective, expected in (("helpfulness", 2 + 2 * 10 / 60), ("honesty", 1 + 20 / 30)):
        assert ends(pick(table, **labels, objective=objective, metric="judge")) == pytest.approx(
            [-expected] * 3, abs=ROUNDED
        )
    for objective in ("harmlessness", "helpfulness", "honesty", "all"):
        assert pick(table, **labels, objective=objective, metric="positions")[
            "estimate"
        ] == pytest.approx(0, abs=ROUNDED)
    beyond = (
        (table["versus"] == "base-at-equal-cost")
        & (table["best_of"] == 4)
        & (table["method"] == "sia")
    )
    assert not beyond.any()  # 160 positions: more than all that was tried


def test_sia_is_held_against_what_as_many_positions_buy():
    """A response takes 30 positions, at 20% 70, dense 230, beams 120: at 70 a fifth are dense, or
    4 of 9 from beams."""
    effects = {"entropy": 1.0, "every": 2.0}
    table = table_of(
        FIGURES["cost"], lambda cell: effects.get(cell.gate, 0.0) + 3 * (cell.search != "")
    )
    labels = {"family": "all", "objective": "all", "method": "sia", "target_ratio": 0.2}
    labels |= {"value_model": "value-mean", "metric": "judge"}
    for versus, expected in (("dense", 0.6), ("base", -2.0), ("beams", 1 - 3 * 4 / 9)):
        row = pick(table, **labels, versus=f"{versus}-at-equal-cost")
        assert ends(row) == pytest.approx([expected] * 3, abs=ROUNDED), versus


def test_one_threshold_is_chosen_over_all_models_of_a_loss():
    """Each model likes a τ of its own, and one of them likes its own much more."""
    likes = {("qwen3", "base", 1.0): 3.0, ("llama", "base", 1.5): 1.0}
    table = table_of(
        FIGURES["threshold"], lambda cell: likes.get((cell.family, cell.model, cell.threshold), 0.0)
    )
    labels = {
        "value_model": "value-mean",
        "versus": "best-tau-of-each-by-best-of-all",
        "objective": "all",
        "metric": "judge",
    }
    for family, lost in (("qwen3", 0.0), ("llama", -1.0), ("all", -0.5)):
        assert ends(pick(table, **labels, family=family)) == pytest.approx([lost] * 3, abs=ROUNDED)
    of_all = table[(table["versus"] == "best-tau-of-all") & (table["value_model"] == "value-mean")]
    assert set(of_all["chosen"]) == {1.0}
    likes["qwen3", "base-large", 1.5] = (
        5.0  # large models take part in choosing, of the loss that they have
    )
    table = table_of(
        FIGURES["threshold"], lambda cell: likes.get((cell.family, cell.model, cell.threshold), 0.0)
    )
    one = {"family": "qwen3", "objective": "all", "metric": "judge", "versus": "best-tau-of-all"}
    assert pick(table, **one, value_model="value-token")["chosen"] == 1.5
    assert pick(table, **one, value_model="value-mean")["chosen"] == 1.0


def test_the_best_threshold_is_chosen_on_other_prompts():
    table = table_of(FIGURES["threshold"], lambda cell: 0.5 * (cell.threshold == 1.5))
    labels = {"value_model": "value-mean", "objective": "all", "metric": "judge"}
    for versus in ("best-tau-of-each", "best-tau-of-all"):
        row = pick(table, **labels, family="all", versus=versus)
        assert ends(row) == pytest.approx([-0.5] * 3, abs=ROUNDED)
        assert row["n"] == 6 * len(range(0, SMOKE.evaluation.prompts_per_objective, 2))
        assert pick(table, **labels, family="qwen3", versus=versus)["chosen"] == 1.5


# --- costs


def test_ratios_of_costs_and_time():
    table = table_of(FIGURES["cost"])
    dense, sia = (30 + 200) / 30, (30 + 40) / 30
    base, reference = (
        {"versus": "base"},
        {"versus": "sia", "versus_target_ratio": 0.2, "versus_value_model": "value-mean"},
    )
    # of GenARM one pass gives all candidates; Transfer Q* goes on from each by some tokens
    passes = {"dense": 10, "genarm": 1, "transfer-q": 10 * (1 + SMOKE.sweep.rollout_tokens)}
    reported = {name: (20 + n * 20) / (20 + 10 * 4) for name, n in passes.items()}
    for method, metric, versus, expected in (
        ("dense", "positions_ratio", base, dense),
        ("dense", "positions_ratio", reference, dense / sia),
        ("largest", "positions_ratio", reference, max(dense, 4 * 30 / 30) / sia),
        *((name, "reported_ratio", reference, ratio) for name, ratio in reported.items()),
    ):
        labels = {"family": "qwen3", "objective": "all", "metric": metric} | versus
        labels |= {"value_model": "value-mean"} if method == "dense" else {}
        row = pick(table, **labels, method=method)
        assert ends(row) == pytest.approx([expected] * 3, abs=ROUNDED), (method, metric)
    lengths = table[
        (table["metric"] == "positions_at_length")
        & (table["family"] == "qwen3")
        & (table["value_model"] == "value-mean")
    ]
    assert set(lengths["length"]) == {20}
    assert lengths[lengths["method"] == "dense"]["estimate"].tolist() == [230]
    times = table[table["metric"] == "seconds_ratio"]
    timed = cost.timed_cells(SMOKE, 0)
    sparse = next(number for number, cell in enumerate(timed) if cell.method == "sia")
    for number, cell in enumerate(timed):
        labels = {"method": cell.method, "search": cell.search, "target_ratio": cell.target_ratio}
        assert ends(pick(times, **labels, versus="base")) == pytest.approx(
            [number + 1] * 3, rel=1e-4
        )
        assert pick(times, **labels, versus="sia", versus_value_model="value-token")[
            "estimate"
        ] == pytest.approx((number + 1) / (sparse + 1), rel=1e-3)
    rivals = [
        n
        for n, cell in enumerate(timed)
        if estimates.method_key(cell.method, cell.search) in cost.RIVALS
    ]
    assert pick(times, method="largest")["estimate"] == pytest.approx(
        (max(rivals) + 1) / (sparse + 1), rel=1e-3
    )


def test_times_are_compared_within_a_round_and_vary_between_rounds():
    rows = FIGURES["cost"].collect(SMOKE, range(1), FakeResults(SMOKE))
    rows["seconds"] *= 1 + rows["prompt"].where(
        rows["seconds"].notna(), 0
    )  # a machine that slows down changes no ratio
    slow = (rows["method"] == "dense") & rows["seconds"].notna() & (rows["prompt"] % 2 == 1)
    rows.loc[slow, "seconds"] *= 4
    table = FIGURES["cost"].summarize(rows, SMOKE)
    plain, dense = (
        pick(table, method=m, search="", metric="seconds_ratio", versus="base")
        for m in ("genarm", "dense")
    )
    timed = [cell.method for cell in cost.timed_cells(SMOKE, 0)]
    assert plain["low"] == plain["high"]
    assert dense["estimate"] == pytest.approx(
        (timed.index("dense") + 1) * 2, rel=1e-3
    )  # the geometric mean of 1 and 4
    assert dense["low"] < dense["estimate"] < dense["high"]
    assert dense["n"] == ROUNDS


def test_the_pareto_front_keeps_undominated_points():
    costs, scores = np.array([1.0, 2.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 1.0, 1.5, 3.0])
    assert cost.pareto(costs, scores) == [0, 1, 4]


def test_table1_marks_the_best_and_counts_ties_half():
    rows = FIGURES["table1"].collect(
        SMOKE, range(1), FakeResults(SMOKE, lambda cell: float(cell.gate == "every"))
    )
    rows["kl"] = rows["steered"] / (1.0 + (rows["search"] == "best-of"))
    wins = rows.groupby("method", observed=True)["win"].mean()
    assert (wins["dense"], wins["sia"], wins["base"]) == (1.0, 0.5, 0.5)
    table = FIGURES["table1"].summarize(rows, SMOKE)
    section = table[
        (table["replicate"] == "all")
        & (table["versus"].fillna("") == "")
        & (table["family"] == "qwen3")
        & (table["objective"] == "all")
    ]
    text, best = table1.cells_of(section, SMOKE)
    judge = section[section["metric"] == "judge"]["estimate"]
    assert set(text["judge"][best["judge"]].str.split().str[0]) == {f"{judge.max():.2f}"}
    # the choice of a search drifts too, and its KL leaves that out: it is never the best
    kl = text["KL (nats)"]
    assert set(kl[best["KL (nats)"]].str.split().str[0]) == {"0.00"}  # of instruct models here
    assert not best["KL (nats)"][["SIA at 20% + best of 4, per-token loss", "base"]].any()
    assert (kl["base"], kl["base + best of 4"]) == ("–", "–")
    assert kl["instruct (by the judge)"].startswith("0.00 [")


def test_table1_is_written_as_markdown_and_latex(tmp_path):
    figure = FIGURES["table1"]
    rows = figure.collect(SMOKE, range(1), FakeResults(SMOKE, lambda cell: cell.target_ratio))
    paths = figure.plot(
        figure.summarize(rows, SMOKE).fillna({"versus": ""}), SMOKE, False, tmp_path
    )
    markdown, latex = (path.read_text(encoding="utf-8") for path in paths)
    assert "| base " in markdown
    assert "| SIA at 20%, paper's loss, best β " in markdown
    assert "**" in markdown
    assert "best of 4" in markdown
    assert r"\textbf" in latex
    assert "-ln $\\pi$ (nats) & length" in latex
