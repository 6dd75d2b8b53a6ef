"""Training, measuring and drawing in a checkout of its own, at the smallest scale."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.__main__ import FIGURES
from benchmarks.analysis.claims import VERDICTS
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.train import stages

ROOT = Path(__file__).resolve().parents[2]
TINY = """
replicates = 2
families = ["qwen3"]
[language]
lexicon = "subwords"
pieces = 150
stumbles = 3
sentences = [4, 5, 6]
[model]
hidden_size = 16
layers = 1
heads = 2
key_value_heads = 1
feed_forward = 24
[small]
hidden_size = 8
layers = 1
heads = 2
key_value_heads = 1
feed_forward = 16
[large]
hidden_size = 24
layers = 1
heads = 2
key_value_heads = 1
feed_forward = 32
[training]
documents = 300
batch_size = 32
base_learning_rate = 5e-3
learning_rate = 1e-3
sampled_prompts = 60
reward_epochs = 1
value_epochs = 1
reward_scale = 2.0
best_fraction = 0.5
instruct_epochs = 1
autoregressive_scale = 0.1
world_documents = 60
world_prompts = 30
heldout_prompts = 12
[[worlds]]
name = "many-decoys"
decoys = 2.5
habits = [0.15, 0.5, 0.9]
drift = 0.16
[decoding]
max_new_tokens = 12
temperature = 1.0
candidates = 10
batch_size = 16
[evaluation]
prompts_per_objective = 4
samples = 2
validation_prompts_per_objective = 3
validation_samples = 1
[sweep]
ratios = [0.5]
main_ratios = [0.5]
reduced_ratios = [0.5]
betas = [1.0, inf]
tuning = [1.0]
thresholds = [1.0]
responses = 2
beams = 2
beam_width = 1
chunk = 4
rollout_tokens = 2
rollout_prompts = 1
probes = 2
probe_rollouts = 2
[statistics]
resamples = 50
level = 0.95
seed = 0
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", *arguments, "--profile", "tiny"]


def copy_sources(path: Path) -> None:
    for package in ("sia", "benchmarks"):
        shutil.copytree(
            ROOT / package, path / package, ignore=shutil.ignore_patterns("__pycache__")
        )


def run(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(command(*arguments), cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(checkout: Path, name: str = "figure3") -> dict[str, bytes]:
    return {
        file: (checkout / "results/tiny" / file).read_bytes()
        for file in (f"{name}.parquet", f"{name}.csv")
    }


def cells(checkout: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns for path in (checkout / ".cache/tiny/cells").glob("*/*.cell")
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources with a tiny profile, in which everything has been reproduced."""
    path = tmp_path_factory.mktemp("checkout")
    copy_sources(path)
    (path / "benchmarks/spec/profiles/tiny.toml").write_text(TINY)
    run(path, "reproduce")
    return path


def test_reproduce_leaves_tables_and_figures(checkout):
    starts = {"png": b"\x89PNG", "pdf": b"%PDF", "md": b"# Table", "tex": b"% Estim"}
    for name in FIGURES:
        assert (checkout / f"results/tiny/{name}.json").stat().st_size > 0
        for suffix in {"table1": ("md", "tex"), "junctions": ()}.get(name, ("png", "pdf")):
            content = (checkout / f"figures/tiny/{name}.{suffix}").read_bytes()
            assert content.startswith(starts[suffix]), name
    page = (checkout / "figures/tiny/report.html").read_text(encoding="utf-8")
    assert all(f'<section id="{name}">' in page for name in FIGURES if name != "junctions")
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


def test_summaries_and_figures_follow_from_the_rows_without_torch(checkout):
    expected = table(checkout)
    figure = (checkout / "figures/tiny/figure4.pdf").read_bytes()
    code = """
import sys
from benchmarks import __main__
for name in set(__main__.FIGURES) - {"figure3", "figure4", "junctions"}:  # which is quicker
    del __main__.FIGURES[name]
__main__.main(["summaries", "--profile", "tiny"])
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True
    )
    assert "claims: " in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert table(checkout) == expected
    assert (checkout / "figures/tiny/figure4.pdf").read_bytes() == figure


def start_measuring(checkout: Path, count: int, *arguments: str) -> subprocess.Popen:
    """Start a command on an empty store, and return once it has measured `count` cells."""
    shutil.rmtree(checkout / ".cache/tiny/cells")
    process = subprocess.Popen(
        command(*arguments),
        cwd=checkout,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(cells(checkout)) < count and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    return process


@pytest.mark.faults
def test_a_killed_sweep_goes_on_and_ends_in_the_same_bytes(checkout):
    expected, expected_cells = table(checkout), cells(checkout)
    for name in ("figure3.json", "figure3.csv", "figure3.parquet"):
        (checkout / "results/tiny" / name).unlink()
    process = start_measuring(checkout, 20, "figure3")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = cells(checkout)
    assert len(finished) >= 20
    assert len(finished) < len(expected_cells)
    assert not (checkout / "results/tiny/figure3.json").exists()
    printed = run(checkout, "figure3")
    assert "measuring, because results/tiny has no table for it" in printed
    after = cells(checkout)
    assert {
        path: after[path] for path in finished
    } == finished  # nothing that was finished was done again
    assert set(after) < set(expected_cells)
    assert table(checkout) == expected  # alone, the table that all figures together made


@pytest.mark.faults
def test_workers_exit_with_their_parent(checkout):
    process = start_measuring(checkout, 2, "figure3", "--fresh")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _group_members(process.pid) == []


def _group_members(group: int) -> list[int]:
    """Return the ids of running processes of this process group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def test_replicates_at_once_alone_and_one_after_the_other(checkout):
    """Both together, the first again, the second added to it: the same rows and summaries."""
    alone = table(checkout, "threshold")
    run(checkout, "threshold", "--fresh", "--replicates", "2")
    together = table(checkout, "threshold")
    labels = ["family", "model", "value_model", "method", "target_ratio", "metric", "tau", "versus"]
    texts = dict.fromkeys([*labels, "replicate"], str)
    path = checkout / "results/tiny/threshold.csv"
    summary = pd.read_csv(path, dtype=texts, keep_default_na=False)
    pooled = summary[summary["objective"] == "all"]
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
    printed = run(checkout, "threshold", "--fresh")
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

    assert "threshold: measuring, as KEEP=1 asks" in run(
        checkout, "threshold", "--keep", "--replicates", "2"
    )
    assert table(checkout, "threshold") == together
    assert "KEEP=1: the tables have all 2 replicates, nothing to measure" in run(
        checkout, "threshold", "--keep", "--replicates", "2"
    )
    assert table(checkout, "threshold") == together
    provenance = json.loads((checkout / "results/tiny/threshold.json").read_text())
    assert provenance["replicates"] == [0, 1]
    provenance["code_digest"] = "0123456789abcdef"
    (checkout / "results/tiny/threshold.json").write_text(json.dumps(provenance))
    refused = subprocess.run(
        command("threshold", "--keep", "--replicates", "2"),
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: threshold was measured by other code than today's, so KEEP=1 cannot keep it: "
        "use FRESH=1\n"
    )
