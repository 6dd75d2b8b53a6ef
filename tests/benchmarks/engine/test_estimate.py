"""The roofline estimate of GPU hours: what it grows with."""

from dataclasses import replace

import pytest

from benchmarks.__main__ import main
from benchmarks.engine.estimate import (
    BANDWIDTH,
    LAUNCH,
    SHARE,
    SPEED,
    cell_seconds,
    decoding_seconds,
    figure_hours,
    gpu_hours,
    pass_seconds,
    timing_hours,
    value_model_hours,
)
from benchmarks.spec.cells import ROUNDS, TIMED_PROMPTS, Cell, CellRequest, FigureCells
from benchmarks.spec.methods import ARGS, ROLLOUT
from benchmarks.spec.model_kinds import ModelKind, value_kind
from benchmarks.spec.profile import Source, load_profile

PROFILE = load_profile("qwen3-4b")
PLAIN = Cell(0, "qwen3")
SPARSE = Cell(0, "qwen3", scorer=value_kind("mean"), gate="entropy", target_ratio=0.2, beta=1.0)


def test_a_pass_reads_the_weights_or_multiplies():
    few, many = pass_seconds(4.0, 1), pass_seconds(4.0, 10**5)
    assert few == pytest.approx(LAUNCH + 8e9 / BANDWIDTH / SHARE)
    assert many == pytest.approx(LAUNCH + 8e9 * 1e5 / SPEED / SHARE)
    assert pass_seconds(8.0, 1) > few


def test_what_costs_more_is_estimated_higher():
    dense = replace(SPARSE, gate="every", target_ratio=1.0)
    junction = replace(SPARSE, gate="junction")
    head = replace(dense, scorer=ModelKind("q-head", "mean"))
    assert decoding_seconds(PROFILE, head, 100) == decoding_seconds(PROFILE, PLAIN, 100)
    assert decoding_seconds(PROFILE, junction, 100) == decoding_seconds(PROFILE, SPARSE, 100)
    ladder = [
        PLAIN,
        SPARSE,
        replace(dense, scorer=ModelKind("vocabulary-value", "mean")),
        dense,
        replace(dense, scorer=ARGS),
        replace(dense, scorer=ROLLOUT),
    ]
    seconds = [cell_seconds(PROFILE, cell, 100, 1) for cell in ladder]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == len(seconds)
    searched = replace(PLAIN, search="best-of", responses=8)
    assert cell_seconds(PROFILE, searched, 100, 1) > 7 * seconds[0]
    assert cell_seconds(PROFILE, PLAIN, 200, 1) == pytest.approx(2 * seconds[0], rel=0.1)
    assert gpu_hours(PROFILE, [PLAIN], [SPARSE]) > gpu_hours(PROFILE, [PLAIN], [])


def test_timing_is_a_part_of_the_estimate():
    base = CellRequest(0, "qwen3")
    alone = {"cost": FigureCells([base]), "timed": FigureCells([base], timed=[base, base])}
    hours = figure_hours(PROFILE, alone)
    rounds = (ROUNDS + 1) * decoding_seconds(PROFILE, base, TIMED_PROMPTS) / 3600
    assert hours["timed"] - hours["cost"] == pytest.approx(rounds)
    assert hours["all"] == hours["timed"]
    few = timing_hours(PROFILE, [replace(base, prompts=1)])
    assert few == pytest.approx((ROUNDS + 1) * decoding_seconds(PROFILE, base, 1) / 3600)


def test_a_larger_reward_model_takes_longer_to_annotate_alone():
    usual = value_model_hours(PROFILE)
    reward = replace(PROFILE.models["reward"], billions=70.0)
    larger = value_model_hours(replace(PROFILE, models=PROFILE.models | {"reward": reward}))
    assert larger["annotate"] > 8 * usual["annotate"]
    assert (larger["train"], larger["gate"]) == (usual["train"], usual["gate"])
    without = {kind: source for kind, source in PROFILE.models.items() if kind != "reward"}
    assert set(value_model_hours(replace(PROFILE, models=without))) == {"train", "gate"}


def test_the_size_of_a_local_model_need_not_be_stated(tmp_path):
    """Its files have two bytes for each parameter."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(8 * 10**9)
    local = PROFILE.models | {"base": Source(str(tmp_path))}
    unstated = replace(PROFILE, models=local)
    needs = {"run": FigureCells([CellRequest(0, "qwen3")])}
    assert figure_hours(unstated, needs) == pytest.approx(figure_hours(PROFILE, needs))
    assert value_model_hours(unstated) == pytest.approx(value_model_hours(PROFILE))


def test_the_command_prints_each_figure_and_all(capsys):
    assert main(["estimate", "--profile", "qwen3-4b"]) == 0
    printed, _, own = capsys.readouterr().out.partition(
        "your own value model, from 68,000 responses, and a junction gate:\n"
    )
    assert [line.split()[0] for line in own.splitlines()] == ["annotate", "train", "gate"]
    first, *lines = printed.splitlines()
    assert "an estimate, not measured" in first
    hours = {line.split()[0]: float(line.split()[1]) for line in lines}
    total = hours.pop("all")
    assert {"figure1", "figure2", "best-of-n"} <= set(hours)
    assert max(hours.values()) < total < sum(hours.values()) + 0.1
    assert main(["estimate"]) == 2
    assert (
        "error: GPU hours are estimated for profiles of real models, lab is not one"
        in capsys.readouterr().err
    )
