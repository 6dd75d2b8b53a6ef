"""Options that mean nothing for a target of make are refused, not dropped."""

import os
import subprocess

import pytest

from benchmarks.runtime.fingerprints import ROOT

READY = [text for name in (".venv/.ready", ".venv/.ready-dev") for text in ("-o", name)]


def commands_of(*words: str) -> subprocess.CompletedProcess:
    """Return what make would run for these words, where the environment is set up."""
    command = ["make", "--no-print-directory", "-n", *READY, "-C", ROOT, *words]
    alone = {"PATH": os.environ["PATH"]}  # MAKEFLAGS would be those of `make test`
    return subprocess.run(command, env=alone, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["check", "PROFILE=lab-words"], "check does not take PROFILE"),
        (["check", "FRESH=1", "DEVICE=cuda"], "check does not take DEVICE"),
        (["speed", "REPLICATES=2"], "speed does not take REPLICATES"),
        (["throughput", "BATCH_SIZE=4"], "throughput does not take BATCH_SIZE"),
        (["demo", "KEEP=1"], "demo does not take KEEP"),
        (["smoke", "PROFILE=lab"], "smoke is a profile of its own: use make reproduce PROFILE=lab"),
        (["reproduce", "FRESH=maybe"], "FRESH should be 1 or 0, got maybe"),
    ],
)
def test_options_that_mean_nothing_are_refused(words, error):
    run = commands_of(*words)
    assert (run.returncode, run.stdout) == (2, "")
    assert error in run.stderr


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["check", "FRESH=1"], "-m benchmarks check --fresh"),
        (["smoke", "FRESH=1"], "-m benchmarks reproduce --profile smoke --fresh"),
        (["cost", "PROFILE=qwen3-8b", "DEVICE=cuda"], "cost --profile qwen3-8b --device cuda"),
        (["speed"], "-m benchmarks.perf.speed"),
    ],
)
def test_options_are_passed_on(words, command):
    run = commands_of(*words)
    assert run.returncode == 0
    assert " ".join(run.stdout.split()).endswith(command)
