"""The Ray executor: the same bytes as the local one, also when a node is lost in the middle."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from benchmarks.runtime.ray_workers import RayWorkers
from benchmarks.runtime.workers import Workers
from scripts import annotate_rewards
from tests.helpers import hub_folders
from tests.helpers.tiny_lab import copy_sources, run, table

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster():
    """Two nodes on this machine, with a core each beside the head, which has none."""
    quiet = {"worker_niceness": 0}  # by default workers wait for everything else on a busy machine
    ray_cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quiet},
    )
    nodes = [ray_cluster.add_node(num_cpus=1) for _ in range(2)]
    os.environ["RAY_ADDRESS"] = ray_cluster.address
    yield ray_cluster, nodes
    ray.shutdown()
    ray_cluster.shutdown()
    del os.environ["RAY_ADDRESS"]


def twice(number: int) -> int:
    time.sleep(0.05)
    return 2 * number


def slowly(task: tuple[int, str]) -> tuple[int, int]:
    """Create a marker file, then sleep."""
    number, folder = task
    (Path(folder) / f"{number}-{os.getpid()}").touch()
    time.sleep(0.6)
    return number, os.getpid()


def fail(number: int) -> int:
    raise ValueError(f"task {number} is wrong")


def meanwhile(folder: Path, begun: int, do) -> None:
    """Call do(process id of the last task begun) in a thread once `begun` tasks have begun."""

    def wait():
        while (
            len(marks := sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)) < begun
        ):
            time.sleep(0.02)
        do(int(marks[-1].name.split("-")[1]))

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.faults
def test_results_errors_lost_workers_and_lost_nodes(cluster, tmp_path):
    ray_cluster, nodes = cluster
    kept = {}
    with RayWorkers() as workers, workers.progress(10.0):
        assert workers.run(twice, range(12), description="double") == [2 * n for n in range(12)]
        assert (
            workers.run(
                twice,
                [1, 2],
                description="keep",
                on_result=lambda task, result: kept.update({task: result}),
            )
            == []
        )
        assert kept == {1: 2, 2: 4}
        with pytest.raises(ValueError, match="task 3 is wrong"):
            workers.run(fail, [3], description="fail")
        lost = []
        meanwhile(
            tmp_path, 3, lambda process: (lost.append(process), os.kill(process, signal.SIGKILL))
        )
        results = workers.run(
            slowly, [(n, str(tmp_path)) for n in range(6)], description="lose a worker"
        )
        assert [number for number, _ in results] == list(range(6))
        begun = [path.name.split("-") for path in tmp_path.iterdir()]
        assert len(begun) == 7  # the task in hand, and no other, was begun again
        assert str(lost[0]) in {process for _, process in begun}
        # tasks that were over before their worker was lost are not done again
        assert all(
            str(process) in {p for n, p in begun if n == str(number)} for number, process in results
        )

        again = tmp_path / "again"
        again.mkdir()
        meanwhile(again, 3, lambda _: ray_cluster.remove_node(nodes.pop(), allow_graceful=False))
        tasks = [(number, str(again)) for number in range(8)]
        results = workers.run(slowly, tasks, description="lose a node")
        assert [number for number, _ in results] == list(range(8))
    nodes.append(ray_cluster.add_node(num_cpus=1))


@pytest.mark.faults
def test_a_sweep_on_ray_has_the_bytes_of_a_local_one(cluster, tmp_path):
    """Figure 5 of a Hub profile: validation, thresholds, cells, traces."""
    project = tmp_path / "project"
    copy_sources(project)
    (project / "benchmarks/spec/profiles/tiny.toml").write_text(
        hub_folders.profile_text("llama", hub_folders.save_hub(tmp_path / "hub", "llama"))
    )

    def figure(executor: str) -> dict[str, bytes]:
        run(project, "figure5", "--fresh", "--batch-size", "4", "--executor", executor)
        return table(project, "figure5")

    assert figure("ray") == figure("local")


@pytest.mark.faults
def test_annotations_have_the_same_bytes_wherever_they_are_made(cluster, tmp_path, monkeypatch):
    hub = hub_folders.save_hub(tmp_path / "hub", "qwen3")
    arguments = ["--data", f"alpaca-eval={hub['helpfulness']}", "--reward", str(hub["reward"])]
    monkeypatch.setattr(annotate_rewards, "WINDOW", 2)

    def annotated(name: str, *further: str) -> bytes:
        output = tmp_path / name
        assert annotate_rewards.main([*arguments, "--output", str(output), *further]) == 0
        return output.read_bytes()

    here = annotated("here")
    assert annotated("ray", "--executor", "ray") == here
    monkeypatch.setattr(annotate_rewards, "workers_for", lambda *_: Workers())
    assert annotated("processes") == here
