"""Every figure on made-up rows: what its summary estimates and pairs, that it can be drawn, and what becomes of the claims."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import (
    best_of_n,
    claims,
    cost,
    entropy,
    figure1,
    figure2,
    figure3,
    figure4,
    figure5,
    mechanism,
    style,
    summary,
    table1,
    tables,
    theory,
    threshold,
    value_error,
    words,
)
from benchmarks.__main__ import FIGURES
from benchmarks.cells import OBJECTIVES
from benchmarks.lab.tokenizer import build_tokenizer
from benchmarks.lab.world import World, WorldConfig
from benchmarks.profile import load_profile
from sia import theory as laws
from tests.fake import FakeResults

SMOKE = load_profile("smoke")
ROUNDED = 1e-4


def table_of(module, effect=lambda cell: 0.0, replicates=2):
    rows = module.collect(SMOKE, range(replicates), FakeResults(SMOKE, effect))
    return module.summarize(rows.sample(frac=1, random_state=0), SMOKE)


def pick(table, **wanted):
    mask = np.logical_and.reduce(
        [table[name].isna() | (table[name] == "") if value in (None, "") else table[name] == value for name, value in wanted.items()]
    )
    assert mask.sum() == 1, table[mask]
    return table[mask].iloc[0]


def ends(row):
    return [row["estimate"], row["low"], row["high"]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Every figure's summary as it is read from disk, and what was drawn from it."""
    folder, found = tmp_path_factory.mktemp("figures"), {}
    dpi, style.DPI = style.DPI, 40  # quicker
    for name, module in FIGURES.items():
        path = folder / f"{name}.csv"
        table_of(module).to_csv(path, index=False)
        found[name] = (tables.read_summary(path), FIGURES[name].plot(tables.read_summary(path), SMOKE, False, folder))
    style.DPI = dpi
    return found


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_from_its_summary(drawn, name):
    _, paths = drawn[name]
    if name == "junctions":  # which the report shows
        assert paths == []
        return
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".md": b"# Table", ".tex": b"% Estim"}
    assert len(paths) == 2
    for path in paths:
        assert path.read_bytes().startswith(starts[path.suffix])
        assert path.stem == name


@pytest.mark.parametrize("name", [n for n in FIGURES if n not in ("figure5", "entropy", "theory", "value-error")])
def test_summaries_have_the_promised_columns_and_no_row_twice(drawn, name):
    promised = "objective family model value_model method gate target_ratio ratio beta best_of metric estimate low high n seeds"
    table = drawn[name][0]
    assert table.columns[:16].tolist() == promised.split()
    keys = ["objective", "family", "model", "value_model", "method", "target_ratio", "best_of", "metric"]
    keys += ["beta", "tuned", "floor", "tau", "search", "matched", "versus"]
    assert not table.duplicated(keys).any(), table[table.duplicated(keys, keep=False)]


def test_every_claim_finds_its_row_or_none(drawn):
    """On the smoke profile some are not measured (80% of the tokens, the best of 8); none may fit several rows."""
    found = claims.verdicts({name: table for name, (table, _) in drawn.items()}, claims.read_claims())
    missing = found[found["verdict"] == "not measured"]
    assert set(missing["claim"]) <= {
        "eighty-percent-is-enough", "entropy-beats-random-at-80", "stronger-guidance", "helps-best-of-n", "best-of-n-helps",
        "sparse-best-of-n",
    }  # fmt: skip
    assert len(found) > 120
    measured = found[found["verdict"] != "not measured"]
    assert measured["verdict"].isin(claims.VERDICTS).all()
    exact = measured["figure"] == "theory"
    assert (measured[~exact]["verdict_by_replicate"].str.split("|").str.len() == 2).all()
    assert (measured[exact]["verdict_by_replicate"] == "").all()


# --- estimates and pairs


