"""One sentence, with what to change, where memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

from sia._memory import ran_out_of_memory


@contextmanager
def memory_errors(work: str, amount: int, unit: str, setting: str) -> Iterator[None]:
    """Say what to change where memory does not suffice inside.

    Args:
        work: What is done: "measuring …".
        amount: Of what is held in memory together.
        unit: Of that amount: "responses" or "tokens".
        setting: Beginning of what sets another amount: "BATCH_SIZE=".

    Raises:
        ValueError: In place of running out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        remedy = f"use {setting}{amount // 2}"
        if amount == 1:
            remedy = "that takes more memory, or smaller models"
        together = f"{amount} {unit} together"
        raise ValueError(f"out of memory while {work}, {together}: {remedy}") from error
