"""What the benchmarks share: statistics, profiles, digests and the sweep."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import numpy as np
import pandas as pd
import pytest

from benchmarks.analysis.bootstrap import bootstrap_weights, interval
from benchmarks.engine.sweep import Results, settle
from benchmarks.runtime import fingerprints, workers
from benchmarks.spec.cells import CALIBRATED, Cell, Shard
from benchmarks.spec.profile import load_profile

SMOKE = load_profile("smoke")


# --- statistics


def slow_bootstrap(values, rng, resamples):
    """Means of resamples, drawn one by one: replicates, then prompts per objective, with all their samples."""
    replicates, objectives, prompts, samples = values.shape
    means = []
    for _ in range(resamples):
        drawn = []
        for r in rng.integers(replicates, size=replicates):
            for o in range(objectives):
                for p in rng.integers(prompts, size=prompts):
                    drawn += [values[r, o, p, s] for s in range(samples)]
        means.append(np.mean(drawn))
    return np.array(means)


def test_bootstrap_weights_resample_like_the_plain_loop():
    rng = np.random.default_rng(0)
    values = (
        rng.normal(size=(3, 2, 6, 4))
        + rng.normal(size=(3, 1, 1, 1))
        + rng.normal(size=(3, 2, 6, 1))
    )
    weights = bootstrap_weights(values.shape, 3000, rng)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    means, slow = weights @ values.ravel(), slow_bootstrap(values, rng, 3000)
    np.testing.assert_allclose(
        np.quantile(means, [0.025, 0.5, 0.975]), np.quantile(slow, [0.025, 0.5, 0.975]), atol=0.12
    )
    assert means.std() == pytest.approx(slow.std(), rel=0.08)


def test_objectives_are_strata():
    values = np.zeros((1, 2, 10, 3))
    values[:, 1] = 100
    estimate, low, high = interval(
        values.reshape(-1, 1), bootstrap_weights(values.shape, 200, np.random.default_rng(0)), 0.95
    )
    assert [estimate[0], low[0], high[0]] == pytest.approx([50, 50, 50], abs=1e-4)


@pytest.mark.parametrize(
    ("replicates", "spread", "expected"),
    [(1, 0.0, (0.90, 0.98)), (3, 0.0, (0.95, 1.0)), (3, 0.5, (0.65, 0.88))],
)
def test_coverage_is_what_the_module_says(replicates, spread, expected):
    """Of 95% intervals, when samples of a prompt vary more than prompts; the spread is between worlds."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        values = spread * rng.normal(size=(replicates, 1, 1, 1)) + 0.5 * rng.normal(
            size=(replicates, 1, 40, 1)
        )
        values = values + rng.normal(size=(replicates, 1, 40, 4))
        _, low, high = interval(
            values.reshape(-1, 1), bootstrap_weights(values.shape, 300, rng), 0.95
        )
        hits += low[0] <= 0 <= high[0]
    assert expected[0] <= hits / 200 <= expected[1]


# --- profiles, digests


def changed(settings, name):
    """The settings with another value in one place, past their own checks."""
    new = copy.copy(settings)
    object.__setattr__(new, name, "changed")
    return new