def test_estimates_are_means_and_differences_are_paired():
    table = table_of(figure1, lambda cell: {"entropy": 1.0, "random": 0.25}.get(cell.gate, 0.0) * cell.target_ratio)
    rows = FakeResults(SMOKE).rows(figure1.cells(SMOKE, 0).cells[0])
    level = {"family": "qwen3", "metric": "judge", "versus": "", "method": "sia", "target_ratio": 0.5, "value_model": "value-token"}
    honesty = pick(table, **level, objective="honesty")
    both = [FakeResults(SMOKE).rows(figure1.cells(SMOKE, r).cells[0]) for r in range(2)]
    expected = np.mean([rows[rows["objective"] == "honesty"]["judge"].mean() for rows in both]) + 0.5
    assert honesty["estimate"] == pytest.approx(expected, abs=ROUNDED)
    assert honesty["low"] < honesty["estimate"] < honesty["high"]
    samples, prompts = SMOKE.evaluation.samples, SMOKE.evaluation.prompts_per_objective
    assert (honesty["ratio"], honesty["n"], honesty["seeds"], honesty["replicates"]) == (0.5, 2 * prompts, samples, 2)
    assert pick(table, **level, objective="all")["n"] == 6 * prompts
    assert honesty["estimate_by_replicate"].count("|") == 1
    for name in ("estimate", "low", "high"):
        assert pick(table, **level, objective="all")[f"{name}_by_replicate"].count("|") == 1
    # the noise is shared, so a constant effect has an interval of no width
    for family in ("qwen3", "llama", "all"):
        row = pick(table, **(level | {"family": family, "versus": "random"}), objective="all")
        assert ends(row) == pytest.approx([0.375] * 3, abs=ROUNDED)
    assert len(rows) == 3 * prompts * samples


def test_figure2_pairs_sia_with_dense_random_and_every_baseline():
    effects = {"entropy": 1.0, "random": 0.5, "every": 2.0, "never": 0.0}
    table = table_of(figure2, lambda cell: effects[cell.gate] + 3 * (cell.model == "instruct"))
    common = {"objective": "all", "metric": "judge", "value_model": "value-token", "target_ratio": 0.2, "method": "sia", "family": "all"}
    for versus, tuned, expected in (
        ("dense", False, -1.0), ("dense", True, -1.0), ("random", False, 0.5), ("base", False, 1.0), ("instruct", True, -2.0),
        ("best-of-n", False, 1.0), ("args", False, -1.0),
    ):  # fmt: skip
        row = pick(table, **common, versus=versus, tuned=tuned)
        assert ends(row) == pytest.approx([expected] * 3, abs=ROUNDED), versus
    few = pick(table, **common, versus="transfer-q", tuned=False)  # on the prompts that it has
    assert ends(few) == pytest.approx([-1.0] * 3, abs=ROUNDED)
    assert few["n"] == 2 * 3 * SMOKE.sweep.rollout_prompts
    claimed = {
        "objective": "all",
        "metric": "judge",
        "value_model": "value-mean",
        "method": "sia-claimed",
        "family": "all",
        "versus": "dense",
    }
    assert pick(table, **claimed, tuned=True)["estimate"] == pytest.approx(-1.0, abs=ROUNDED)
    tuned = pick(table, **(common | {"family": "qwen3"}), versus="", tuned=True)
    assert (tuned["beta_by_replicate"], math.isnan(tuned["beta"])) == ("4|1", True)


def test_methods_must_share_prompts_and_seeds():
    rows = figure1.collect(SMOKE, range(1), FakeResults(SMOKE))
    dropped = rows[(rows["method"] == "dense") & (rows["prompt"] == 3) & (rows["objective"] == "honesty")].index
    with pytest.raises(ValueError, match="every method must be measured on the same prompts and seeds"):
        figure1.summarize(rows.drop(dropped), SMOKE)
    left, right = (summary.Entry({"method": m}, np.zeros((n, 1)), np.zeros(n), np.ones(n), (1, 1, n, 1)) for m, n in (("a", 4), ("b", 6)))
    assert summary.difference(left, right).shape == (1, 1, 4, 1)
    worse = dataclasses.replace(right, shape=(1, 1, 3, 2))
    with pytest.raises(ValueError, match="a difference needs the same units"):
        summary.difference(left, worse)
    with pytest.raises(LookupError, match=r"expected one entry with \{'method': 'c'\}, found 0"):
        summary.the([left, right], method="c")


