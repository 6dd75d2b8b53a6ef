"""Rows of cells of every kind, as the engine measures them of models that have learned nothing."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.engine.measure import measure_shard, recorded_response
from benchmarks.engine.traces import candidate_table, rollout_values, trace_tokens
from benchmarks.spec.cells import OBJECTIVES, Cell, Shard
from benchmarks.spec.methods import ARGS, AUTOREGRESSIVE, REWARD, ROLLOUT
from benchmarks.spec.model_kinds import INSTRUCT, value_kind
from benchmarks.spec.profile import OtherWorld, load_profile
from benchmarks.subjects.lab.items import Prompt
from benchmarks.subjects.lab.recipes import preferences
from benchmarks.subjects.lab.replicate import SHARED, Replicate
from benchmarks.subjects.lab.tokenizer import EOS
from sia import JunctionGate
from tests.golden import models
from tests.golden.models import TOLERANCE
from tests.helpers import tiny

TOKEN, MEAN = value_kind("token"), value_kind("mean")
SIA = {"gate": "entropy", "target_ratio": 0.5, "beta": 1.0, "thresholds": (2.15, 2.05, 2.2)}
DENSE = {"gate": "every", "target_ratio": 1.0, "beta": 0.5}
CELLS = {
    "base": Cell(0, "qwen3"),
    "instruct": Cell(0, "llama", model=INSTRUCT),
    "best-of-4": Cell(0, "qwen3", search="best-of", responses=4),
    "sia": Cell(0, "qwen3", scorer=MEAN, **SIA),
    "values-alone": Cell(0, "llama", scorer=TOKEN, **SIA | {"beta": math.inf}),
    "inverted-entropy": Cell(0, "qwen3", scorer=TOKEN, **SIA | {"gate": "inverted-entropy"}),
    "dense": Cell(0, "qwen3", scorer=TOKEN, **DENSE | {"beta": 2.0}),
    "beams": Cell(0, "qwen3", search="beams", responses=4),
    "args": Cell(0, "qwen3", scorer=ARGS, **DENSE),
    "genarm": Cell(0, "llama", scorer=AUTOREGRESSIVE, **DENSE),
    "transfer-q": Cell(0, "qwen3", scorer=ROLLOUT, prompts=1, **DENSE),
    "validation": Cell(0, "qwen3", split="validation"),
}
TEMPLATES = {  # a word before the prompt, for each kind of model another
    "instruct": [10],
    "value-token": [11],
    "value-mean": [12, 12],
    "reward": [13],
    "autoregressive-reward": [14],
}


class Untrained(Replicate):
    """A small replicate whose models have fixed weights."""

    @classmethod
    def small(cls, index: int = 0) -> "Untrained":
        smoke = load_profile("smoke")
        counts = {"prompts_per_objective": 3, "validation_prompts_per_objective": 3}
        decoding = {"max_new_tokens": 10, "batch_size": 7, "temperature": 0.8, "candidates": 9}
        profile = replace(
            smoke,
            name="untrained",
            worlds=(OtherWorld("odd", decoys=2.0, habits=(0.8, 0.95), drift=0.5),),
            decoding=replace(smoke.decoding, **decoding),
            evaluation=replace(smoke.evaluation, **counts),
            training=replace(smoke.training, heldout_prompts=6),
            sweep=replace(smoke.sweep, probes=2, rollout_prompts=1, rollout_tokens=2),
        )
        return cls(profile, index)

    def encode(self, prompts: Sequence[Prompt], kind: str) -> list[list[int]]:
        return [[*TEMPLATES.get(kind, []), *ids] for ids in super().encode(prompts, kind)]

    def seed_of(self, kind: str, family: str) -> int:
        return self.seed("exact", kind, family) % 1000

    def language_model(self, kind: str, family: str):
        seed = self.seed_of(kind, family)
        model = models.language_model(family, seed, len(self.tokenizer), size=0.6)
        with torch.no_grad():
            model.get_output_embeddings().weight[EOS] *= 2  # so that some responses end early
        return model

    def reward_model(self, kind: str):
        return models.reward_model("qwen3", self.seed_of(kind, SHARED), len(self.tokenizer))

    def value_model(self, kind: str, family: str):
        return models.value_model(family, self.seed_of(kind, family), len(self.tokenizer))

    def fitted(self, kind: str, family: str):
        model = self.language_model("base", family)
        if kind.startswith("q-head"):
            return tiny.q_head(model, self.seed_of(kind, family), len(self.tokenizer))
        return JunctionGate(1.0, tiny.predictor(model, self.seed_of(kind, family)))

    def scale(self, kind: str) -> dict[str, float]:
        return {"mean": 0.25, "sd": 1.5}

    def samples(self, families: Sequence[str], kind: str = "samples") -> pd.DataFrame:
        """Two made-up samples of twelve prompts."""
        index = pd.MultiIndex.from_product([families, range(12), range(2)])
        frame = index.to_frame(index=False, name=["family", "prompt", "sample"])
        judged = np.random.default_rng(4).uniform(-2, 2, len(frame))
        return frame.assign(token_ids=[[7 + i % 9, 8, EOS] for i in frame.index], judge=judged)


@pytest.fixture(scope="module")
def subject() -> "Untrained":
    return Untrained.small()


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Round numbers to five digits; bit masks become text, which is compared exactly."""
    masks = {name: rows[name].map(hex) for name in rows if rows[name].dtype == np.uint64}
    floats = {name: rows[name].astype(float).round(5) for name in rows.select_dtypes("floating")}
    return rows.assign(**masks, **floats).reset_index(drop=True)


