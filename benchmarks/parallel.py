"""Worker processes of one thread each, one per core, with one progress bar over all of them.

Two processes with two threads each run many times slower on two cores than one thread per process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Self

from tqdm import tqdm

# Big tensors come and go at every step: keep their memory instead of returning it to the system each time (glibc).
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "TOKENIZERS_PARALLELISM": "false",
}

_units = None  # in a worker: where its progress goes


def report(units: int) -> None:
    """Called inside a task: so much more of its work is done."""
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

    def run(self, function: Callable, tasks: Sequence, *, description: str, total: int, unit: str) -> list:
        """function(task) of each task, in the order of the tasks. The tasks `report` units of work out of `total`.

        An exception in a task is raised here; tasks that have not begun are dropped.
        """
        if not tasks:
            return []
        with tqdm(total=total, desc=description, unit=unit, unit_scale=True, mininterval=1.0, smoothing=0.05) as bar:
            drain = threading.Thread(target=_drain, args=(self._queue, bar), daemon=True)
            drain.start()
            futures = [self._pool.submit(function, task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
            finally:
                for future in futures:
                    future.cancel()
                self._queue.put(None)
                drain.join()
        return [future.result() for future in futures]


def available_cores() -> int:
    """Cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _drain(queue: multiprocessing.Queue, bar: tqdm) -> None:
    while (units := queue.get()) is not None:
        bar.update(units)


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