def test_a_cells_place_in_the_store_follows_the_settings_it_depends_on():
    cells = {
        "test": Cell(0, "qwen3"),
        "validation": Cell(0, "qwen3", "validation"),
        "beams": Cell(0, "qwen3", search="beams", responses=4),
        "rollout": Cell(
            0, "qwen3", value_model="rollout", gate="every", target_ratio=1.0, beta=1.0
        ),
    }

    def places(profile):
        results = Results(profile, None)
        found = {name: results.path(Shard(cell, "honesty")) for name, cell in cells.items()}
        return found | {
            what: results.path(Shard(cells["test"], "honesty"), what) for what in ("trace", "probe")
        }

    usual = places(SMOKE)
    assert len(set(usual.values())) == len(usual)

    def moved(table, **settings):
        other = places(
            dataclasses.replace(
                SMOKE, **{table: dataclasses.replace(getattr(SMOKE, table), **settings)}
            )
        )
        return {name for name in usual if other[name] != usual[name]}

    assert moved("sweep", ratios=(0.2, 0.4, 0.5)) == {
        "validation"
    }  # it keeps the thresholds of the ratios
    assert moved("sweep", chunk=9) == {"beams"}
    assert moved("sweep", rollout_tokens=9) == {"rollout"}
    assert moved("sweep", probe_rollouts=9) == {"probe"}
    assert moved("sweep", betas=(1.0, 4.0), responses=8, thresholds=(1.0,)) == set()
    assert moved("evaluation", samples=3) == set(usual) - {"validation"}
    assert moved("evaluation", validation_samples=3) == {"validation"}
    for field in ("training", "model", "small", "large", "decoding"):
        for name in (f.name for f in dataclasses.fields(getattr(SMOKE, field))):
            other = places(
                dataclasses.replace(SMOKE, **{field: changed(getattr(SMOKE, field), name)})
            )
            assert not set(other.values()) & set(usual.values()), name
    other = places(dataclasses.replace(SMOKE, worlds=()))
    assert not set(other.values()) & set(usual.values())


def test_every_part_of_a_cell_changes_its_key():
    cell = Cell(0, "qwen3", "test")
    changes = {
        "replicate": 1,
        "family": "llama",
        "split": "validation",
        "model": "instruct",
        "value_model": "value-mean",
        "gate": "every",
    }
    changes |= {
        "target_ratio": 0.3,
        "threshold": 1.0,
        "thresholds": (1.0, 1.0, 1.0),
        "beta": math.inf,
        "tuned": True,
        "floor": 0.1,
    }
    changes |= {"search": "beams", "responses": 2, "prompts": 3}
    assert set(changes) == {field.name for field in dataclasses.fields(Cell)}
    keys = {
        Shard(dataclasses.replace(cell, **{name: value}), "honesty").key("models")
        for name, value in changes.items()
    }
    keys |= {
        Shard(cell, "honesty").key("models"),
        Shard(cell, "helpfulness").key("models"),
        Shard(cell, "honesty").key("other models"),
    }
    assert len(keys) == len(changes) + 3
    # a shard has the threshold of its own objective alone
    one, other = (
        Shard(dataclasses.replace(cell, thresholds=t), "honesty").key()
        for t in ((1.0, 2.0, 3.0), (0.0, 0.0, 3.0))
    )
    assert one == other


# --- settling what a cell leaves open


@pytest.mark.parametrize(("ratios", "expected"), [
    ((0.49, 0.7), 1.0),  # the first was close
    ((0.8, 0.51), 2.0),  # the second was
    ((0.7, 0.3), 1.5),  # between them
    ((0.2, 0.6), 1.75),
    ((0.8, 0.6), 3.0),  # both too high: what comes next
    ((0.1, 0.2), 3.0),
])  # fmt: skip
def test_a_threshold_is_kept_interpolated_or_corrected_again(ratios, expected):
    assert settle(0.5, (1.0, 2.0), ratios, 3.0) == pytest.approx(expected)


class Validations(Results):
    """Measured validation cells by what is asked of them. Honesty at first is 0.1 above its target, then as far below as its threshold
    is beyond 1.5; β = 4 is judged best."""

    def _read(self, shard):
        cell = shard.cell
        ratio = cell.target_ratio
        if shard.objective == "honesty" and cell.thresholds:
            ratio += 0.1 if cell.thresholds[2] == 1.0 else 1.5 - cell.thresholds[2]
        frame = pd.DataFrame(
            {"judge": [10.0 * (cell.beta == 4)], "steered": [100 * ratio], "tokens": [100.0]}
        )
        found = (
            1.0 if cell.gate == "never" else self.profile.evaluation.samples + 0.0
        )  # the second threshold, 2.0 in this profile
        gates = CALIBRATED if cell.gate == "never" else [cell.gate]
        frame.attrs["thresholds"] = {
            gate: {str(r): found for r in self.profile.sweep.ratios} for gate in gates
        }
        return frame