def test_realised_ratios_stand_on_both_sides_of_a_difference():
    rows = figure1.collect(SMOKE, range(1), FakeResults(SMOKE))
    rows.loc[(rows["method"] == "random") & (rows["target_ratio"] == 0.2) & (rows["objective"] == "honesty"), "steered"] = 6
    table = figure1.summarize(rows, SMOKE)
    wanted = {"family": "llama", "value_model": "value-mean", "metric": "judge", "method": "sia", "target_ratio": 0.2, "versus": "random"}
    assert pick(table, **wanted, objective="honesty")[["ratio", "versus_ratio"]].tolist() == [0.2, 0.3]
    assert pick(table, **wanted, objective="all")[["ratio", "versus_ratio"]].tolist() == [0.2, 0.2333]


def test_at_equal_drift_dense_is_read_between_the_strengths():
    """Made-up dense steering: KL 3 and score 2 at every β; the base: 0 and 0. Sparse steering has KL 3·ratio and scores 1. At that KL
    dense lies √ratio of the way from base to 2; with a floor it is 1.5 better, from its own KL on."""
    table = table_of(figure4, lambda cell: 1.0 if cell.gate == "entropy" else (2.0 + 1.5 * (cell.floor > 0)) * (cell.gate == "every"))
    for family in ("qwen3", "llama", "all"):
        for ratio in (0.2, 0.5):
            for floor in (0.0, 0.02):  # below the KL of all dense steering with a floor: that without counts
                wanted = {"family": family, "value_model": "value-mean", "matched": "kl", "floor": floor, "method": "sia"}
                row = pick(table, **wanted, target_ratio=ratio, objective="all", metric="judge")
                assert ends(row) == pytest.approx([1.0 - 2.0 * ratio**0.5] * 3, abs=2e-3)
    claimed = {"family": "all", "value_model": "value-token", "matched": "kl", "floor": 0.02, "method": "sia-claimed"}
    mean = pick(table, **claimed, objective="all", metric="judge")
    assert mean["estimate"] == pytest.approx(1.0 - (0.2**0.5 + 0.5**0.5), abs=2e-3)
    assert mean["n"] == 6 * SMOKE.evaluation.prompts_per_objective
    weaker = {"family": "qwen3", "value_model": "value-mean", "method": "dense", "versus": "β = 1", "beta": math.inf}
    assert pick(table, **weaker, objective="all", metric="judge")["estimate"] == pytest.approx(0.0, abs=ROUNDED)


def test_the_better_of_dense_with_and_without_a_floor_counts():
    def entry(judge, kl):
        values = np.tile([judge, 0.0, 0.0, kl, 0.0], (6, 1))
        return summary.Entry({"method": "dense", "beta": 1.0}, values, np.zeros(6), np.ones(6), (1, 3, 2, 1))

    sparse = [entry(1.0, 1.0), entry(1.0, 4.0)]
    plain, floored = [entry(0.0, 0.0), entry(2.0, 4.0)], [entry(1.5, 2.25), entry(4.0, 6.25)]
    gains = figure4._gains([plain, floored], sparse, None, None, SMOKE)
    # at KL 1 only the plain one is there (half way to 2 in the root); at KL 4 the floored one, half way from 1.5 to 4
    np.testing.assert_allclose(gains, np.tile([1.0 - 1.0, 1.0 - 2.75], (len(gains), 1)), atol=1e-5)


def test_weak_to_strong_is_the_mean_over_smaller_value_models():
    gain = {("value-token-small", "base"): 0.3, ("value-token-small", "base-large"): 0.6, ("value-token", "base-large"): 0.9}
    table = table_of(figure3, lambda cell: gain.get((cell.value_model, cell.model), 7.0 * (cell.gate != "never")))
    row = pick(table, method="weak-to-strong sia-claimed", versus="base", objective="all", metric="judge")
    assert ends(row) == pytest.approx([0.6] * 3, abs=ROUNDED)
    assert pick(table, method="weak-to-strong sia-claimed", versus="dense", objective="all", metric="judge")["estimate"] == 0


