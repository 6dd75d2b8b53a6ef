"""Paths of shards: each follows what it depends on, and nothing else."""

import copy
import dataclasses
import math

import pandas as pd

from benchmarks.engine.store import CellStore
from benchmarks.spec.cells import Cell, Shard
from benchmarks.spec.methods import ROLLOUT
from benchmarks.spec.model_kinds import INSTRUCT, value_kind
from benchmarks.spec.profile import load_profile

SMOKE = load_profile("smoke")
STEERED = {"gate": "every", "target_ratio": 1.0, "beta": 1.0}
CELLS = {
    "test": Cell(0, "qwen3"),
    "validation": Cell(0, "qwen3", "validation"),
    "beams": Cell(0, "qwen3", search="beams", responses=4),
    "rollout": Cell(0, "qwen3", scorer=ROLLOUT, **STEERED),
}


def paths(profile):
    store = CellStore(profile)
    of_rows = {name: store.path(Shard(cell, "honesty")) for name, cell in CELLS.items()}
    test = Shard(CELLS["test"], "honesty")
    return of_rows | {name: store.path(test, name) for name in ("trace", "rollouts")}


USUAL = paths(SMOKE)


def moved(table, **settings):
    """Return the names of shards whose paths change with these settings."""
    new = copy.copy(getattr(SMOKE, table))
    for name, value in settings.items():
        object.__setattr__(new, name, value)  # past its own checks
    other = paths(dataclasses.replace(SMOKE, **{table: new}))
    return {name for name in USUAL if other[name] != USUAL[name]}


def test_a_path_follows_the_settings_that_its_rows_depend_on():
    assert len(set(USUAL.values())) == len(USUAL)
    # validation shards keep the thresholds of the ratios
    assert moved("sweep", ratios=(0.2, 0.4, 0.5)) == {"validation"}
    assert moved("sweep", chunk=9) == {"beams"}
    assert moved("sweep", rollout_tokens=9) == {"rollout"}
    assert moved("sweep", probe_rollouts=9) == {"rollouts"}
    assert moved("sweep", betas=(1.0, 4.0), responses=8, thresholds=(1.0,)) == set()
    assert moved("evaluation", samples=3) == set(USUAL) - {"validation"}
    assert moved("evaluation", validation_samples=3) == {"validation"}
    for table in ("training", "model", "small", "large", "decoding"):
        for field in dataclasses.fields(getattr(SMOKE, table)):
            assert moved(table, **{field.name: "changed"}) == set(USUAL), field.name
    without_worlds = paths(dataclasses.replace(SMOKE, worlds=()))
    assert not set(without_worlds.values()) & set(USUAL.values())


def test_a_view_shows_the_responses_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.engine.store.CACHE", tmp_path)
    monkeypatch.setattr(type(SMOKE), "prompts_per_shard", 3)
    store, cell = CellStore(SMOKE), CELLS["test"]
    for shard in store.shards(cell):
        rows = pd.DataFrame({"prompt": list(shard.prompts)})
        records = {
            str(prompt): {
                "token_ids": [prompt, 7],
                "entropy": [0.1, 0.2],
                "steered": [False, True],
                "base_token": [prompt, len(shard.objective)],
                "kl": [0.0, 0.5],
                "finished": prompt == 1,
            }
            for prompt in shard.prompts
            if prompt < 4
        }
        rows.attrs["responses"] = records
        store.write(shard, "rows", rows)
    view = store.shards(cell, "view")[1]
    responses = store.responses(view)
    assert [r.token_ids.tolist() for r in responses] == [[0, 7], [1, 7], [2, 7], [3, 7]]
    assert [r.base_token.tolist()[1] for r in responses] == [len("helpfulness")] * 4
    assert [r.finished for r in responses] == [False, True, False, False]
    assert (responses[0].entropy.dtype, responses[0].steered.dtype) == ("float32", "bool")
    assert store.rows(cell).attrs == {}


def test_every_field_of_a_cell_changes_its_key():
    changes = {
        "replicate": 1,
        "family": "llama",
        "split": "validation",
        "model": INSTRUCT,
        "scorer": value_kind("mean"),
        "gate": "every",
        "target_ratio": 0.3,
        "thresholds": (1.0, 1.0, 1.0),
        "beta": math.inf,
        "search": "beams",
        "responses": 2,
        "prompts": 3,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(Cell)}
    cell = Cell(0, "qwen3")
    cells = [dataclasses.replace(cell, **{name: value}) for name, value in changes.items()]
    keys = {Shard(each, "honesty").key("models") for each in [cell, *cells]}
    keys |= {Shard(cell, "helpfulness").key("models"), Shard(cell, "honesty").key("other models")}
    assert len(keys) == len(changes) + 3
    # a shard has the threshold of its own objective alone
    one, other = (
        Shard(dataclasses.replace(cell, thresholds=thresholds), "honesty").key()
        for thresholds in ((1.0, 2.0, 3.0), (0.0, 0.0, 3.0))
    )
    assert one == other
