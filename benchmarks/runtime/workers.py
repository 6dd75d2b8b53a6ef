"""Worker processes of one thread each, one per core or GPU, under one progress bar.

On two cores, two processes of two threads are many times slower than two processes of one thread.
`benchmarks.runtime.ray_workers` offers the same on a Ray cluster.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from types import ModuleType
from typing import Self

from tqdm import tqdm
from typing_extensions import override

from benchmarks.runtime.files import CACHE, remove_leftovers

# glibc: big tensors come and go at every step, so keep their memory instead of returning it;
# oneDNN: batches shrink row by row, so keep the kernels of every shape instead of 1,024
ENVIRONMENT = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "20000",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "TOKENIZERS_PARALLELISM": "false",
}

RESPONSES_PER_SECOND = 500  # of a core, unsteered, roughly; for the progress bar alone
BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} to go"
_put: Callable[[float], object] | None = None  # in a worker: takes its progress


def report(units: float) -> None:
    """Report progress from inside a task, in estimated seconds of one core."""
    if _put:
        _put(units)


class Bar(tqdm):
    """A bar that estimates the remaining time once 2% is done; without a terminal, stage names."""

    _stage = ""

    @property
    def format_dict(self) -> dict:
        """Numbers that the bar shows."""
        known = super().format_dict
        return known | {"rate": 0} if known["n"] < known["total"] / 50 else known

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        """Show what is running; where the bar is hidden, print the name of each new stage."""
        # without its number (" 1/4") and the count of what is done (", 3 of 9")
        stage = re.split(r" \d|,", desc or "")[0]
        if self.disable and stage != self._stage:
            self._stage = stage
            print(f"{stage} …", file=sys.stderr, flush=True)
        super().set_description(desc, refresh)


def progress_bar(total: float) -> Bar:
    """Return a bar over `total` seconds of work, hidden where there is no terminal or no work."""
    hidden = True if total == 0 else None
    return Bar(total=total, bar_format=BAR, mininterval=1.0, smoothing=0.02, disable=hidden)


class Pool(ABC):
    """Workers that run tasks, here or on a cluster."""

    def run(
        self,
        function: Callable,
        tasks: Sequence,
        *,
        description: str,
        on_result: Callable | None = None,
    ) -> list:
        """Run a function on every task, inside `progress`.

        An exception in a task is raised here; tasks that have not begun are dropped.

        Args:
            function: Called in a worker with one task.
            tasks: Arguments of the function.
            description: Name of the work beside the bar.
            on_result: Called here with each task and its result as soon as that is there.

        Returns:
            The results in the order of the tasks; nothing if `on_result` took them.

        Raises:
            ValueError: If a worker was killed.
        """
        if not tasks:
            return []
        results: list = [None] * len(tasks)
        with closing(self._results(function, tasks, description)) as finished:
            for number, result in finished:
                if on_result:
                    on_result(tasks[number], result)
                else:
                    results[number] = result
        return [] if on_result else results

    @abstractmethod
    def _results(
        self, function: Callable, tasks: Sequence, description: str
    ) -> Generator[tuple[int, object]]:
        """Yield the number of each task and its result, in the order in which they are done."""


class Workers(Pool):
    """Processes of one run. They start with the first task and import torch once.

    Args:
        gpus: GPUs to use; 0: a process for each core.
        gpus_each: GPUs of one process, which sees no other.
    """

    def __init__(self, gpus: int = 0, gpus_each: int = 1) -> None:
        self.gpus, self.gpus_each = gpus, gpus_each

    def __enter__(self) -> Self:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        context = multiprocessing.get_context("spawn")
        self._queue, devices = context.Queue(), context.Queue()
        groups = gpu_groups(self.gpus, self.gpus_each)
        for group in groups:
            devices.put(group)
        arguments = (self._queue, os.getpid(), devices if groups else None)
        self._pool = ProcessPoolExecutor(
            len(groups) or available_cores(), context, initializer=_start, initargs=arguments
        )
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """End the processes; tasks that have not begun are dropped.

        After Ctrl-C those that have begun are, too, with what they had not finished writing.
        """
        interrupted = kind is KeyboardInterrupt
        if interrupted:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(cancel_futures=True)
        self._queue.close()
        if interrupted:
            remove_leftovers(CACHE)

    @contextmanager
    def progress(self, total: float) -> Iterator[None]:
        """Show one bar over everything that runs inside.

        Args:
            total: Estimated seconds of one core, the unit in which tasks `report`; 0: no bar.
        """
        with progress_bar(total) as self._bar:
            drain = threading.Thread(target=_drain, args=(self._queue, self._bar), daemon=True)
            drain.start()
            try:
                yield
                self._queue.put(math.inf)  # all is done, whatever was estimated
            finally:
                self._queue.put(None)
                drain.join()

    @override
    def _results(
        self, function: Callable, tasks: Sequence, description: str
    ) -> Generator[tuple[int, object]]:
        self._bar.set_description(progress_text(description, 0, len(tasks)))
        with interrupts_withheld():
            futures = [self._pool.submit(run_and_release, function, task) for task in tasks]
        numbers = {future: number for number, future in enumerate(futures)}
        try:
            for finished, future in enumerate(as_completed(numbers), start=1):
                number, result = numbers[future], future.result()
                self._bar.set_description(
                    progress_text(description, finished, len(tasks)), refresh=False
                )
                yield number, result
        except BrokenProcessPool as error:
            raise ValueError(
                f"{description}: a worker process was killed, for want of memory perhaps; "
                "finished work is kept"
            ) from error
        finally:
            for future in numbers:
                future.cancel()


class ThisProcess(Pool):
    """Runs tasks in this process, one after another, where a single worker suffices."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Have nothing to end."""

    @contextmanager
    def progress(self, total: float) -> Iterator[None]:
        """Show the bar of `Workers.progress`."""
        global _put
        with progress_bar(total) as self._bar:
            _put = self._bar.update
            try:
                yield
            finally:
                _put = None

    @override
    def _results(
        self, function: Callable, tasks: Sequence, description: str
    ) -> Generator[tuple[int, object]]:
        for number, task in enumerate(tasks):
            self._bar.set_description(progress_text(description, number, len(tasks)))
            yield number, function(task)