def test_best_of_n_is_paired_with_the_base_at_the_same_n():
    table = table_of(best_of_n, lambda cell: {"entropy": 1.0, "every": 3.0}.get(cell.gate, 0.0))
    common = {"method": "sia", "target_ratio": 0.2, "objective": "all", "metric": "judge"}
    for best_of, versus, expected in ((4, "base", 1.0), (2, "dense", -2.0), (4, "one response", 0.0)):
        assert ends(pick(table, **common, best_of=best_of, versus=versus)) == pytest.approx([expected] * 3, abs=ROUNDED)
    positions = pick(table, **(common | {"metric": "positions"}), best_of=4, versus="")
    assert positions["estimate"] == 30 * 4 + 40


def test_the_best_threshold_is_chosen_on_other_prompts():
    table = table_of(threshold, lambda cell: 0.5 * (cell.threshold == 1.5))
    for versus in ("best τ of each", "best τ of all"):
        row = pick(table, family="all", value_model="value-mean", versus=versus, objective="all", metric="judge")
        assert ends(row) == pytest.approx([-0.5] * 3, abs=ROUNDED)
        assert row["n"] == 6 * len(range(0, SMOKE.evaluation.prompts_per_objective, 2))
    chosen = pick(table, family="qwen3", value_model="value-mean", versus="best τ of each", objective="all", metric="judge")["chosen"]
    assert chosen == "1.5,1.5,1.5;1.5,1.5,1.5"


def test_mechanism_isolates_one_cause_at_a_time():
    def effect(cell):
        world, early = "@" in cell.model, cell.value_model.endswith("-early")
        return {"entropy": 1.0, "inverted-entropy": 0.25}.get(cell.gate, 0.0) + 0.5 * (cell.floor > 0) + 2 * world + 4 * early

    table = table_of(mechanism, effect)
    common = {"objective": "all", "metric": "judge", "method": "sia", "target_ratio": 0.2}
    usual = {"model": "base", "value_model": "value-mean", "beta": 1.0}
    world = {"model": "base@many-decoys", "value_model": "value-mean@many-decoys", "family": "qwen3"}
    for wanted, expected in (
        (usual | {"family": "all", "floor": 0.0, "versus": "inverted-entropy"}, 0.75),
        (usual | {"family": "all", "floor": 0.02, "versus": "no floor"}, 0.5),
        (usual | {"family": "all", "floor": 0.02, "versus": "dense"}, 1.0),
        (usual | {"family": "qwen3", "value_model": "value-mean-early", "versus": "base"}, 5.0),
        (world | {"versus": "dense"}, 1.0),
        (world | {"versus": "base"}, 1.0),
    ):
        assert ends(pick(table, **common, **wanted)) == pytest.approx([expected] * 3, abs=ROUNDED), wanted


# --- costs


def test_ratios_of_costs_and_time():
    table = table_of(cost)
    common = {"family": "qwen3", "objective": "all"}
    dense, sia = (30 + 200) / 30, (30 + 40) / 30
    assert pick(table, **common, method="dense", value_model="value-mean", metric="positions, ratio", versus="base")[
        "estimate"
    ] == pytest.approx(dense, abs=ROUNDED)
    row = pick(table, **common, method="dense", value_model="value-mean", metric="positions, ratio", versus="sia 20%, value-mean")
    assert ends(row) == pytest.approx([dense / sia] * 3, abs=ROUNDED)
    reported = pick(table, **common, method="dense", value_model="value-mean", metric="reported, ratio", versus="sia 20%, value-mean")
    assert reported["estimate"] == pytest.approx((20 + 10 * 20) / (20 + 10 * 4), abs=ROUNDED)
    # of GenARM one pass gives all candidates; Transfer Q* goes on from each by some tokens
    for method, passes in (("genarm", 1), ("transfer-q", 10 * (1 + SMOKE.sweep.rollout_tokens))):
        row = pick(table, **common, method=method, metric="reported, ratio", versus="sia 20%, value-mean")
        assert row["estimate"] == pytest.approx((20 + passes * 20) / (20 + 10 * 4), abs=ROUNDED)
    largest = pick(table, **common, method="largest", metric="positions, ratio", versus="sia 20%, value-mean")
    assert largest["estimate"] == pytest.approx(max(dense, 4 * 30 / 30) / sia, abs=ROUNDED)
    lengths = table[(table["metric"] == "positions at length") & (table["family"] == "qwen3") & (table["value_model"] == "value-mean")]
    assert set(lengths["length"]) == {20}
    assert lengths[lengths["method"] == "dense"]["estimate"].tolist() == [230]
    times = table[table["metric"] == "seconds, ratio"].set_index(["method", "search", "target_ratio"])["estimate"]
    timed = cost.timed(SMOKE, 0)
    for number, cell in enumerate(timed):
        assert times.loc[(cell.method, cell.search, cell.target_ratio)] == pytest.approx(number + 1)


