"""What a sweep measures, in which order, and how it labels rows."""

from dataclasses import replace

from benchmarks.engine.calibration import Calibrator
from benchmarks.engine.sweep import Sweep
from benchmarks.spec.cells import CellRequest, FigureCells
from tests.benchmarks.engine.test_calibration import REQUEST, SMOKE, read_validation
from tests.helpers.fake import FakeResults


def test_stages_are_measured_one_after_the_other():
    stages = []

    class Recording(Sweep):
        calibrator = Calibrator(SMOKE, read_validation)

        def measure_missing(self, cells, description, measurement="rows"):
            stages.append((measurement, list(cells)))

    tuned, base = replace(REQUEST, tuned=True), CellRequest(0, "qwen3")
    sweep = Recording(SMOKE)
    needs = FigureCells(cells=[tuned], traces=[base], views=[base])
    sweep.measure(needs)
    sweep.measure_tokens(needs)
    calibrator = sweep.calibrator
    unsteered, steered = calibrator.stages([tuned])
    assert stages == [
        ("rows", unsteered),
        ("rows", [calibrator.initial_cell(request) for request in steered]),
        ("rows", [calibrator.recalibrated(cell) for cell in calibrator.best_two_betas(tuned)]),
        # responses are measured before they are viewed
        ("rows", [calibrator.resolve(tuned), base.resolve(0.0)]),
        ("rollouts", []),
        ("trace", [base.resolve(0.0)]),
        ("view", [base.resolve(0.0)]),
    ]


def test_work_grows_with_what_is_open():
    sweep = Sweep(SMOKE)
    works = [
        sweep.estimated_seconds(FigureCells(cells=[cell]))
        for cell in (CellRequest(0, "qwen3"), REQUEST)
    ]
    assert 0 < works[0] < works[1]


def test_tables_say_what_was_measured():
    fixed = replace(REQUEST, tau=1.5, target_ratio=0.0)
    dense = replace(REQUEST, gate="every", target_ratio=1.0, tuned=True)
    table = FakeResults(SMOKE).table([REQUEST, fixed, dense, CellRequest(0, "qwen3")], ["judge"])
    thresholds = table.groupby("objective", observed=True)["threshold"]
    assert thresholds.unique().map(lambda x: sorted(set(x[x == x]))).to_dict() == {
        "harmlessness": [1.0, 1.5],
        "helpfulness": [1.1, 1.5],
        "honesty": [1.2, 1.5],
    }
    tuned = table[table["tuned"]]
    assert set(tuned["beta"]) == {4.0}
    assert set(tuned["method"]) == {"dense"}
    assert set(table["value_model"]) == {"", "value-token"}
