"""Parser and exit codes that the command-line tools share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from typing_extensions import override

from benchmarks.spec.profile import expand_home


class Parser(argparse.ArgumentParser):
    """Argument parser that reports bad arguments in one sentence, without the usage."""

    @override
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


RESUMES = "the same command goes on from there"


def path(text: str) -> Path:
    """Return a path as the command line names it; ~ is the home folder."""
    return Path(expand_home(text))


def exit_code(run: Callable[[], int | None], kept: str, setting: str) -> int:
    """Run a command and return its exit code.

    Args:
        run: The command; returns its exit code, or None for 0.
        kept: Sentence that tells an interrupted user what was kept.
        setting: What to lower where the memory of a GPU does not suffice.

    Returns:
        2, after one sentence, for bad input; 130 when interrupted; else what `run` returns.
    """
    try:
        return run() or 0
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print(f"error: out of memory, use a smaller {setting}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {kept}", file=sys.stderr)
        return 130