def test_pareto_keeps_what_no_other_beats():
    costs, scores = np.array([1.0, 2.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 1.0, 1.5, 3.0])
    assert cost.pareto(costs, scores) == [0, 1, 4]


def test_table1_marks_the_best_and_counts_ties_half():
    rows = table1.collect(SMOKE, range(1), FakeResults(SMOKE, lambda cell: float(cell.gate == "every")))
    wins = rows.groupby("method", observed=True)["win"].mean()
    assert (wins["dense"], wins["sia"], wins["base"]) == (1.0, 0.5, 0.5)
    table = table1.summarize(rows, SMOKE)
    section = table1._rows(table[table["versus"].isna()], "qwen3", "all")
    assert table1._best(section)["judge"] == max(row["judge"]["estimate"] for _, row in section)
    text = table1._markdown([(("qwen3", "all"), section)], "note")
    assert "| base | " in text
    assert "| SIA 20%, paper's loss, best β | " in text
    assert "**" in text
    assert "best of 4" in text
    assert r"\textbf" in table1._latex([(("qwen3", "all"), section)], "note")


# --- traces and probes


def test_positions_of_junctions():
    results = FakeResults(SMOKE)
    rows = figure5.collect(SMOKE, range(1), results)
    table = figure5.summarize(rows, SMOKE)
    steered = next(cell for cell in figure5.cells(SMOKE, 0).traces if cell.gate == "entropy" and cell.family == "llama")
    tokens = results.rows(steered, "trace")
    tokens = tokens[tokens["objective"] == "honesty"]
    responses = len(tokens.groupby(["prompt", "seed"]))
    wanted = {"family": "llama", "objective": "honesty", "method": "sia", "target_ratio": 0.2}
    for position in (0, 4, 30):
        share = tokens[(tokens["step"] == position)]["steered"].sum() / responses
        assert pick(table, **wanted, metric="junction", position=position)["estimate"] == pytest.approx(share, abs=ROUNDED)
    assert pick(table, **wanted, metric="length")["estimate"] == pytest.approx(len(tokens) / responses, abs=ROUNDED)
    # base responses are asked where the gate would open, at the threshold of their objective
    base = results.rows(figure5.cells(SMOKE, 0).traces[1], "trace")
    base = base[base["objective"] == "honesty"]
    share = ((base["entropy"] >= 1.2) & (base["step"] == 2)).sum() / responses
    assert pick(table, **(wanted | {"method": "base"}), metric="junction", position=2)["estimate"] == pytest.approx(share, abs=ROUNDED)


def test_positions_beyond_the_first_64_have_their_own_bits():
    tokens = pd.DataFrame(
        {"objective": "honesty", "prompt": 0, "seed": 0, "step": range(70), "junction": [i in (3, 63, 64, 69) for i in range(70)]}
    )
    row = figure5._by_response(tokens, 80)
    assert [p for p in range(80) if figure5._bit(row, p)[0]] == [3, 63, 64, 69]
    assert row["tokens"].tolist() == [70]


