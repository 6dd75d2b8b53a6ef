"""Worker processes of one thread each, one per core, with one progress bar over all of them.

Two processes with two threads each run many times slower on two cores than one thread per process.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Self

from tqdm import tqdm

# Big tensors come and go at every step: keep their memory instead of returning it to the system each time (glibc).
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "TOKENIZERS_PARALLELISM": "false",
}

RESPONSES_PER_SECOND = 500  # about what a core decodes unsteered; for the progress bar alone
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go"
_units = None  # in a worker: where its progress goes


def report(units: float) -> None:
    """Called inside a task: so much more of its work is done, in about seconds of one core."""
    if _units is not None:
        _units.put(units)


class Workers:
    """The processes of one run. They start with the first task and import torch once."""

    def __enter__(self) -> Self:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        context = multiprocessing.get_context("spawn")
        self._queue = context.Queue()
        cores = available_cores()
        self._pool = ProcessPoolExecutor(cores, context, initializer=_prepare, initargs=(self._queue, os.getpid()))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._queue.close()

    @contextmanager
    def progress(self, total: float) -> Iterator[None]:
        """One bar over all that is run inside, with an estimate. total: about how many seconds of one core it will take, in the
        units that the tasks `report`."""
        with tqdm(total=total, bar_format=BAR, mininterval=1.0, smoothing=0.02, disable=total == 0) as self._bar:
            drain = threading.Thread(target=_drain, args=(self._queue, self._bar), daemon=True)
            drain.start()
            try:
                yield
                self._queue.put(math.inf)  # all is done, whatever was estimated
            finally:
                self._queue.put(None)
                drain.join()

    def run(self, function: Callable, tasks: Sequence, *, description: str) -> list:
        """function(task) of each task, in the order of the tasks, inside `progress`.

        An exception in a task is raised here; tasks that have not begun are dropped.
        """
        if not tasks:
            return []
        self._bar.set_description(description)
        futures = [self._pool.submit(function, task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]


def available_cores() -> int:
    """Cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _drain(queue: multiprocessing.Queue, bar: tqdm) -> None:
    while (units := queue.get()) is not None:
        bar.update(min(units, bar.total - bar.n))


def _prepare(queue: multiprocessing.Queue, parent: int) -> None:
    global _units
    _units = queue
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """A killed parent takes its workers along; nothing is lost, since results are written atomically."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
