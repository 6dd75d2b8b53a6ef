"""The benchmark suite: one file per figure, and what they share.

Data flows one way: profile → cells → rows → table → figure.
"""

import sys
from types import TracebackType

_usual = sys.excepthook


def _without_trace(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """Print no trace for Ctrl-C while modules are imported, before any command runs."""
    if kind is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    else:
        _usual(kind, error, trace)


sys.excepthook = _without_trace