@pytest.mark.parametrize("name", CELLS)
def test_rows_of_responses(name, subject, dataframe_regression):
    rows = measure_shard(subject, Shard(CELLS[name], OBJECTIVES[0]))
    if name == "validation":
        rows = pd.DataFrame(rows.attrs["thresholds"])
    dataframe_regression.check(plain(rows), default_tolerance=TOLERANCE, basename=f"rows_{name}")


@pytest.mark.parametrize("measure", [trace_tokens, rollout_values, candidate_table])
def test_rows_of_tokens(measure, subject, dataframe_regression):
    shard = Shard(CELLS["sia"], OBJECTIVES[0])
    given = []
    if measure is candidate_table:
        records = measure_shard(subject, shard).attrs["responses"].values()
        given = [[recorded_response(record) for record in records]]
    rows = measure(subject, shard, *given).head(48)
    dataframe_regression.check(plain(rows), default_tolerance=TOLERANCE)


def test_a_trace_of_the_base_tells_what_gates_could_look_at(subject, dataframe_regression):
    rows = trace_tokens(subject, Shard(CELLS["base"], OBJECTIVES[0]))
    dataframe_regression.check(plain(rows.query("seed == 0")), default_tolerance=TOLERANCE)


def test_views_show_the_responses_that_they_are_given(subject):
    """Not those that decoding the prompts again would give, which rounding may part from them."""
    shard = Shard(CELLS["sia"], OBJECTIVES[0])
    records = measure_shard(subject, shard).attrs["responses"]
    given = [recorded_response(record) for record in records.values()]
    for response in given:
        response.token_ids[:2], response.base_token[:2], response.steered[:2] = 9, (9, 10), True
    rows = candidate_table(subject, shard, given)
    for column, name in (("chosen", "token_ids"), ("unsteered", "base_token")):
        expected = np.concatenate([vars(response)[name] for response in given])
        words = subject.tokenizer.batch_decode(expected[:, None].tolist())
        assert rows[rows[column]]["word"].tolist() == words
    steered = rows.groupby(["prompt", "step"])["steered"].first()
    assert steered.tolist() == np.concatenate([r.steered for r in given]).tolist()


def test_the_second_replicate(data_regression):
    """Prompts, texts of another world, preferences and seeds."""
    second = Untrained.small(1)
    chosen, rejected, starts = preferences(second, REWARD, 0)
    data_regression.check(
        {
            "prompts": {split: first.text for split, (first, *_) in second.prompts.items()},
            "corpus": {
                world or "usual": [text for _, text in second.corpus(3, "qwen3", world)]
                for world in ("", "odd")
            },
            "chosen": chosen[:8],
            "rejected": rejected[:8],
            "starts": list(starts[:8]),
            "seeds": {
                kind: second.seed(kind, "qwen3") for kind in ("base", "samples", "value-token")
            },
        }
    )
