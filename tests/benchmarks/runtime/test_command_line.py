"""Exit codes and paths that the command-line tools share."""

import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.runtime.command_line import exit_code, path, require_new


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
def test_errors_are_one_line(capsys, error, code, message):
    def run():
        raise error

    assert exit_code(run, "all is kept", "--batch-size") == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_weights_that_cannot_be_written_are_one_line(capsys, tmp_path, save):
    """A limit on the size of files does what a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        code = exit_code(lambda: save({"a": torch.zeros(100_000)}, tmp_path / "a"), "", "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a file cannot be written (is the disk full?): ")


def test_faults_of_the_program_keep_their_trace():
    def run():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        exit_code(run, "", "")


@pytest.mark.parametrize("words", [1, 100_000])  # the end, and while printing
def test_a_closed_output_pipe_is_no_error(words):
    program = f"""
import sys
from benchmarks.runtime.command_line import exit_code
def run():
    print("first", flush=True)
    sys.stdin.readline()
    print("word " * {words})
sys.exit(exit_code(run, "", ""))
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait() == 141
        assert process.stderr.read() == ""


def test_a_pipe_broken_elsewhere_is_an_error(capsys):
    def run():
        raise BrokenPipeError("a worker died")

    assert exit_code(run, "", "") == 2
    assert capsys.readouterr().err == "error: a worker died\n"


def test_paths_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path("~/a") == tmp_path / "a"
    assert str(path("a/~")) == "a/~"


def test_outputs_are_new_and_in_no_place_of_a_file(tmp_path):
    file, message = tmp_path / "file", "--output must be written to a folder, got the file {}"
    file.write_text("")
    require_new(tmp_path / "folders" / "to" / "make")
    with pytest.raises(ValueError, match=f"^{file} is there already: name another output, or"):
        require_new(file)
    for output in (file / "a", file / "a" / "b"):
        with pytest.raises(ValueError, match=f"^{message.format(file)}$"):
            require_new(output)
