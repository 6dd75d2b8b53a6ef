"""Workers like those of `benchmarks.runtime.workers` on a Ray cluster; no other file knows Ray.

Every node needs the project's environment, and the clone under the same path, on a file system that
all nodes see: trained lab models and the Hub's cache are read from there. Results come back to the
driver, which alone writes the store. A worker that is lost, alone or with its node, loses the task
in hand and no other: the next free worker takes that task. (Ray restarts a lost actor too, but its
task would wait for a node with room for it while other workers are free.)
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import ray
from ray.exceptions import RayError, RayTaskError

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
        """Prepare the process."""
        workers.init_worker()

    def ready(self) -> None:
        """Answer, once the worker has its place."""

    def run(self, function: Callable, task: object) -> tuple[object, float]:
        """Return function(task), and the units of work reported on the way."""
        with workers.counting() as units:
            result = function(task)
        return result, sum(units)


class RayWorkers:
    """Workers of one run on the cluster that `connect` finds, one for each GPU or core.

    Args:
        gpus: True for one worker on each GPU, False for one on each core.
    """

    def __init__(self, gpus: bool = False) -> None:
        """Store the settings; workers start on entering."""
        self.gpus = gpus

    def __enter__(self) -> Self:
        """Start the workers.

        Raises:
            ValueError: If the cluster has none of the devices.
        """
        connect()
        resource = "GPU" if self.gpus else "CPU"
        count = int(ray.cluster_resources().get(resource, 0))
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
            num_gpus=1 if self.gpus else 0, num_cpus=0 if self.gpus else 1
        ).remote()
        self._starting[worker.ready.remote()] = worker

    def __exit__(self, *_: object) -> None:
        """Leave the cluster."""
        ray.shutdown()

    @contextmanager
    def progress(self, total: float) -> Iterator[None]:
        """Show the bar of `Workers.progress`, which moves here when a task is done."""
        with workers.progress_bar(total) as self._bar:
            yield
            self._bar.update(max(0.0, total - self._bar.n))

    def run(
        self, function: Callable, tasks: Sequence, *, description: str, keep: Callable | None = None
    ) -> list:
        """Run a function on every task, as `Workers.run` does."""
        if not tasks:
            return []
        waiting, results, busy = deque(range(len(tasks))), [None] * len(tasks), {}
        # workers lost in each task; None: before they had any
        lost: Counter[int | None] = Counter()
        while waiting or busy:
            self._bar.set_description(
                workers.counted(description, len(tasks) - len(waiting) - len(busy), len(tasks)),
                refresh=False,
            )
            while waiting and self._idle:
                worker, number = self._idle.pop(), waiting.popleft()
                busy[worker.run.remote(function, tasks[number])] = worker, number
            (done, *_), _ = ray.wait([*busy, *self._starting])
            if done in self._starting:
                worker = self._starting.pop(done)
                answer = self._answer(done)
                if answer is not None:
                    self._idle.append(worker)
                    lost[None] = 0
                else:
                    self._give_up_after(ATTEMPTS, None, lost, description)
                continue
            worker, number = busy.pop(done)
            answer = self._answer(done)
            if answer is None:  # the worker is lost: its task is the next
                self._give_up_after(ATTEMPTS, number, lost, description)
                waiting.appendleft(number)
                continue
            self._idle.append(worker)
            result, units = answer[0]
            self._bar.update(min(units, self._bar.total - self._bar.n))
            if keep:
                keep(tasks[number], result)
            else:
                results[number] = result
        return [] if keep else results

    def _answer(self, reference) -> tuple | None:
        """Return a worker's answer in a tuple; if it is lost, start another and return None."""
        try:
            return (ray.get(reference),)
        except RayTaskError as error:  # of the task itself
            raise error.cause from None
        except RayError:
            self._start_worker()
            return None

    def _give_up_after(
        self, attempts: int, number: int | None, lost: Counter, description: str
    ) -> None:
        lost[number] += 1
        if lost[number] >= attempts:
            what = "before it had a task" if number is None else f"in task {number}"
            raise ValueError(
                f"{description}: {attempts} workers in a row were lost {what}; "
                "is the environment on every node, and memory enough?"
            )
