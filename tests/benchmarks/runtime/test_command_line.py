"""Exit codes and paths that the command-line tools share."""

import pytest
import torch

from benchmarks.runtime.command_line import exit_code, path


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("one sentence"), 2, "error: one sentence\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            2,
            "error: out of memory, use a smaller --batch-size\n",
        ),
        (KeyboardInterrupt(), 130, "\ninterrupted: all is kept\n"),
    ],
)
def test_errors_end_in_one_sentence(capsys, error, code, message):
    def run():
        raise error

    assert exit_code(run, "all is kept", "--batch-size") == code
    assert capsys.readouterr().err == message


def test_faults_of_the_program_keep_their_trace():
    def run():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        exit_code(run, "", "")


def test_paths_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path("~/a") == tmp_path / "a"
    assert str(path("a/~")) == "a/~"
