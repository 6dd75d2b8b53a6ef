"""Gates and heads fitted to a replicate's base and value models."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.analysis import labels
from benchmarks.runtime.files import check_seal, seal
from benchmarks.spec.model_kinds import FITTED, ModelKind
from benchmarks.subjects.lab import heads, quality
from benchmarks.subjects.lab.replicate import UNSEEN, UNSEEN_SHARE, Replicate
from sia import Steering, generate
from tests.golden.test_rows import Untrained


class Kept(Untrained):
    """A small replicate whose heads, unlike its models, are stored in a folder."""

    def path(self, kind: str, family: str):
        return self.folder_of_heads / f"{family}-{kind}"

    fitted = Replicate.fitted


@pytest.fixture(scope="module")
def replicate(tmp_path_factory) -> Kept:
    small = Untrained.small()
    training = replace(small.profile.training, sampled_prompts=120)
    replicate = Kept(replace(small.profile, training=training), 0)
    object.__setattr__(replicate, "folder_of_heads", tmp_path_factory.mktemp("heads"))
    folder = replicate.path("heads-token", "qwen3")
    heads.fit_heads(replicate, ModelKind("heads", "token"), "qwen3").save_pretrained(folder)
    seal(folder)
    return replicate


def test_quality_is_measured_on_held_out_prompts(replicate):
    heldout = quality._Heldout(replicate)
    metrics = {name: x for name, x, _ in heldout.metrics(ModelKind("heads", "token"), "qwen3")}
    assert metrics.pop("fitted_prompts") == 12
    ranked = [f"{name}_{of}" for name in ("predictor", "q_head", "vocabulary_head")
              for of in ("auroc", "captured_10", "captured_20", "captured_40")]  # fmt: skip
    assert {*metrics} == {*ranked, "q_head_explained", "vocabulary_head_explained"}
    assert {*metrics} <= {*labels.METRICS}
    assert all(0 < metrics[name] <= 1 for name in ranked)
    states, own = heads.heldout_states(replicate, "token", "qwen3", heldout.ids)
    assert torch.equal(states.values, own.values)
    assert not torch.equal(states.hidden, own.hidden)


def test_all_heads_lie_in_one_sealed_folder_and_steer(replicate):
    kinds = [str(ModelKind(name, "token")) for name in (*FITTED, UNSEEN)]
    gate, q_head, vocabulary, unseen = (replicate.fitted(kind, "qwen3") for kind in kinds)
    assert gate.predictor != unseen.predictor
    model, prompts = replicate.language_model("base", "qwen3"), [[1, 7, 8], [1, 9]]
    for scorer in (q_head, vocabulary):
        steering = Steering(scorer, replace(gate, threshold=0.0), candidates=9)
        responses = generate(
            model, replicate.tokenizer, prompts, steering, max_new_tokens=4, progress=False
        )
        assert all(response.steered.all() for response in responses)
    (replicate.path("heads-token", "qwen3") / UNSEEN / "junction_gate.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is damaged \(unseen-junction/junction_gate.json is not"):
        check_seal(replicate.path("heads-token", "qwen3"))


def test_prompts_to_fit_are_of_every_objective(replicate):
    prompts = heads.prompts_to_fit(replicate)
    assert [p.item.objective for p in prompts] == np.repeat(
        ["harmlessness", "helpfulness", "honesty"], 4
    ).tolist()


def test_a_share_of_the_topics_of_each_kind_is_unseen(replicate):
    items = replicate.world.items
    for kind in {item.kind for item in items}:
        topics = {item.topic for item in items if item.kind == kind}
        assert len(topics & replicate.unseen_topics) == round(UNSEEN_SHARE * len(topics))
