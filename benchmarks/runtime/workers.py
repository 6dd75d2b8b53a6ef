"""Worker processes of one thread each, one per core (or one per GPU), with one progress bar over all of them.

Two processes with two threads each run many times slower on two cores than one thread per process. `benchmarks.runtime.ray_workers` offers the
same on a Ray cluster.
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
from concurrent.futures.process import BrokenProcessPool
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
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go"
_units = None  # in a worker: where its progress goes


def report(units: float) -> None:
    """Called inside a task: so much more of its work is done, in about seconds of one core."""
    if _units is not None:
        _units.put(units)


class Bar(tqdm):
    """A progress bar that promises nothing before a fiftieth is done: the first tasks say little of the rest."""

    @property
    def format_dict(self) -> dict:
        known = super().format_dict
        return known | {"rate": 0} if known["n"] < known["total"] / 50 else known


class Workers:
    """The processes of one run. They start with the first task and import torch once.

    gpus: one process for each, which sees that one alone; 0: a process for each core.
    """

    def __init__(self, gpus: int = 0) -> None:
        self.gpus = gpus

    def __enter__(self) -> Self:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        context = multiprocessing.get_context("spawn")
        self._queue, places = context.Queue(), context.Queue()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        for gpu in visible.split(",")[: self.gpus] if visible else range(self.gpus):
            places.put(gpu)
        arguments = (self._queue, os.getpid(), places if self.gpus else None)
        self._pool = ProcessPoolExecutor(
            self.gpus or available_cores(), context, initializer=_prepare, initargs=arguments
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._queue.close()

    @contextmanager
    def progress(self, total: float) -> Iterator[None]:
        """One bar over all that is run inside, with an estimate. total: about how many seconds of one core it will take, in the
        units that the tasks `report`."""
        with Bar(
            total=total, bar_format=BAR, mininterval=1.0, smoothing=0.02, disable=total == 0
        ) as self._bar:
            drain = threading.Thread(target=_drain, args=(self._queue, self._bar), daemon=True)
            drain.start()
            try:
                yield
                self._queue.put(math.inf)  # all is done, whatever was estimated
            finally:
                self._queue.put(None)
                drain.join()

    def run(
        self, function: Callable, tasks: Sequence, *, description: str, keep: Callable | None = None
    ) -> list:
        """function(task) of each task, in the order of the tasks, inside `progress`.

        keep: called here with each task and its result as soon as it is there; nothing is returned then.
        An exception in a task is raised here; tasks that have not begun are dropped.
        """
        if not tasks:
            return []
        self._bar.set_description(counted(description, 0, len(tasks)))
        numbers = {self._pool.submit(function, task): number for number, task in enumerate(tasks)}
        results: list = [None] * len(tasks)
        try:
            for finished, future in enumerate(as_completed(numbers), start=1):
                number, result = numbers[future], future.result()
                self._bar.set_description(counted(description, finished, len(tasks)), refresh=False)
                if keep:
                    keep(tasks[number], result)
                else:
                    results[number] = result
        except BrokenProcessPool as error:
            raise ValueError(
                f"{description}: a worker process was killed, for want of memory perhaps; finished work is kept"
            ) from error
        finally:
            for future in numbers:
                future.cancel()
        return [] if keep else results


def counted(description: str, finished: int, tasks: int) -> str:
    """What the bar says of tasks that run: how many of them are over."""
    return f"{description}, {finished} of {tasks}"


def available_cores() -> int:
    """Cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _drain(queue: multiprocessing.Queue, bar: tqdm) -> None:
    while (units := queue.get()) is not None:
        bar.update(min(units, bar.total - bar.n))


def _prepare(
    queue: multiprocessing.Queue, parent: int, places: multiprocessing.Queue | None
) -> None:
    global _units
    _units = queue
    if places is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(places.get())
    settle_in()
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def settle_in() -> None:
    """In a worker, before its first task."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch computes on so many threads inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def counting() -> Iterator[list[float]]:
    """In a worker without a queue: what is reported inside comes in this list."""
    global _units

    class Counter(list):
        put = list.append

    _units = Counter()
    try:
        yield _units
    finally:
        _units = None


def _leave_with(parent: int) -> None:
    """A killed parent takes its workers along; nothing is lost, since results are written atomically."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
