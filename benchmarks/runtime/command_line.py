"""How the command lines begin and end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


class Parser(argparse.ArgumentParser):
    """Says what is wrong with arguments in one sentence, without the usage."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def exit_code(run: Callable[[], int | None], kept: str) -> int:
    """Runs a command. 2 and one sentence for bad input; 130 when interrupted, `kept` being kept; else what it returns, or 0."""
    try:
        return run() or 0
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {kept}, the same command goes on from there", file=sys.stderr)
        return 130
