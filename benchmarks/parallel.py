"""Tasks in a few worker processes of one thread each, with one progress bar over all of them.

Two processes with two threads each run many times slower on two cores than one thread per process.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from tqdm import tqdm

# Big tensors come and go at every step: keep their memory instead of returning it to the system each time (glibc).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}

Report = Callable[[int], None]
_units = None


def report(units: int) -> None:
    """Called inside a task: so much more of its work is done."""
    if _units is not None:
        _units.put(units)


def run(function: Callable, tasks: Sequence, *, description: str, total: int, unit: str) -> Iterator[tuple[object, object]]:
    """Yields (task, function(task)) as they finish, one worker per core. The tasks `report` units of work out of `total`.

    An exception in a task ends the run and is raised here.
    """
    if not tasks:
        return
    for name, value in MALLOC.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    with (
        tqdm(total=total, desc=description, unit=unit, unit_scale=True, mininterval=1.0, smoothing=0.05) as bar,
        ProcessPoolExecutor(workers, context, _prepare, (queue, os.getpid())) as pool,
    ):
        drain = threading.Thread(target=_drain, args=(queue, bar), daemon=True)
        drain.start()
        futures = {pool.submit(function, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
            queue.put(None)
            drain.join()


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
