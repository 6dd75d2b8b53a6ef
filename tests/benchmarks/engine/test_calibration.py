"""Calibration by made-up validation rows."""

from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.engine.calibration import Calibrator, choose_threshold
from benchmarks.engine.gates import calibrated_gates
from benchmarks.spec.cells import DIVERGENCE_GATES, Cell, CellRequest
from benchmarks.spec.model_kinds import INSTRUCT, value_kind
from tests.helpers.fake import SMOKE

REQUEST = CellRequest(
    0, "qwen3", scorer=value_kind("token"), gate="entropy", target_ratio=0.5, beta=1.0
)


def read_validation(shard, score=lambda cell: 10.0 * (cell.beta == 4)):
    """Return rows whose ratio is on target, of honesty 0.1 above at the first threshold, 1.0.

    At other thresholds of honesty the ratio is as far below as these are beyond 1.5. Unsteered
    responses give the threshold 1.0, steered ones 2.0.
    """
    cell = shard.cell
    ratio = cell.target_ratio
    if shard.objective == "honesty" and cell.thresholds:
        ratio += 0.1 if cell.thresholds[2] == 1.0 else 1.5 - cell.thresholds[2]
    rows = pd.DataFrame({"judge": [score(cell)], "steered": [100 * ratio], "tokens": [100.0]})
    threshold = 1.0 if cell.gate == "never" else 2.0
    gates = DIVERGENCE_GATES if cell.scorer else calibrated_gates()
    gates = gates if cell.gate == "never" else [cell.gate]
    thresholds = {str(ratio): threshold for ratio in SMOKE.sweep.ratios}
    rows.attrs["thresholds"] = dict.fromkeys(gates, thresholds)
    return rows


CALIBRATOR = Calibrator(SMOKE, read_validation)


@pytest.mark.parametrize(("ratios", "expected"), [
    ((0.49, 0.7), 1.0),  # the first was close
    ((0.8, 0.51), 2.0),  # the second was
    ((0.7, 0.3), 1.5),  # between them
    ((0.2, 0.6), 1.75),
    ((0.8, 0.6), 3.0),  # both too high: what comes next
    ((0.1, 0.2), 3.0),
])  # fmt: skip
def test_a_threshold_is_kept_interpolated_or_calibrated_again(ratios, expected):
    assert choose_threshold(0.5, (1.0, 2.0), ratios, 3.0) == pytest.approx(expected)


def test_thresholds_are_calibrated_on_steered_responses():
    (validation,) = CALIBRATOR.validation_requests(REQUEST)
    assert validation == replace(REQUEST, split="validation")
    first = CALIBRATOR.initial_cell(validation)
    assert first.thresholds == (1.0, 1.0, 1.0)
    # honesty alone was off target
    assert CALIBRATOR.recalibrated(first).thresholds == (1.0, 1.0, 2.0)
    # 1.0 opens on 0.6, 2.0 on 0.0: what lies between opens on 0.5
    cell = CALIBRATOR.resolve(REQUEST)
    assert cell == REQUEST.resolve(1.0, (1.0, 1.0, pytest.approx(1 + 1 / 6)))
    position = CALIBRATOR.resolve(replace(REQUEST, gate="position"))
    assert position.thresholds == (1, 1, 1)  # a whole number of tokens


def test_the_best_strength_is_chosen_without_searching():
    tuned = replace(REQUEST, tuned=True, search="best-of", responses=4)
    validations = CALIBRATOR.validation_requests(tuned)
    assert [v.beta for v in validations] == [1.0, 4.0]
    assert {(v.search, v.responses, v.tuned) for v in validations} == {("", 1, False)}
    thresholds = CALIBRATOR.resolve(REQUEST).thresholds
    assert CALIBRATOR.resolve(tuned) == tuned.resolve(4.0, thresholds)
    dense = replace(REQUEST, gate="every", target_ratio=1.0, tuned=True)
    assert CALIBRATOR.resolve(dense) == dense.resolve(4.0)


@pytest.mark.parametrize("request_", [
    CellRequest(0, "qwen3"),
    replace(REQUEST, gate="random"),
    replace(REQUEST, gate="every"),
    replace(REQUEST, tau=1.5, target_ratio=0.0),
])  # fmt: skip
def test_requests_with_known_settings_need_no_validation(request_):
    assert CALIBRATOR.validation_requests(request_) == []
    cell = CALIBRATOR.resolve(request_)
    assert cell.thresholds == ((1.5,) * 3 if request_.tau else ())
    assert cell.beta == request_.beta


def test_stages_have_each_validation_once():
    tuned = replace(REQUEST, tuned=True)
    dense = replace(tuned, gate="every", target_ratio=1.0)
    others = [replace(REQUEST, tau=1.5), CellRequest(0, "qwen3", model=INSTRUCT)]
    unsteered, steered = CALIBRATOR.stages([REQUEST, tuned, dense, *others])
    assert unsteered == [Cell(0, "qwen3", "validation")]
    assert len(steered) == 4  # β = 1 and 4, with the gate and dense


def test_gates_by_divergences_start_from_unsteered_responses_that_their_scorer_has_valued():
    requests = [
        replace(REQUEST, gate=gate, tuned=tuned)
        for gate in DIVERGENCE_GATES
        for tuned in (False, True)
    ]
    unsteered, steered = CALIBRATOR.stages(requests)
    plain = Cell(0, "qwen3", "validation", scorer=value_kind("token"), beta=1.0)
    assert unsteered == [plain, replace(plain, beta=4.0)]  # divergences depend on β
    assert len(steered) == 4
    assert [CALIBRATOR.resolve(r).beta for r in requests] == [1.0, 4.0, 1.0, 4.0]


def test_of_the_two_best_strengths_the_better_one_after_calibration_is_chosen():
    first = {1.0: 1.0, 2.0: 3.0, 4.0: 4.0}
    again = {1.0: 9.0, 2.0: 5.0, 4.0: 4.0}  # β = 1 does not get that far

    def score(cell):
        recalibrated = bool(cell.thresholds) and cell.thresholds[2] != 1.0
        return (again if recalibrated else first).get(cell.beta, 0.0)

    betas = tuple(first)
    profile = replace(SMOKE, sweep=replace(SMOKE.sweep, betas=betas, tuning=betas))
    calibrator = Calibrator(profile, lambda shard: read_validation(shard, score))
    tuned = replace(REQUEST, tuned=True)
    validations = calibrator.validation_requests(tuned)
    scores = {c.beta: score(c) for c in map(calibrator.initial_cell, validations)}
    assert scores == first
    assert [cell.beta for cell in calibrator.best_two_betas(tuned)] == [4.0, 2.0]
    assert calibrator.resolve(tuned).beta == 2.0
