"""Methods: labels and models that agree with gates and model kinds."""

import pytest

from benchmarks.engine.gates import GATES
from benchmarks.spec.cells import Cell
from benchmarks.spec.methods import BASELINES, BY_NAME, METHODS, label_of
from benchmarks.spec.model_kinds import ModelKind


@pytest.mark.parametrize("gate", sorted(set(GATES) - {"entropy", "every", "never"}))
def test_gates_are_called_alike_everywhere(gate):
    assert label_of(gate) == GATES[gate].label


def test_names_and_scorers_of_methods_are_unique():
    assert len({method.name for method in METHODS}) == len(METHODS)
    scorers = [method.scorer for method in BASELINES if method.scorer]
    assert len(set(scorers)) == len(scorers) == 3


@pytest.mark.parametrize("label", [
    "base", "base-small", "base@few-decoys", "instruct", "instruct-reward", "evaluation-reward",
    "value-mean", "value-token-large", "value-token@many-decoys",
    "heads-mean", "junction-token", "unseen-junction-mean", "q-head-mean", "vocabulary-value-token",
    "samples@few-decoys",
])  # fmt: skip
def test_labels_name_one_kind(label):
    assert str(ModelKind.parse(label)) == label


def test_kinds_know_their_parts():
    assert ModelKind.parse("value-mean-small") == ModelKind("value", "mean", "small")
    assert ModelKind.parse("value-mean@a").base == ModelKind("base", world="a")
    assert ModelKind.parse("q-head-mean") == ModelKind("q-head", "mean")


@pytest.mark.parametrize(
    ("scorer", "gate", "method"),
    [
        ("value-mean", "every", "dense"),
        ("value-mean", "entropy", "sia"),
        ("value-mean", "junction", "junction"),
        ("value-mean", "divergence", "divergence"),
        ("q-head-mean", "every", "q-head"),
        ("q-head-mean", "junction", "junction-q-head"),
        ("vocabulary-value-mean", "every", "vocabulary-value"),
        ("reward", "every", "args"),
    ],
)
def test_cells_are_called_by_their_gate_and_scorer(scorer, gate, method):
    cell = Cell(0, "qwen3", scorer=ModelKind.parse(scorer), gate=gate)
    assert (cell.method, BY_NAME[method].name) == (method, method)
    assert cell.predictor == (ModelKind("junction", "mean") if gate == "junction" else None)
