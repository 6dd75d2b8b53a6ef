"""The lab at the smallest scale, in a checkout of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.runtime.fingerprints import ROOT

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
max_new_tokens = 6
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