def test_entropy_around_junctions_stays_within_the_response():
    results = FakeResults(SMOKE)
    rows = entropy.collect(SMOKE, range(1), results)
    steered = next(cell for cell in entropy.cells(SMOKE, 0).traces if cell.gate == "entropy" and cell.family == "qwen3")
    tokens = results.rows(steered, "trace").set_index(["objective", "prompt", "seed", "step"])["entropy"]
    for row in rows[(rows["family"] == "qwen3") & (rows["method"] == "sia")].head(200).itertuples(index=False):
        for offset in entropy.OFFSETS:
            place = (row.objective, row.prompt, row.seed, row.step + offset)
            found = row[rows.columns.get_loc(f"entropy{offset:+d}")]
            assert (math.isnan(found) and place not in tokens.index) or found == pytest.approx(tokens[place], abs=0.006)
    table = entropy.summarize(rows, SMOKE)
    part = rows[(rows["family"] == "qwen3") & (rows["method"] == "sia")]
    fall = pick(table, family="qwen3", method="sia", target_ratio=0.2, versus="", metric="fall: entropy after − at a junction")
    assert fall["estimate"] == pytest.approx((part["entropy+1"] - part["entropy+0"]).mean(), abs=1e-3)
    assert fall["low"] < fall["estimate"] < fall["high"]
    assert pick(table, family="qwen3", method="sia", target_ratio=0.2, versus="", metric="share of junctions shifted")[
        "estimate"
    ] == pytest.approx(part["shifted"].mean(), abs=1e-3)


def test_words_are_those_of_the_tokenizer():
    tokenizer = build_tokenizer(World(WorldConfig()).words)
    assert [words.word(SMOKE, i) for i in range(len(tokenizer))] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def test_the_gain_of_a_step_is_what_its_definition_says():
    """The per-token values of the made-up probes are what the candidates are worth: steering gains all that there is to gain."""
    rows = value_error.collect(SMOKE, range(2), FakeResults(SMOKE))
    table = value_error.summarize(rows, SMOKE)
    exact = {"family": "qwen3", "value_model": "value-token", "stretch": ""}
    part = rows[rows["family"] == "qwen3"].sort_values(["replicate", "objective", "state", "rank"])
    base = torch.tensor(np.exp(part["likelihood"].to_numpy(float))).view(-1, SMOKE.decoding.candidates)
    worth = torch.tensor(part["worth"].to_numpy(float)).view_as(base)
    best = laws.optimal_policy(base, worth, 1.0)
    gain = laws.objective(best, base, worth, 1.0) - laws.objective(base, base, worth, 1.0)
    assert pick(table, **exact, metric="gain of steering")["estimate"] == pytest.approx(gain.mean().item(), abs=ROUNDED)
    for how in ("each candidate alike", "by base probability"):
        assert pick(table, **exact, metric=f"squared error of values, {how}")["estimate"] == pytest.approx(0, abs=ROUNDED)
    noisy = pick(table, **(exact | {"value_model": "value-mean"}), metric="gain of steering")
    assert noisy["estimate"] < gain.mean().item()
    assert pick(table, **(exact | {"value_model": "value-mean"}), metric="squared error of values, each candidate alike")["estimate"] > 0.5


# --- theory


def test_random_instances_obey_the_laws():
    rows = pd.concat([theory.random_steps(0).assign(replicate=0), theory.random_trees(0).assign(replicate=0)])
    step, tree = rows[rows["experiment"] == "step"], rows[rows["experiment"] == "tree"]
    assert len(step) == theory.STEPS
    np.testing.assert_allclose(step["regret"], step["kl_base_optimum"], atol=1e-9)
    assert (step["regret"] <= step["bound"] + 1e-9).all()
    assert (step["bound"] <= step["hoeffding"] + 1e-9).all()
    np.testing.assert_allclose(tree["regret"], tree["sum_under_own"], atol=1e-9)
    metrics = {r["metric"]: r["estimate"] for r in [*theory._steps(step), *theory._trees(tree)]}
    assert 0.2 < metrics["trees whose regret exceeds the sum under the optimum's states"] < 0.8
    assert metrics["regret by noise, entropy below 1 / 1 and more"] < 1


def test_the_bound_without_torch_is_the_librarys():
    rng = np.random.default_rng(0)
    base = torch.tensor(rng.normal(size=(300, 6)) * rng.uniform(0, 4, (300, 1))).softmax(-1)
    entropies = torch.special.entr(base).sum(-1)
    for value_range, beta in ((0.1, 1.0), (1.0, 0.3), (5.0, 2.0)):
        expected = laws.regret_bound(base, value_range, beta)
        found = theory._bounds(entropies.numpy(), np.full(300, value_range), beta)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-9)


