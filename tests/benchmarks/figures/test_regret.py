"""Gain captured by scores of steps, against the library's own report and by definition."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.figures import regret
from benchmarks.figures.registry import FIGURES
from sia.fitting import auroc, captured_shares
from tests.helpers.fake import ROUNDED, SMOKE, FakeResults, pick

FIGURE = FIGURES["regret"]
ONE_FAMILY = replace(SMOKE, families=("qwen3",))


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return FIGURE.collect(ONE_FAMILY, range(2), FakeResults(ONE_FAMILY))


def steps(count: int) -> tuple[pd.DataFrame, pd.Series, pd.Series, pd.Series]:
    """Steps of one objective, with scores (some equal), gains, and whether the token changes."""
    rng = np.random.default_rng(0)
    places = pd.DataFrame({"objective": "honesty", "prompt": np.arange(count) % 5})
    columns = rng.integers(0, 12, count) / 4, rng.exponential(size=count), rng.random(count) < 0.3
    return places, *(pd.Series(column.astype(float)) for column in columns)


def test_shares_and_auroc_are_those_of_the_library():
    places, score, gain, changed = steps(200)
    sums = regret.prompt_sums(places, score, gain, changed).sum(numeric_only=True)
    expected = captured_shares(torch.tensor(score), torch.tensor(gain), regret.SHARES)
    shares = [sums[name] / sums["divergence"] for name in regret.CAPTURED]
    assert shares == pytest.approx(list(expected.values()))
    whole = auroc(torch.tensor(score), torch.tensor(changed).bool())
    assert sums["shifted_above"] / sums["shifted"] == pytest.approx(whole)
    assert sums["kept_below"] / sums["kept"] == pytest.approx(whole)


def test_steps_rank_within_their_objective():
    places, score, gain, changed = steps(100)
    both = pd.concat([places, places.assign(objective="helpfulness")], ignore_index=True)
    twice = (pd.concat([x, y], ignore_index=True)
             for x, y in ((score, score + 100), (gain, gain), (changed, changed)))  # fmt: skip
    sums = regret.prompt_sums(both, *twice).groupby("objective").sum(numeric_only=True)
    assert sums.loc["helpfulness"].tolist() == pytest.approx(sums.loc["honesty"].tolist())
    halves = regret.prompt_sums(both, pd.concat([score, score * np.nan], ignore_index=True),
                                pd.concat([gain, gain], ignore_index=True),
                                pd.concat([changed, changed], ignore_index=True))  # fmt: skip
    assert set(halves["objective"]) == {"honesty"}  # without a score they are left out


def test_the_oracle_captures_most_and_noise_its_share(rows):
    table = FIGURE.summarize(rows.sample(frac=1, random_state=0), ONE_FAMILY)
    setting = {"family": "qwen3", "value_model": "value-token", "experiment": "usual"}
    at = setting | {"metric": "captured_divergence", "target_ratio": 0.2, "versus": ""}
    captured = {name: pick(table, **at, method=name)["estimate"] for name in regret.SCORES}
    assert max(captured, key=captured.get) == "divergence"
    assert captured["random"] == pytest.approx(0.2, abs=0.06)
    noise = pick(table, **setting, metric="shift_auroc", method="random")
    assert noise["estimate"] == pytest.approx(0.5, abs=0.06)
    assert noise["low"] < noise["estimate"] < noise["high"]
    # the pooled estimate is the mean of the replicates'
    alone = [pick(table, **at, method="junction", replicate=r)["estimate"] for r in ("0", "1")]
    assert captured["junction"] == pytest.approx(np.mean(alone), abs=2 * ROUNDED)
    beyond = pick(table, **at | {"versus": "sia"}, method="junction")
    expected = captured["junction"] - captured["sia"]
    assert beyond["estimate"] == pytest.approx(expected, abs=2 * ROUNDED)
    assert beyond["low"] < beyond["estimate"] < beyond["high"]


def test_held_out_topics_are_judged_on_their_own_prompts(rows):
    unseen, seen = (rows[rows["experiment"] == f"{name}-topics"] for name in ("unseen", "seen"))
    for some in (unseen, seen):
        assert set(some["method"]) == set(regret.COMPARED)
        assert set(some["prompt"]) == set(range(0, SMOKE.evaluation.prompts_per_objective, 4))
    oracle = [some[some["method"] == "divergence"][regret.SUMS] for some in (unseen, seen)]
    np.testing.assert_array_equal(*oracle)
    predictor = [some[some["method"] == "junction"][regret.SUMS] for some in (unseen, seen)]
    assert not np.array_equal(*predictor)
