"""Figures on made-up rows: drawings, and what traces, probes and the theory come to."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from benchmarks.__main__ import FIGURES
from benchmarks.analysis import claims, estimates, tables
from benchmarks.analysis.divergence import NOISES, regret_bounds
from benchmarks.engine.theory import STEPS, random_instances
from benchmarks.figures import (
    entropy,
    figure2,
    figure4,
    figure5,
    style,
    table1,
    theory,
    value_error,
)  # fmt: skip
from benchmarks.spec.cells import OBJECTIVES
from benchmarks.spec.profile import Profile, load_profile
from sia import theory as laws
from tests.helpers.fake import ROUNDED, SMOKE, FakeResults, pick, table_of


class Picture(NamedTuple):
    """What a reader finds in one picture, besides its data."""

    panels: list[tuple[str, str, bool, bool]]  # labels of x and y, whether neighbours share them
    legend: list[str]
    caption: str
    width: float
    texts: list[str]  # all that is written in it


class Drawn(NamedTuple):
    """A figure's summary as it is read from disk, its files, and its pictures by name."""

    summary: pd.DataFrame
    paths: Sequence[Path]
    pictures: dict[str, Picture]


# given models: one family, one loss, nothing tuned
REAL = replace(
    load_profile("llama-3.2-1b"),
    sweep=replace(SMOKE.sweep, tuning=()),
    evaluation=replace(SMOKE.evaluation, prompts_per_objective=4),
    decoding=SMOKE.decoding,
    statistics=SMOKE.statistics,
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return every figure as it is drawn from made-up rows."""
    return draw_all(SMOKE, 2, tmp_path_factory.mktemp("figures"))


@pytest.fixture(scope="module")
def drawn_of_given_models(tmp_path_factory):
    """Return every figure of given models, on too few prompts for a verdict."""
    return draw_all(REAL, 1, tmp_path_factory.mktemp("given"))


def draw_all(profile: Profile, replicates: int, folder: Path) -> dict[str, Drawn]:
    """Return every figure that the profile can measure, drawn from made-up rows."""
    figures, pictures, finish = {}, {}, style.finish

    def watched(figure, handles, caption, folder, name, **options):
        panels = []
        for axis in (one for one in figure.axes if one.get_label() != "<colorbar>"):
            shared = [
                len(group.get_siblings(axis)) > 1
                for group in (axis._shared_axes["x"], axis._shared_axes["y"])
            ]
            x = axis.get_xlabel() or axis.get_label()  # a colour bar's is "<colorbar>"
            panels.append((x, axis.get_ylabel(), *shared))
        legend = [handle.get_label() for handle in handles]
        paths = finish(figure, handles, caption, folder, name, **options)
        texts = [text.get_text() for text in figure.findobj(Text)]
        pictures[name] = Picture(panels, legend, caption, figure.get_size_inches()[0], texts)
        return paths

    with pytest.MonkeyPatch.context() as patch:
        # neither arranged nor rendered: test_tables looks at files
        patch.setattr("matplotlib.figure.Figure.draw_without_rendering", lambda figure: None)
        patch.setattr(style, "write_atomically", lambda path, write: path.touch())
        patch.setattr(style, "finish", watched)
        for name, figure in FIGURES.items():
            if figure.why_unsupported(profile):
                continue
            path = folder / f"{name}.csv"
            table_of(figure, replicates=replicates, profile=profile).to_csv(path, index=False)
            paths = figure.plot(tables.read_summary(path), profile, False, folder)
            figures[name] = Drawn(tables.read_summary(path), paths, dict(pictures))
            pictures.clear()
    return figures


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_from_its_summary(drawn, name):
    paths = drawn[name].paths
    if not FIGURES[name].own_section:  # which the report shows
        assert list(paths) == []
        return
    several = {
        "figure1": ["figure1", "figure1-paired"],
        "figure2": [
            *("figure2", "figure2-llama", "figure2-reward", "figure2-reward-llama"),
            "figure2-paired",
        ],
        "figure4": ["figure4", "figure4-sparse-dense"],
    }
    suffixes = ("md", "tex") if name == "table1" else ("png", "pdf")
    files = [f"{stem}.{suffix}" for stem in several.get(name, [name]) for suffix in suffixes]
    assert [path.name for path in paths if path.exists()] == files


@pytest.mark.parametrize("name", [f"figure{number}" for number in range(1, 6)])
def test_a_reader_finds_labels_a_legend_and_the_sample_size(drawn, name):
    for picture in drawn[name].pictures.values():
        assert len(set(picture.legend)) == len(picture.legend)
        assert not {label for label in picture.legend if not label or label.startswith("_")}
        assert len(picture.caption) <= 2 * style.CHARACTERS * picture.width
        assert re.search(r"n = \d+ \(\d+ repl.* prompts?\), \d+ samples? each", picture.caption)
        assert re.search("(bootstrap|t) intervals over|No intervals", picture.caption)
        for x, y, shares_x, shares_y in picture.panels:
            assert x or shares_x, picture
            assert y or shares_y, picture


def test_figures_of_given_models_have_no_label_of_the_lab(drawn_of_given_models):
    assert len(drawn_of_given_models) == 10
    texts = [
        text
        for drawn in drawn_of_given_models.values()
        for picture in drawn.pictures.values()
        for text in picture.texts
    ]
    texts += [path.read_text("utf-8") for path in drawn_of_given_models["table1"].paths]
    assert "instruct" in texts
    written = "\n".join(texts)
    of_the_lab = "judge|[Ll]oss|both|GenARM|SD\\)|Qwen3|best β|chosen|Framed|Ticks"
    assert re.findall(f".*(?:{of_the_lab}).*", written) == []


def test_a_forest_of_too_few_prompts_says_so(drawn, drawn_of_given_models):
    sparse_dense = "figure4-sparse-dense"
    picture = drawn_of_given_models["figure4"].pictures[sparse_dense]
    few = "too few prompts for a verdict, which needs 50"
    assert f"is better; {few}. Bars: 95%" in picture.caption
    picture = drawn["figure4"].pictures[sparse_dense]  # of 90 prompts
    dotted = "dotted: margin of reaching dense, −0.05."
    assert f"{dotted} Ticks: single replicates. Bars: 95%" in picture.caption


def test_panels_without_data_are_left_out(drawn, drawn_of_given_models, monkeypatch, tmp_path):
    strength = [one["figure4"].pictures["figure4"] for one in (drawn, drawn_of_given_models)]
    assert [len(picture.panels) for picture in strength] == [2 * 5, 4]
    cost = drawn["cost"].pictures["cost"]
    assert len(cost.panels) == 3
    assert "Too few responses for the cost by length (15 of a length)." in cost.caption
    table = drawn["cost"].summary
    longer = table[table["length"].notna()].assign(length=lambda rows: rows["length"] + 10)
    figures = []
    monkeypatch.setattr(style, "finish", lambda figure, *_, **__: figures.append(figure))
    FIGURES["cost"].plot(pd.concat([table, longer], ignore_index=True), SMOKE, False, tmp_path)
    assert [axis.get_ylabel() for axis in figures[0].axes][1:] == [
        "",
        "judge score",
        "token positions",
    ]


def test_figure2_shows_each_replicate_at_the_realised_ratio_of_all(drawn):
    table = drawn["figure2"].summary
    data = figure2.rows_to_plot(table, SMOKE, "judge", "llama")
    swept = {"sia", "dense", "random", "junction", "q-head"}
    assert set(data["method"]) == {*swept, *figure2.STATIC}
    assert (data.loc[data["setting"] == "", "method"].isin(figure2.STATIC)).all()
    assert set(data["setting"]) == {"", *figure2.settings(SMOKE).values()}
    unit = ["method", "setting", "objective", "target_ratio"]
    for _, rows in data[data["method"] == "sia"].groupby(unit):
        assert sorted(rows["replicate"]) == ["0", "1", "all"]
        assert rows["ratio"].nunique() == 1


def test_figure4_compares_sparse_and_dense_in_every_setting(drawn):
    selected = figure4.sparse_against_dense(drawn["figure4"].summary, SMOKE)
    assert list(selected["setting"].unique()) == ["β = 1", "best β", "equal KL"]
    pooled = selected[selected["replicate"] == "all"]
    per_panel = pooled.groupby(["metric", "loss", "setting"]).size()
    assert (per_panel == len(SMOKE.sweep.main_ratios) + 1).all()
    settings = per_panel.groupby(["metric", "loss"]).size()
    assert set(settings.index.get_level_values("metric")) == {"judge", "reward"}
    assert settings["judge"].to_dict() == {"paper's loss": 3, "per-token loss": 2}  # not tuned
    assert (selected.groupby(["metric", "loss", "setting", "line"]).size() == 3).all()


def test_differences_are_drawn_in_standard_deviations_of_the_base(drawn):
    table = drawn["figure4"].summary
    selected = figure4.sparse_against_dense(table, SMOKE)
    for metric, rows in selected.groupby("metric"):
        (of_20,) = rows[
            (rows["setting"] == "β = 1") & (rows["loss"] == "per-token loss")
            & (rows["line"] == "20%") & (rows["replicate"] == "all")
        ].to_dict("records")  # fmt: skip
        points = pick(
            table, metric=metric, method="sia", versus="dense", target_ratio=0.2, beta=1.0,
            family="all", objective="all", value_model="value-token", tuned=False, matched="",
        )  # fmt: skip
        spread = estimates.base_sd(table, metric)
        assert [of_20[name] * spread for name in estimates.NUMBERS] == pytest.approx(
            [points[name] for name in estimates.NUMBERS]
        )


def test_figure5_counts_the_responses_that_reach_a_position(drawn):
    table = drawn["figure5"].summary
    selected = table[
        (table["method"] == "sia") & (table["target_ratio"] == table["target_ratio"].min())
    ]
    selected = figure5.with_row_names(selected)
    grid = figure5.shares(selected, SMOKE)
    assert list(grid.index)[:2] == ["Qwen3, harmlessness", "Qwen3, helpfulness"]
    row = selected[(selected["family"] == "qwen3") & (selected["objective"] == "honesty")]
    of_reached = row[row["metric"] == "junction_share_of_reached"].set_index("position")["estimate"]
    assert grid.loc["Qwen3, honesty", 3] == of_reached[3]
    assert grid.shape[1] <= 12  # the made-up responses have at most 11 tokens
    lengths = figure5.mean_lengths(selected, grid.index)
    assert lengths[2] == row.loc[row["metric"] == "response_length", "estimate"].item()


@pytest.mark.parametrize("name", FIGURES)
def test_summaries_have_the_promised_columns_and_no_row_twice(drawn, name):
    promised = (
        "objective family model value_model method gate target_ratio ratio beta best_of metric "
        "replicate estimate low high n seeds"
    )
    table = drawn[name].summary
    assert table.columns[:17].tolist() == promised.split()
    always = "objective family model value_model method target_ratio best_of metric beta tuned "
    always += "tau search matched versus"
    some = "replicate position experiment states entropy_bin noise offset "
    some += "versus_target_ratio versus_value_model"
    keys = always.split() + [name for name in some.split() if name in table]
    assert not table.duplicated(keys).any(), table[table.duplicated(keys, keep=False)]


def test_every_claim_finds_its_row_or_none(drawn):
    """On the smoke profile some are not measured (other shares, the best of 8), none twice."""
    verdicts = claims.pooled_verdicts(
        claims.verdicts(
            {name: table for name, (table, *_) in drawn.items()}, claims.claims_for(SMOKE), 0.95
        )
    )
    missing = verdicts[verdicts["verdict"] == "not measured"]
    assert set(missing["claim"]) <= {
        "share-is-enough", "entropy-beats-random", "entropy-beats-random-at-80",
        "stronger-guidance", "stronger-guidance-loses", "helps-best-of-n",
        "helps-best-of-n-at-equal-positions",
        "helps-best-of-n-at-equal-positions-at-40", "helps-best-of-n-at-twice-as-many",
        "best-of-n-helps", "sparse-best-of-n", "predicted-beat-entropy",
    }  # fmt: skip
    assert len(verdicts) > 120
    measured = verdicts[verdicts["verdict"] != "not measured"]
    assert measured["verdict"].isin(claims.VERDICTS).all()
    decided = measured["verdict"] != "too few prompts"
    several = decided & (measured["replicates"] == 2)
    assert (measured[several]["marks"].str.len() == 2).all()
    assert (measured[~several]["marks"] == "").all()
    # random instances have no world
    alone = measured.loc[decided & ~several, "claim"]
    assert alone.str.startswith(("lemma-2-1", "theorem-2-2", "proposition-2-3")).all()
    assert set(measured.loc[~decided, "figure"]) == {
        "cost", "figure2", "regret", "threshold", "value-error",
    }  # fmt: skip


# --- traces and probes


def test_positions_of_junctions():
    results = FakeResults(SMOKE)
    rows = FIGURES["figure5"].collect(SMOKE, range(1), results)
    table = FIGURES["figure5"].summarize(rows, SMOKE)
    steered = next(
        cell
        for cell in FIGURES["figure5"].cells(SMOKE, 0).traces
        if cell.gate == "entropy" and cell.family == "llama"
    )
    tokens = results.rows(steered, "trace")
    tokens = tokens[tokens["objective"] == "honesty"]
    responses = len(tokens.groupby(["prompt", "seed"]))
    setting = {"family": "llama", "objective": "honesty", "method": "sia", "target_ratio": 0.2}
    for position in (0, 4, 15):
        share = tokens[(tokens["step"] == position)]["steered"].sum() / responses
        assert pick(table, **setting, metric="junction_share", position=position)[
            "estimate"
        ] == pytest.approx(share, abs=ROUNDED)
    assert pick(table, **setting, metric="response_length")["estimate"] == pytest.approx(
        len(tokens) / responses, abs=ROUNDED
    )
    # base responses are asked where the gate would open, at the threshold of their objective
    base = results.rows(FIGURES["figure5"].cells(SMOKE, 0).traces[1], "trace")
    base = base[base["objective"] == "honesty"]
    share = ((base["entropy"] >= 1.2) & (base["step"] == 2)).sum() / responses
    assert pick(table, **(setting | {"method": "base"}), metric="junction_share", position=2)[
        "estimate"
    ] == pytest.approx(share, abs=ROUNDED)


@pytest.mark.parametrize(
    ("limit", "junctions"), [(80, [3, 63, 64, 69]), (300, [0, 127, 128, 192, 255, 256, 299])]
)
def test_every_64_positions_have_their_own_bits(limit, junctions):
    places = {"objective": "honesty", "prompt": 0, "seed": 0, "step": range(limit)}
    opened = [i in junctions for i in range(limit)]
    row = figure5.by_response(pd.DataFrame(places | {"junction": opened}), limit)
    assert [at for at in range(limit) if figure5.junctions_at(row, at)[0]] == junctions
    assert row["tokens"].tolist() == [limit]
    numbers = [
        "junctions_low",
        "junctions_high",
        *(f"junctions_{i}" for i in range(128, limit, 64)),
    ]
    assert list(row) == ["objective", "prompt", "seed", *numbers, "tokens"]


def test_positions_before_the_first_junction_are_shown():
    shares = [0.0, 0.5, 0.0, None]  # of the responses that reach a position: all, all, half, none
    keys = {
        "family": "qwen3",
        "objective": list(OBJECTIVES) * 4,
        "position": np.repeat(range(4), 3),
    }
    table = pd.concat(
        pd.DataFrame(keys).assign(metric=metric, estimate=np.repeat(np.float64(shares), 3))
        for metric in ("junction_share", "junction_share_of_reached")
    )
    grid = figure5.shares(figure5.with_row_names(table), replace(SMOKE, families=("qwen3",)))
    assert grid.to_numpy().tolist() == [[0.0, 0.5, 0.0]] * 3


def test_zeros_have_no_sign_in_table_1():
    names = dict.fromkeys((*table1.KEYS, "gate", "model"), "") | {"method": "base"}
    names |= {"target_ratio": 0.0, "best_of": 1, "tuned": False}
    numbers = {"metric": "reward", "estimate": -1e-3, "low": -4e-3, "high": 0.0}
    texts, _ = table1.cells_of(pd.DataFrame([names | numbers]), SMOKE)
    assert texts.to_numpy().tolist() == [["0.00 [0.00, 0.00]"]]


def test_shares_are_told_apart_in_pictures_and_tables(tmp_path, monkeypatch):
    shares = (0.01, 0.015, 0.02, 0.2)
    sweep = replace(SMOKE.sweep, ratios=shares, main_ratios=shares[1:], reduced_ratios=shares)
    profile, lines = replace(SMOKE, sweep=sweep), set()
    curves = style.curves

    def record(data, x, by="method", **options):
        lines.update(data[by])
        return curves(data, x, by, **options)

    monkeypatch.setattr(style, "curves", record)
    for name in ("best-of-n", "table1"):
        table = table_of(FIGURES[name], profile=profile).fillna({"versus": ""})
        FIGURES[name].plot(table, profile, False, tmp_path)
    assert {"SIA at 1%", "SIA at 1.5%", "SIA at 2%", "SIA at 20%"} <= lines
    assert "SIA at 1.5%" in (tmp_path / "table1.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("candidates", [2, 10, 11, 12, 20, 127])
def test_the_last_bin_holds_the_highest_entropy(candidates):
    bins = list(entropy.entropy_bins(candidates).values())
    highest = round(math.log(candidates), 2)
    assert bins[0][0] == 0
    assert [high for _, high in bins[:-1]] == [low for low, _ in bins[1:]]
    assert bins[-1][1] - entropy.BIN_WIDTH - 1e-9 <= highest < bins[-1][1]


def test_every_state_is_in_a_bin_of_entropy():
    states = pd.Series([0.0, 0.1, 1.2, 1.5, math.log(20)])
    bins = value_error._in_entropy_bins(states)
    assert sum(bins[name] for name in value_error.ENTROPY_BINS).tolist() == [1] * 5


def test_entropy_around_junctions_stays_within_the_response():
    results = FakeResults(SMOKE)
    rows = FIGURES["entropy"].collect(SMOKE, range(1), results)
    steered = next(
        cell
        for cell in FIGURES["entropy"].cells(SMOKE, 0).traces
        if cell.gate == "entropy" and cell.family == "qwen3"
    )
    tokens = results.rows(steered, "trace").set_index(["objective", "prompt", "seed", "step"])[
        "entropy"
    ]
    for row in (
        rows[(rows["family"] == "qwen3") & (rows["method"] == "sia")]
        .head(200)
        .itertuples(index=False)
    ):
        for offset in entropy.OFFSETS:
            place = (row.objective, row.prompt, row.seed, row.step + offset)
            value = row[rows.columns.get_loc(f"entropy{offset:+d}")]
            assert (math.isnan(value) and place not in tokens.index) or value == pytest.approx(
                tokens[place], abs=0.006
            )
    table = FIGURES["entropy"].summarize(rows, SMOKE)
    selected = rows[(rows["family"] == "qwen3") & (rows["method"] == "sia")]
    setting = {"family": "qwen3", "method": "sia", "target_ratio": 0.2, "versus": ""}
    fall, shifted = (
        pick(table, **setting, metric=metric) for metric in ("entropy_fall", "shifted_share")
    )
    means = (selected["entropy+1"] - selected["entropy+0"]).mean(), selected["shifted"].mean()
    assert (fall["estimate"], shifted["estimate"]) == pytest.approx(means, abs=1e-3)
    assert fall["low"] < fall["estimate"] < fall["high"]


def test_the_gain_of_a_step_follows_its_definition():
    """The made-up per-token values are exact: steering gains all that there is to gain."""
    rows = FIGURES["value-error"].collect(SMOKE, range(2), FakeResults(SMOKE))
    table = FIGURES["value-error"].summarize(rows, SMOKE)
    exact = {"family": "qwen3", "value_model": "value-token", "entropy_bin": ""}
    selected = rows[rows["family"] == "qwen3"].sort_values(
        ["replicate", "objective", "state", "rank"]
    )
    base = torch.tensor(np.exp(selected["base_logprob"].to_numpy(float))).view(
        -1, SMOKE.decoding.candidates
    )
    worth = torch.tensor(selected["worth"].to_numpy(float)).view_as(base)
    best = laws.optimal_policy(base, worth, 1.0)
    gain = laws.objective(best, base, worth, 1.0) - laws.objective(base, base, worth, 1.0)
    assert pick(table, **exact, metric="steering_gain")["estimate"] == pytest.approx(
        gain.mean().item(), abs=ROUNDED
    )
    for metric in ("value_error_uniform", "value_error_weighted"):
        error = pick(table, **exact, metric=metric)["estimate"]
        assert error == pytest.approx(0, abs=ROUNDED)
    noisy = pick(table, **(exact | {"value_model": "value-mean"}), metric="steering_gain")
    assert noisy["estimate"] < gain.mean().item()
    assert (
        pick(
            table,
            **(exact | {"value_model": "value-mean"}),
            metric="value_error_uniform",
        )["estimate"]
        > 0.5
    )


def test_the_losses_of_unsteered_steps_and_of_noise_obey_the_laws():
    rows = (
        FIGURES["value-error"]
        .collect(SMOKE, range(2), FakeResults(SMOKE))
        .astype({"base_logprob": "float32"})
    )
    table = FIGURES["value-error"].summarize(rows.sample(frac=1, random_state=0), SMOKE)
    selected = rows.sort_values(["family", "replicate", "objective", "state", "rank"])
    base = torch.tensor(np.exp(selected["base_logprob"].to_numpy(float))).view(
        -1, SMOKE.decoding.candidates
    )
    base = base / base.sum(-1, keepdim=True)  # float32 in the rows
    values = torch.tensor(selected["value_mean"].to_numpy(float)).view_as(base)
    low = torch.special.entr(base).sum(-1) < 1
    replicate = torch.tensor(selected["replicate"].to_numpy(int)[:: SMOKE.decoding.candidates])

    def over_replicates(numbers, inside):
        return np.mean([numbers[inside & (replicate == r)].mean().item() for r in range(2)])

    regret, best = laws.step_regret(base, base, values, 1.0), laws.optimal_policy(base, values, 1.0)
    pooled = {"family": "all", "value_model": "value-mean"}
    for entropy_bin, inside in (("", low | ~low), ("below 1", low), ("1 and more", ~low)):
        row = pick(table, **pooled, entropy_bin=entropy_bin, metric="regret_left_alone")
        assert row["estimate"] == pytest.approx(over_replicates(regret, inside), abs=ROUNDED)
        assert row["n"] == int(inside.sum())
        small = pick(table, **pooled, entropy_bin=entropy_bin, metric="noise_regret", noise=0.1)[
            "estimate"
        ]
        assert small == pytest.approx(
            over_replicates(laws.expected_noise_regret(base, values, 1.0, 0.1), inside),
            rel=0.15,
            abs=2e-4,
        )
    relative = ((laws.divergence(best, base) - regret).abs() / regret)[regret > 1e-3]
    assert pick(table, **pooled, metric="regret_minus_kl_base_optimum_max")[
        "estimate"
    ] == pytest.approx(0, abs=1e-9)
    assert pick(table, **pooled, metric="regret_vs_kl_optimum_base_median")[
        "estimate"
    ] == pytest.approx(np.median(relative), abs=1e-3)
    # a ratio is taken in each replicate
    below, above, alone = (
        np.array(
            [
                pick(table, **pooled, **labels, replicate=replicate)["estimate"]
                for replicate in ("0", "1")
            ]
        )
        for labels in (
            {"entropy_bin": "below 1", "metric": "noise_regret", "noise": 1.0},
            {"entropy_bin": "1 and more", "metric": "noise_regret", "noise": 1.0},
            {"entropy_bin": "below 1", "metric": "regret_left_alone"},
        )
    )
    ratio = pick(table, **pooled, noise=1.0, metric="noise_regret_below_to_above_tau")
    assert ratio["estimate"] == pytest.approx((below / above).mean(), rel=2e-3)
    assert ratio["low"] < ratio["estimate"] < ratio["high"]
    ratio = pick(table, **pooled, noise=1.0, metric="left_alone_to_noise_regret_below_tau")
    assert ratio["estimate"] == pytest.approx((alone / below).mean(), rel=2e-3)


# --- theory


def test_random_instances_obey_the_laws():
    rows = random_instances([0])
    step, tree = rows[rows["experiment"] == "step"], rows[rows["experiment"] == "tree"]
    assert len(step) == STEPS
    np.testing.assert_allclose(step["regret"], step["kl_base_optimum"], atol=1e-9)
    assert (step["regret"] <= step["bound"] + 1e-9).all()
    assert (step["bound"] <= step["hoeffding"] + 1e-9).all()
    np.testing.assert_allclose(tree["regret"], tree["sum_under_own"], atol=1e-9)
    records = {
        (r["metric"], r.get("noise")): r
        for r in [*theory.summarize_steps(step, SMOKE), *theory.summarize_trees(tree)]
    }
    metrics = {key: record["estimate"] for key, record in records.items()}
    assert 0.2 < metrics["trees_beyond_optimum_sum", None] < 0.8
    assert metrics["noise_regret_below_to_above_tau", 0.3] < 1
    of_noise = [[metrics[name, size] for size in NOISES] for name in (
        "noise_regret_below_tau", "left_alone_to_noise_regret_below_tau",
        "noise_regret_to_prediction",
    )]  # fmt: skip
    assert of_noise[0] == sorted(
        of_noise[0]
    )  # the more noise, the more it loses, and the sooner leaving alone is better
    assert of_noise[1] == sorted(of_noise[1], reverse=True)
    assert of_noise[2][0] == pytest.approx(1, abs=0.05)
    low = step["entropy"] < 1
    mean, ratio = (
        records[metric, 1.0]
        for metric in ("noise_regret_below_tau", "noise_regret_below_to_above_tau")
    )
    assert mean["estimate"] == pytest.approx(step["noise_regret_1"][low].mean(), rel=1e-5)
    assert ratio["estimate"] == pytest.approx(
        step["noise_regret_1"][low].mean() / step["noise_regret_1"][~low].mean(), rel=1e-5
    )
    assert mean["low"] < mean["estimate"] < mean["high"]
    assert ratio["low"] < ratio["estimate"] < ratio["high"]


def test_the_bound_without_torch_equals_the_librarys():
    rng = np.random.default_rng(0)
    base = torch.tensor(rng.normal(size=(300, 6)) * rng.uniform(0, 4, (300, 1))).softmax(-1)
    entropies = torch.special.entr(base).sum(-1)
    for value_range, beta in ((0.1, 1.0), (1.0, 0.3), (5.0, 2.0)):
        expected = laws.regret_bound(base, value_range, beta)
        bounds = regret_bounds(entropies.numpy(), np.full(300, value_range), beta)
        np.testing.assert_allclose(bounds, expected.numpy(), atol=1e-9)


def test_theorem_2_2s_sum_is_over_unsteered_steps():
    results = FakeResults(SMOKE)
    table = FIGURES["theory"].summarize(FIGURES["theory"].collect(SMOKE, range(1), results), SMOKE)
    cell = next(
        c
        for c in FIGURES["theory"].cells(SMOKE, 0).traces
        if c.gate == "entropy" and c.family == "qwen3"
    )
    tokens = results.rows(cell, "trace")
    tokens = tokens[tokens["seed"] == 0]
    thresholds = tokens["objective"].map(dict(zip(OBJECTIVES, (1.0, 1.1, 1.2), strict=True)))
    skipped = tokens["divergence_token"].where(tokens["entropy"] < thresholds, 0.0)
    setting = {
        "experiment": "lab",
        "family": "qwen3",
        "value_model": "value-token",
        "target_ratio": 0.2,
        "states": "sia",
    }
    responses = 3 * SMOKE.evaluation.prompts_per_objective
    row = pick(table, **setting, metric="unsteered_kl")
    assert row["estimate"] == pytest.approx(skipped.sum() / responses, abs=1e-3)
    share = pick(table, **setting, metric="junction_kl_share")
    assert share["estimate"] == pytest.approx(
        1 - skipped.sum() / tokens["divergence_token"].sum(), abs=1e-3
    )


def test_half_of_evenly_spread_junctions_lie_in_the_first_half():
    """The middle token of an odd length counts half."""
    places = [
        {"objective": objective, "prompt": prompt, "seed": 0, "step": step, "junction": True}
        for objective in OBJECTIVES
        for prompt, length in enumerate((1, 4, 5, 7))
        for step in range(length)
    ]
    rows = figure5.by_response(pd.DataFrame(places), SMOKE.decoding.max_new_tokens)
    labels = {"replicate": 0, "method": "base", "target_ratio": 0.2}
    rows = pd.concat([rows.assign(family=family, **labels) for family in SMOKE.families])
    table = FIGURES["figure5"].summarize(rows, SMOKE)
    halves = table.loc[table["metric"] == "first_half_share", "estimate"]
    assert halves.to_numpy() == pytest.approx(0.5)