def test_theorem_2_2s_sum_is_over_unsteered_steps():
    results = FakeResults(SMOKE)
    table = theory.summarize(theory.collect(SMOKE, range(1), results), SMOKE)
    cell = next(c for c in theory.cells(SMOKE, 0).traces if c.gate == "entropy" and c.family == "qwen3")
    tokens = results.rows(cell, "trace")
    tokens = tokens[tokens["seed"] == 0]
    thresholds = tokens["objective"].map(dict(zip(OBJECTIVES, (1.0, 1.1, 1.2), strict=True)))
    skipped = tokens["divergence_token"].where(tokens["entropy"] < thresholds, 0.0)
    wanted = {"experiment": "lab", "family": "qwen3", "value_model": "value-token", "target_ratio": 0.2, "states": "sia"}
    responses = 3 * SMOKE.evaluation.prompts_per_objective
    row = pick(table, **wanted, metric="Σ KL(π‖π*) over unsteered steps, per response")
    assert row["estimate"] == pytest.approx(skipped.sum() / responses, abs=1e-3)
    share = pick(table, **wanted, metric="share of Σ KL(π‖π*) at the steps that the gate opens")
    assert share["estimate"] == pytest.approx(1 - skipped.sum() / tokens["divergence_token"].sum(), abs=1e-3)


# --- claims


@pytest.mark.parametrize(("test", "margin", "low", "high", "expected"), [
    ("more", 0.0, 0.1, 0.3, "reproduced"),
    ("more", 0.0, -0.1, 0.3, "undecided"),
    ("more", 0.0, -0.3, -0.1, "not reproduced"),
    ("more", 0.0, 0.0, 0.0, "not reproduced"),
    ("less", 0.0, -0.3, -0.1, "reproduced"),
    ("less", 0.0, -0.3, 0.1, "undecided"),
    ("less", 0.0, 0.0, 0.0, "not reproduced"),
    ("less", 1.0, 0.2, 0.9, "reproduced"),
    ("at least", -0.1, -0.05, 0.3, "reproduced"),
    ("at least", -0.1, -0.1, -0.1, "reproduced"),
    ("at least", -0.1, -0.2, 0.3, "undecided"),
    ("at least", -0.1, -0.3, -0.2, "not reproduced"),
    ("at least", 6.0, 4.0, 5.0, "not reproduced"),
])  # fmt: skip
def test_verdicts_follow_the_interval(test, margin, low, high, expected):
    assert claims.decide(test, margin, low, high) == expected


def test_claims_are_checked_when_they_are_read(tmp_path):
    text = claims.CLAIMS.read_text(encoding="utf-8")
    path = tmp_path / "claims.toml"
    for old, new, message in (
        (
            'test = "at least"',
            'test = "equal"',
            r'claims.toml: the test of dense-is-unnecessary must be "more", "less" or "at least", got \'equal\'',
        ),
        ('conditions = ["mean-1",', 'conditions = ["nope",', "claims.toml: dense-is-unnecessary names the unknown condition 'nope'"),
    ):
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            claims.read_claims(path)


def test_a_claim_that_fits_several_rows_is_an_error():
    claim = claims.Claim("c", "It holds.", "abstract", "figure1", "", {"method": "sia"}, "more", 0.0)
    with pytest.raises(LookupError, match=r"c .* fits 2 rows of figure1"):
        claims.find(claim, pd.DataFrame({"method": ["sia", "sia", "dense"]}))


def test_verdicts_of_single_replicates_stand_beside_the_pooled_one():
    table = table_of(figure1, lambda cell: (1.0 - 2.0 * cell.replicate) * (cell.gate == "entropy"))
    claim = claims.Claim("c", "It holds.", "abstract", "figure1", "under", {
        "method": "sia", "versus": "random", "target_ratio": 0.2, "family": "all", "objective": "all", "metric": "judge",
        "value_model": "value-mean",
    }, "more", 0.0)  # fmt: skip
    row = claims.verdicts({"figure1": table.assign(versus=table["versus"].fillna(""))}, [claim]).iloc[0]
    assert (row["verdict"], row["verdict_by_replicate"], row["estimate_by_replicate"]) == (
        "undecided", "reproduced|not reproduced", "1.0000|-1.0000",
    )  # fmt: skip
    assert claims.sentence(row) == "undecided       It holds. (under) +0.000 [-1.000, +1.000], needs > 0; 0 of 2 replicates say the same"
