"""A one-sentence error, with the setting to change, when memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

from sia._memory import ran_out_of_memory


@contextmanager
def memory_errors(work: str, amount: int, unit: str, setting: str) -> Iterator[None]:
    """Turn out-of-memory errors inside into an error that names the setting to change.

    Args:
        work: Work in progress: "measuring …".
        amount: Number of units held in memory together.
        unit: "responses" or "tokens".
        setting: Prefix of the setting that changes the amount: "BATCH_SIZE=".

    Raises:
        ValueError: Instead of an out-of-memory error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        together, remedy = f"{amount} {unit} together", f"use {setting}{amount // 2}"
        if amount == 1:
            together, remedy = "one at a time", "use a device with more memory, or smaller models"
        raise ValueError(f"out of memory while {work}, {together}: {remedy}") from error
