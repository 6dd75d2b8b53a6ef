"""Training, measuring and judging in this process, at the smallest scale."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from benchmarks.__main__ import FIGURES, main
from benchmarks.analysis.claims import VERDICTS
from benchmarks.runtime.workers import ThisProcess
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.train import stages
from tests.helpers.project import copy_project
from tests.helpers.tiny_lab import TINY, cells, table

# what only a lab can measure, and kinds of cells that others do not have
NAMES = (
    "figure2",
    "figure3",
    "best-of-n",
    "junctions",
    "regret",
    "theory",
    "threshold",
    "value-error",
)
MEASURED = {name: FIGURES[name] for name in NAMES}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with a tiny profile, in which these figures have been reproduced."""
    path = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        (copy_project(patch, path) / "tiny.toml").write_text(TINY)
        patch.setattr("benchmarks.engine.run.Workers", lambda *_: ThisProcess())
        patch.setattr("benchmarks.__main__.FIGURES", MEASURED)
        # test_figures draws
        patch.setattr("benchmarks.__main__.draw", lambda names, profile: [[] for _ in names])
        run("reproduce")
        yield path


def run(*arguments: str) -> None:
    assert main([*arguments, "--profile", "tiny"]) == 0


def test_reproduce_leaves_tables_and_a_report(checkout):
    for name in MEASURED:
        assert (checkout / f"results/tiny/{name}.json").stat().st_size > 0
    page = (checkout / "figures/tiny/report.html").read_text(encoding="utf-8")
    assert '"prompts":{"harmlessness":[' in page  # the viewer's
    claims = pd.read_csv(checkout / "results/tiny/claims.csv")
    assert set(VERDICTS) >= set(claims["verdict"])
    rows = pd.read_parquet(checkout / "results/tiny/figure2.parquet")
    labels = ["value_model", "method", "search", "target_ratio", "tuned", "model"]
    # 8 baselines; for each loss SIA, dense, random and junction gate, Q-head, gate with Q-head and
    # vocabulary head at β = 1; for the paper's loss the first five tuned
    cells_of_values = 2 * 7 + 5
    assert len(rows[labels].drop_duplicates()) == 8 + cells_of_values
    per_cell = 3 * 4 * 2
    rollouts = 3 * 1 * 2
    assert (
        len(rows) == (8 - 1 + cells_of_values) * per_cell + rollouts + per_cell
    )  # best-of-2 holds the first response too
    dense = rows[rows["method"] == "dense"]
    assert (dense["steered"] == dense["tokens"]).all()
    static = rows[rows["gate"] == "never"]
    assert (static["steered"] == 0).all()
    assert set(rows[~rows["tuned"] & (rows["gate"] != "never")]["beta"]) == {1.0}
    sparse = rows[rows["method"] == "sia"]
    assert sparse["threshold"].notna().all()
    assert sparse.groupby("tuned")["threshold"].nunique().max() > 1  # each objective has its own
    models = pd.read_csv(checkout / "results/tiny/models.csv")
    correlations = {f"judge_correlation_at_{percent}" for percent in (10, 50, 100)}
    assert {"corpus_loss", "pair_accuracy"} | correlations <= set(models["metric"])
    further = {"base-large", "base@many-decoys", "value-token@many-decoys"}
    further |= {"heads-mean", "heads-token"}
    assert further | {"autoregressive-reward"} <= set(models["model"])
    scale = models[models["metric"] == "scaled_reward_sd"]["estimate"]
    assert len(scale) > 0
    assert scale.between(0.5, 6.0).all()


def test_searches_count_what_they_try(checkout):
    """Best-of-2 holds the plain response; its cost is that of generating and reading both."""
    rows = pd.read_parquet(checkout / "results/tiny/best-of-n.parquet")
    unit = ["objective", "prompt", "seed"]
    base = rows[(rows["method"] == "base")]
    one, two = (base[base["best_of"] == n].set_index(unit) for n in (1, 2))
    assert (
        two["tokens"] == one["tokens"]
    ).mean() > 0  # the first response is kept where it is the better one
    assert (two["model_tokens"] > one["model_tokens"]).all()
    assert (one["value_tokens"] == 0).all()
    assert (two["value_tokens"] > 0).all()
    steered = rows[rows["method"] == "sia"]
    assert (
        steered[steered["best_of"] == 2].set_index(unit)["value_tokens"]
        > steered[steered["best_of"] == 1].set_index(unit)["value_tokens"]
    ).all()


def test_replicates_at_once_alone_and_one_after_the_other(checkout, capsys):
    """Both together, the first again, the second added to it: the same rows and summaries."""
    alone = table(checkout, "threshold")
    run("threshold", "--fresh", "--replicates", "2")
    together = table(checkout, "threshold")
    labels = ["family", "model", "value_model", "method", "target_ratio", "metric", "tau", "versus"]
    texts = dict.fromkeys([*labels, "replicate"], str)
    path = checkout / "results/tiny/threshold.csv"
    summary = pd.read_csv(path, dtype=texts, keep_default_na=False)
    alone_too = summary["metric"].isin(["judge", "reward"]) | (summary["versus"] != "")
    pooled = summary[(summary["objective"] == "all") & alone_too]
    by_replicate = pooled.pivot(index=labels, columns="replicate", values="estimate")
    assert set(by_replicate) == {"all", "0", "1"}
    assert by_replicate.notna().all(axis=None)
    mean = by_replicate[["0", "1"]].mean(axis="columns")
    np.testing.assert_allclose(by_replicate["all"], mean, rtol=0, atol=1.5e-4)

    before, models = cells(checkout), checkout / ".cache/tiny/models"
    trained = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    smoke = load_profile("smoke")
    tiny = dataclasses.replace(smoke, families=("qwen3",), worlds=smoke.worlds[:1])
    assert len(list(models.glob("replicate0-*/*"))) == sum(map(len, stages(tiny)))
    capsys.readouterr()
    run("threshold", "--fresh")
    printed = capsys.readouterr().out
    assert "measuring, as FRESH=1 asks" in printed
    assert (
        "100% equal those of the committed first replicate to the last digit "
        "(largest difference 0.0000)" in printed
    )
    assert "lie inside the committed intervals over 2 replicates" in printed
    assert set(pd.read_csv(checkout / "results/tiny/threshold.csv")["replicates"]) == {1}
    after = cells(checkout)
    assert set(after) == set(before)
    again = {path for path in before if after[path] > before[path]}
    assert 0 < len(again) < len(before)  # its own cells, and no others
    assert trained == {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    assert table(checkout, "threshold") == alone
    assert not (checkout / ".cache/tiny/measuring-again").exists()

    keep = ("threshold", "--keep", "--replicates", "2")
    for message in (
        "threshold: measuring, as KEEP=1 asks",
        "KEEP=1: the tables have all 2 replicates, nothing to measure",
    ):
        run(*keep)
        assert message in capsys.readouterr().out
        assert table(checkout, "threshold") == together
    provenance = json.loads((checkout / "results/tiny/threshold.json").read_text())
    assert provenance["replicates"] == [0, 1]
    provenance["code_digest"] = "0123456789abcdef"
    (checkout / "results/tiny/threshold.json").write_text(json.dumps(provenance))
    assert main([*keep, "--profile", "tiny"]) == 2
    assert capsys.readouterr().err == (
        "error: threshold was measured by other code than today's, so KEEP=1 cannot keep it: "
        "use FRESH=1\n"
    )
