"""The order in which the lab's models are trained."""

from types import SimpleNamespace

import pytest

from benchmarks.spec.model_kinds import ModelKind
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab import train
from benchmarks.subjects.lab.replicate import Replicate

SMOKE = load_profile("smoke")


@pytest.fixture
def stub_training(monkeypatch, tmp_path):
    """Return the labels of trained models in order; training itself is skipped."""
    labels = []
    monkeypatch.setattr("benchmarks.subjects.lab.replicate.CACHE", tmp_path)
    monkeypatch.setattr(train.Task, "done", property(lambda task: task.kind in labels))
    monkeypatch.setattr(train, "link", lambda *_: None)
    workers = SimpleNamespace(
        run=lambda _, tasks, description: labels.extend(task.kind for task in tasks)
    )
    return SimpleNamespace(labels=labels, workers=workers, replicates=[Replicate(SMOKE, 0)])


def test_bases_are_accepted_before_anything_else_is_trained(stub_training):
    def accept():
        assert set(stub_training.labels) == {"base", "base-large"}
        raise ValueError("not accepted")

    for _ in range(2):  # nor are they the second time
        with pytest.raises(ValueError, match="not accepted"):
            train.build(stub_training.replicates, stub_training.workers, accept_bases=accept)
    train.build(stub_training.replicates, stub_training.workers)
    assert len(stub_training.labels) > 20
    train.build(
        stub_training.replicates, stub_training.workers, accept_bases=accept
    )  # nothing is left to make


def test_sizes_and_worlds_are_trained_only_where_requested(stub_training):
    of_figure2 = {ModelKind("base"), ModelKind("value", "mean"), ModelKind("q-head", "mean")}
    pending = train.pending_tasks(stub_training.replicates, of_figure2)
    kinds = {ModelKind.parse(task.kind) for stage in pending for task in stage}
    assert {(kind.size, kind.world) for kind in kinds} == {("", "")}
    further = of_figure2 | {ModelKind("base", size="small"), ModelKind("base", world="usual")}
    pending = train.pending_tasks(stub_training.replicates, further)
    kinds = {ModelKind.parse(task.kind) for stage in pending for task in stage}
    assert {kind.size for kind in kinds} == {"", "small"}
    assert {kind.world for kind in kinds} == {"", "usual"}