def load_ray_workers() -> ModuleType:
    """Import and return `benchmarks.runtime.ray_workers`.

    Raises:
        ValueError: If Ray is not installed.
    """
    try:
        from benchmarks.runtime import ray_workers
    except ImportError as error:
        raise ValueError(
            f"EXECUTOR=ray needs Ray ({error}): pip install -e '.[bench,ray]'"
        ) from error
    return ray_workers


@contextmanager
def interrupts_withheld() -> Iterator[None]:
    """Block SIGINT inside; processes started there never receive Ctrl-C, only their parent does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def gpu_groups(gpus: int, each: int) -> list[str]:
    """Return the devices of each process, as CUDA_VISIBLE_DEVICES names them.

    Args:
        gpus: GPUs to use, the first of those that this process sees.
        each: GPUs of one process.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    return [",".join(names[i : i + each]) for i in range(0, gpus - each + 1, each)]


def progress_text(description: str, finished: int, tasks: int) -> str:
    """Return the text beside the progress bar: the work, and how many of its tasks are done."""
    return f"{description}, {finished} of {tasks}"


def available_cores() -> int:
    """Return the number of cores that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _drain(queue: multiprocessing.Queue, bar: tqdm) -> None:
    while (units := queue.get()) is not None:
        bar.update(min(units, bar.total - bar.n))


def _start(
    queue: multiprocessing.Queue, parent: int, devices: multiprocessing.Queue | None
) -> None:
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    init_worker(queue.put)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def run_and_release(function: Callable, task: object) -> object:
    """Return function(task), and give the memory that it freed back to the system."""
    try:
        return function(task)
    finally:
        release_memory()


def release_memory() -> None:
    """Return free memory to the system, where the C library is glibc, which keeps it otherwise.

    Training meets a hundred shapes, and what it frees lies in pieces below what is still in use.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def init_worker(put: Callable[[float], object]) -> None:
    """Prepare a worker process for its first task; `put` takes what tasks `report`."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    global _put
    _put = put
    torch.set_num_threads(1)
    disable_progress_bar()
    tqdm.set_lock(threading.RLock())  # its own is for several processes, and outlives a killed one


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on `count` threads inside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _exit_with_parent(parent: int) -> None:
    """End this process when its parent was killed; results are written atomically, none is lost."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
