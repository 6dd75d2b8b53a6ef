"""Workers like those of `benchmarks.runtime.workers` on a Ray cluster; no other file knows Ray.

Every node needs the project's environment, and the clone under the same path, on a file system that
all nodes see: trained lab models and the Hub's cache are read from there. Results come back to the
driver, which alone writes the store. A worker that is lost, alone or with its node, loses the task
in hand and no other: the next free worker takes that task. (Ray restarts a lost actor too, but its
task would wait for a node with room for it while other workers are free.)
"""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import ray
from ray.exceptions import RayError, RayTaskError
from typing_extensions import override

from benchmarks.runtime import workers

ATTEMPTS = 3  # of a task whose workers are lost


def connect() -> None:
    """Connect to the cluster at RAY_ADDRESS, or start one on this machine alone."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")


def gpus() -> int:
    """Return the number of GPUs of the cluster."""
    connect()
    return int(ray.cluster_resources().get("GPU", 0))


@ray.remote(max_restarts=0)
class Worker:
    """Ray actor that keeps its models from task to task."""

    def __init__(self) -> None:
        self.units: list[float] = []
        workers.init_worker(self.units.append)

    def ready(self) -> None:
        """Answer, once the worker has its place."""

    def run(self, function: Callable, task: object) -> tuple[object, float]:
        """Return function(task), and the units of work reported on the way."""
        self.units.clear()
        return workers.run_and_release(function, task), sum(self.units)


class RayWorkers(workers.Pool):
    """Workers of one run on the cluster that `connect` finds, one for each GPU or core.

    Args:
        gpus: GPUs of each worker; 0 for workers on cores.
    """

    def __init__(self, gpus: int = 0) -> None:
        self.gpus = gpus

    def __enter__(self) -> Self:
        """Start the workers.

        Raises:
            ValueError: If the cluster has none of the devices.
        """
        connect()
        resource = "GPU" if self.gpus else "CPU"
        count = int(ray.cluster_resources().get(resource, 0)) // max(1, self.gpus)
        if not count:
            raise ValueError(
                f"the Ray cluster must have a {resource}, it has {ray.cluster_resources()}"
            )
        self._starting: dict = {}
        self._idle: list = []
        for _ in range(count):
            self._start_worker()
        return self

    def _start_worker(self) -> None:
        worker = Worker.options(  # type: ignore[attr-defined]  # ray.remote adds it
            num_gpus=self.gpus, num_cpus=0 if self.gpus else 1
        ).remote()
        self._starting[worker.ready.remote()] = worker

    def __exit__(self, *_: object) -> None:
        ray.shutdown()

    @contextmanager
    def progress(self, total: float) -> Iterator[None]:
        """Show the bar of `Workers.progress`, which moves here when a task is done."""
        with workers.progress_bar(total) as self._bar:
            yield
            self._bar.update(max(0.0, total - self._bar.n))

    @override
    def _results(
        self, function: Callable, tasks: Sequence, description: str
    ) -> Generator[tuple[int, object]]:
        waiting, busy = deque(range(len(tasks))), {}
        # workers lost in each task; None: before they had any
        lost: Counter[int | None] = Counter()
        while waiting or busy:
            self._bar.set_description(
                workers.progress_text(
                    description, len(tasks) - len(waiting) - len(busy), len(tasks)
                ),
                refresh=False,
            )
            while waiting and self._idle:
                worker, number = self._idle.pop(), waiting.popleft()
                busy[worker.run.remote(function, tasks[number])] = worker, number
            (done, *_), _ = ray.wait([*busy, *self._starting])
            starting = done in self._starting
            worker, number = (self._starting.pop(done), None) if starting else busy.pop(done)
            try:
                answer = ray.get(done)
            except RayTaskError as error:  # of the task itself
                raise error.cause from None
            except RayError:  # the worker is lost: its task is the next
                lost[number] += 1
                if lost[number] >= ATTEMPTS:
                    when = "before it had a task" if starting else f"in task {number}"
                    raise ValueError(
                        f"{description}: {ATTEMPTS} workers in a row were lost {when}; "
                        "is the environment on every node, and memory enough?"
                    ) from None
                self._start_worker()
                if not starting:
                    waiting.appendleft(number)
                continue
            self._idle.append(worker)
            if starting:
                lost[None] = 0
                continue
            result, units = answer
            self._bar.update(min(units, self._bar.total - self._bar.n))
            yield number, result