def test_thresholds_are_corrected_and_the_best_strength_chosen():
    results = Validations(SMOKE, None)
    cell = Cell(0, "qwen3", value_model="value-token", gate="entropy", target_ratio=0.5, beta=1.0)
    assert results.validations(cell) == [dataclasses.replace(cell, split="validation")]
    first = results.first(results.validations(cell)[0])
    assert first.thresholds == (1.0, 1.0, 1.0)
    assert results.corrected(first).thresholds == (1.0, 1.0, 2.0)  # honesty alone was far off
    # 1.0 opens on 0.6, 2.0 on 0.0: what lies between opens on 0.5
    settled = results.settled(cell)
    assert settled == dataclasses.replace(cell, thresholds=(1.0, 1.0, pytest.approx(1 + 1 / 6)))
    tuned = dataclasses.replace(cell, tuned=True, search="best-of", responses=4)
    assert [v.beta for v in results.validations(tuned)] == [1.0, 4.0]
    assert {(v.search, v.responses, v.tuned) for v in results.validations(tuned)} == {
        ("", 1, False)
    }
    assert results.settled(tuned) == dataclasses.replace(
        settled, beta=4.0, search="best-of", responses=4
    )
    asked = dataclasses.replace(cell, threshold=1.5, target_ratio=0.0)
    for fixed in (
        Cell(0, "qwen3"),
        asked,
        dataclasses.replace(cell, gate="random"),
        dataclasses.replace(cell, gate="every"),
    ):
        assert results.validations(fixed) == []
        assert results.settled(fixed) == fixed
    dense = dataclasses.replace(cell, gate="every", target_ratio=1.0, tuned=True)
    assert results.settled(dense) == dataclasses.replace(dense, tuned=False, beta=4.0)
    unsteered, steered = results.stages(
        [cell, tuned, dense, asked, Cell(0, "qwen3", model="instruct")]
    )
    assert unsteered == [Cell(0, "qwen3", "validation")]
    assert len(steered) == 4  # β = 1 and 4, with the gate and dense
    position = dataclasses.replace(cell, gate="position")
    assert results.settled(position).thresholds == (1, 1, 1)  # a whole number of tokens
    assert results.work([cell]) > results.work([Cell(0, "qwen3")]) > 0


def test_of_several_strengths_the_two_best_are_corrected_and_the_better_one_chosen():
    first, corrected = (
        {1.0: 1.0, 2.0: 3.0, 4.0: 4.0},
        {1.0: 9.0, 2.0: 5.0, 4.0: 4.0},
    )  # β → score; β = 1 does not get that far
    asked = []

    class Noting(Validations):
        def complete(self, cells, description, what="rows"):
            asked.append(list(cells))

        def _read(self, shard):
            again = bool(shard.cell.thresholds) and shard.cell.thresholds[2] != 1.0
            assert not again or shard.cell in asked[2]
            return (
                super()
                ._read(shard)
                .assign(judge=(corrected if again else first).get(shard.cell.beta, 0.0))
            )

    betas = tuple(first)
    results = Noting(
        dataclasses.replace(
            SMOKE, sweep=dataclasses.replace(SMOKE.sweep, betas=betas, tuning=betas)
        ),
        None,
    )
    cell = Cell(0, "qwen3", value_model="value-token", gate="entropy", target_ratio=0.5, tuned=True)
    assert [one.beta for one in results.promising(cell)] == [4.0, 2.0]
    results.measure([cell])
    assert [one.beta for one in asked[1]] == list(betas)
    assert asked[2] == [results.corrected(one) for one in results.promising(cell)]
    assert asked[3] == [results.settled(cell)]
    assert asked[3][0].beta == 2.0


def test_code_digest_sees_code_and_not_comments():
    same = [
        fingerprints._without_docstrings(text)
        for text in ('def f():\n    "A."\n    return 1', "def f():  # note\n    return 1")
    ]
    assert same[0] == same[1] != fingerprints._without_docstrings("def f():\n    return 2")


def test_the_progress_bar_promises_nothing_before_a_fiftieth_is_done():
    bar = workers.Bar(total=100, bar_format=workers.BAR, file=io.StringIO())
    bar.update(1)
    assert str(bar).endswith("? to go")
    bar.update(4)
    assert str(bar).endswith(":00 to go")
    bar.close()
