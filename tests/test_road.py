"""The whole road in a checkout of its own, at the smallest scale: train, measure, draw; killed and gone on with."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = """
replicates = 2
families = ["qwen3", "llama"]
[model]
hidden_size = 16
layers = 1
heads = 2
key_value_heads = 1
feed_forward = 24
[training]
documents = 300
batch_size = 32
base_learning_rate = 5e-3
learning_rate = 1e-3
sampled_prompts = 60
reward_epochs = 1
value_epochs = 1
reward_scale = 2.0
favourites = 0.5
instruct_epochs = 1
heldout_prompts = 12
[decoding]
max_new_tokens = 12
temperature = 1.0
candidates = 10
batch_size = 16
[evaluation]
prompts_per_objective = 6
samples = 2
validation_prompts_per_objective = 4
best_of = 2
[figure2]
targets = [0.2, 0.5, 1.0]
claimed = [0.2, 0.5]
betas = [1.0, 4.0]
[statistics]
resamples = 50
level = 0.95
seed = 0
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks", *arguments, "--profile", "tiny"]


def run(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(command(*arguments), cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(checkout: Path) -> dict[str, bytes]:
    return {name: (checkout / "results/tiny" / name).read_bytes() for name in ("figure2.parquet", "figure2.csv")}


def cells(checkout: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (checkout / ".cache/tiny/cells").glob("*/*.parquet")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources with a tiny profile, in which everything has been reproduced."""
    path = tmp_path_factory.mktemp("checkout")
    for package in ("sia", "benchmarks"):
        shutil.copytree(ROOT / package, path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (path / "benchmarks/profiles/tiny.toml").write_text(TINY)
    run(path, "reproduce")
    return path


def test_reproduce_leaves_tables_and_figures(checkout):
    for name in ("results/tiny/figure2.json", "results/tiny/models.json", "figures/tiny/figure2.png", "figures/tiny/figure2.pdf"):
        assert (checkout / name).stat().st_size > 0
    rows = pd.read_parquet(checkout / "results/tiny/figure2.parquet")
    # per family: 4 baselines; 5 steered cells in three settings, 3 in the one with the claim alone
    assert len(rows) == 2 * (4 + 3 * 5 + 3) * 18 * 2
    assert set(rows["setting"]) == {"", "mean-1", "token-1", "token-best", "mean-best"}
    dense = rows[rows["method"] == "dense"]
    assert (dense["steered"] == dense["tokens"]).all()
    static = rows[rows["setting"] == ""]
    assert (static["steered"] == 0).all()
    assert (static["value_tokens"] == 0).all()
    assert set(rows[rows["setting"].str.endswith("-1")]["beta"]) == {1.0}
    models = pd.read_csv(checkout / "results/tiny/models.csv")
    assert {"loss on the corpus", "pair accuracy", "correlation at 10%", "correlation at 50%", "correlation at 100%"} <= set(
        models["metric"]
    )
    scale = models[models["metric"] == "SD of the rewards distilled"]["estimate"]
    assert scale.between(1.0, 3.0).all()


def test_models_are_trained_once(checkout):
    models = checkout / ".cache/tiny/models"
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    assert len(list(models.glob("replicate0-*/*"))) == 14
    run(checkout, "models")
    assert before == {path: path.stat().st_mtime_ns for path in models.rglob("*")}


def test_the_readme_steers_a_model(checkout):
    """The Python blocks of the README, on the tiny lab."""
    blocks = [block.split("```")[0] for block in (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]]
    assert len(blocks) == 3
    assert ".cache/smoke/models" in blocks[0]
    code = "\n".join(blocks).replace(".cache/smoke/models", str(checkout / ".cache/tiny/models"))
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    response, ratio, best = done.stdout.strip().splitlines()
    assert response.startswith("<bos>")
    assert 0 <= float(ratio) <= 1
    assert math.isfinite(float(best.split()[0]))
    assert "junctions=" in best
    assert (checkout / "my-value-model" / "value_head.safetensors").exists()


def test_fresh_measures_again_and_ends_the_same(checkout):
    expected, before = table(checkout), cells(checkout)
    assert "measuring, as FRESH=1 asks" in run(checkout, "figure2", "--fresh")
    after = cells(checkout)
    assert set(after) == set(before)
    assert all(after[path] > before[path] for path in before)
    assert table(checkout) == expected
    assert not (checkout / ".cache/tiny/measuring-again").exists()


def test_summaries_follow_from_the_rows(checkout):
    expected = table(checkout)
    run(checkout, "summaries")
    assert table(checkout) == expected


def test_drawing_needs_no_torch(checkout):
    code = """
import sys
from benchmarks.__main__ import main
main(["figure2", "--profile", "tiny"])
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert "nothing is measured" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_killed_sweep_goes_on_and_ends_in_the_same_bytes(checkout):
    expected, expected_cells = table(checkout), cells(checkout)
    shutil.rmtree(checkout / ".cache/tiny/cells")
    shutil.rmtree(checkout / "results/tiny")
    process = subprocess.Popen(
        command("figure2"), cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(cells(checkout)) < 20 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = cells(checkout)
    assert len(finished) >= 20
    assert len(finished) < len(expected_cells)
    assert not (checkout / "results/tiny/figure2.json").exists()
    printed = run(checkout, "figure2")
    assert "measuring, for results/tiny has no table of it" in printed
    after = cells(checkout)
    assert {path: after[path] for path in finished} == finished  # nothing that was finished was done again
    assert set(after) == set(expected_cells)
    assert table(checkout) == expected


def test_workers_leave_with_their_parent(checkout):
    shutil.rmtree(checkout / ".cache/tiny/cells")
    process = subprocess.Popen(
        command("figure2", "--fresh"), cwd=checkout, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(cells(checkout)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _group_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _group_members(process.pid) == []


def _group_members(group: int) -> list[int]:
    """Living processes of this process group."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            members.append(int(stat.parent.name))
    return members


def test_a_second_replicate_makes_the_reference(checkout):
    run(checkout, "figure2", "--fresh", "--replicates", "2")
    reference = checkout / "results/tiny/reference/figure2.csv"
    assert reference.read_bytes() == (checkout / "results/tiny/figure2.csv").read_bytes()
    printed = run(checkout, "figure2", "--fresh")
    assert "100% are those of the committed first replicate to the last digit (largest difference 0.0000)" in printed
    assert "lie inside the committed intervals over 2 replicates" in printed
    assert set(pd.read_csv(checkout / "results/tiny/figure2.csv")["replicates"]) == {1}
