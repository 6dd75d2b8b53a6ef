"""How the command lines end."""

from __future__ import annotations

import sys
from collections.abc import Callable


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
