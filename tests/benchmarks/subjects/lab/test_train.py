"""The order in which the lab's models are made."""

from types import SimpleNamespace

import pytest

from benchmarks.spec.model_kinds import ModelKind
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab import train
from benchmarks.subjects.lab.replicate import Replicate

SMOKE = load_profile("smoke")


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Return the labels of what is made, in its order; nothing is trained."""
    labels = []
    monkeypatch.setattr("benchmarks.subjects.lab.replicate.CACHE", tmp_path)
    monkeypatch.setattr(train.Task, "done", property(lambda task: task.kind in labels))
    monkeypatch.setattr(train, "link", lambda *_: None)
    workers = SimpleNamespace(
        run=lambda _, tasks, description: labels.extend(task.kind for task in tasks)
    )
    return SimpleNamespace(labels=labels, workers=workers, replicates=[Replicate(SMOKE, 0)])


def test_bases_are_accepted_before_anything_else_is_trained(made):
    def accept():
        assert set(made.labels) == {"base", "base-large"}
        raise ValueError("not accepted")

    for _ in range(2):  # nor are they the second time
        with pytest.raises(ValueError, match="not accepted"):
            train.build(made.replicates, made.workers, accept_bases=accept)
    train.build(made.replicates, made.workers)
    assert len(made.labels) > 20
    train.build(made.replicates, made.workers, accept_bases=accept)  # nothing is left to make


def test_sizes_and_worlds_are_trained_only_where_requested(made):
    of_figure2 = {ModelKind("base"), ModelKind("value", "mean"), ModelKind("q-head", "mean")}
    pending = train.pending_tasks(made.replicates, of_figure2)
    kinds = {ModelKind.parse(task.kind) for stage in pending for task in stage}
    assert {(kind.size, kind.world) for kind in kinds} == {("", "")}
    further = of_figure2 | {ModelKind("base", size="small"), ModelKind("base", world="usual")}
    pending = train.pending_tasks(made.replicates, further)
    kinds = {ModelKind.parse(task.kind) for stage in pending for task in stage}
    assert {kind.size for kind in kinds} == {"", "small"}
    assert {kind.world for kind in kinds} == {"", "usual"}
