"""Parser and exit codes that the command-line tools share."""

import argparse
import os
import select
import sys
from collections.abc import Callable
from os.path import expanduser
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from typing_extensions import override


class Parser(argparse.ArgumentParser):
    """Argument parser that reports bad arguments in one sentence, without the usage."""

    @override
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


# what torch.save says when the disk is full, or files may not grow further
UNWRITTEN = ("inline_container", "PytorchStreamWriter")
RESUMES = "the same command resumes from there"


def path(text: str) -> Path:
    """Return a path as the command line names it; ~ is the home folder."""
    return Path(expanduser(text))


def require(
    options: argparse.Namespace, holds: Callable[[Any], bool], expected: str, *names: str
) -> None:
    """Check numbers of the command line; those that are None were not given.

    Raises:
        ValueError: For one that does not hold; names the option, and what it must be.
    """
    for name in names:
        value = vars(options)[name]
        if value is not None and not holds(value):
            raise ValueError(f"--{name.replace('_', '-')} must be {expected}, got {value}")


def require_folder(folder: Path) -> None:
    """Check that an output can be written to a folder: no file is in its place or above it.

    Raises:
        ValueError: If there is one; names it.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"--output must be written to a folder, got the file {place}")


def require_new(output: Path) -> None:
    """Check that an output can be written, and that there is none yet.

    Raises:
        ValueError: If there is, or as `require_folder` does.
    """
    if output.exists():
        raise ValueError(f"{output} is there already: name another output, or delete it")
    require_folder(output.parent)


def require_counts(options: argparse.Namespace, *names: str) -> None:
    """Check that numbers of the command line, where they were given, are at least 1."""
    require(options, lambda count: count >= 1, "at least 1", *names)


def discard_output_if_closed() -> bool:
    """Discard further output if the reader of standard output has gone; return whether it has."""
    output = select.poll()
    output.register(1, 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def exit_code(run: Callable[[], int | None], kept: str, setting: str) -> int:
    """Run a command and return its exit code.

    Args:
        run: The command; returns its exit code, or None for 0.
        kept: Sentence that tells an interrupted user what was kept; may be empty.
        setting: Name of the setting to lower if memory does not suffice.

    Returns:
        2, after a one-sentence error, for bad input; 130 if interrupted; 141 if standard output
        is closed; otherwise what `run` returns.
    """
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except (ValueError, ArithmeticError, OSError) as error:
        if isinstance(error, BrokenPipeError) and discard_output_if_closed():
            return 141
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError, SafetensorError) as error:
        from sia._memory import ran_out_of_memory  # not before: it imports torch

        if isinstance(error, SafetensorError) or any(sign in str(error) for sign in UNWRITTEN):
            print(f"error: a file cannot be written (is the disk full?): {error}", file=sys.stderr)
            return 2
        if not ran_out_of_memory(error):
            raise
        print(f"error: out of memory, use a smaller {setting}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted" + (f": {kept}" if kept else ""), file=sys.stderr)
        return 130
