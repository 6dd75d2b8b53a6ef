"""Models of which accelerate keeps weights on disk do what they do in memory."""

import logging
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sia import (
    EveryToken,
    JunctionGate,
    Steering,
    ValueModel,
    VocabularyValueModel,
    distill,
    fit_junction_gate,
    fit_q_head,
)
from sia._model_identity import ModelIdentity
from sia.fitting import output_vectors
from tests.helpers import tiny

PROMPTS = tiny.prompts(4)
IN_MEMORY = dict.fromkeys(
    ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
)
PLACES = {
    "all": {"": "disk"},
    "embeddings": IN_MEMORY | {"model.embed_tokens": "disk"},
    "head": IN_MEMORY | {"lm_head": "disk"},
}


@pytest.fixture(autouse=True)
def quiet(caplog):
    """accelerate warns that parameters are on the meta device."""
    caplog.set_level(logging.ERROR, logger="accelerate")


def on_disk(model, place, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=PLACES[place], offload_folder=str(folder / "offloaded")
    )


def values_on_disk(read, folder):
    return read(folder, device_map={"": "disk"}, offload_folder=str(folder / "offloaded"))


@pytest.mark.parametrize("place", PLACES)
def test_what_reads_hidden_states_knows_the_model(place, tmp_path):
    model = tiny.language_model("llama")
    away = on_disk(model, place, tmp_path)
    gate = JunctionGate(0.1, tiny.predictor(model))
    for scorer in (tiny.value_model("llama"), tiny.q_head(model)):
        steering = Steering(scorer, gate, beta=3.0)
        here, there = (tiny.generate(one, PROMPTS, steering) for one in (model, away))
        assert tiny.tokens(here) == tiny.tokens(there)
    assert torch.equal(output_vectors(away), output_vectors(model))


@pytest.mark.parametrize("place", PLACES)
def test_tied_weights_have_one_identity(place, tmp_path):
    config = tiny.config("llama")
    config.tie_word_embeddings = True
    model = tiny.seeded(lambda: LlamaForCausalLM(config), 0)
    places = PLACES[place] if place == "all" else PLACES["embeddings"] | PLACES["head"]
    model.save_pretrained(tmp_path)
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=str(tmp_path / "offloaded")
    )
    assert ModelIdentity.of(away).entries == ModelIdentity.of(model).entries


def test_fits_to_a_model_on_disk_are_those_to_the_same_model_in_memory(tmp_path):
    model = tiny.language_model("llama")
    away, values = on_disk(model, "all", tmp_path), tiny.value_model("llama")
    options = {"max_new_tokens": 4, "epochs": 1, "progress": False}
    for fit in (fit_junction_gate, fit_q_head):
        here, there = (
            fit(one, tiny.tokenizer(), values, PROMPTS, **options) for one in (model, away)
        )
        assert here.rankings == there.rankings
    tiny.generate(model, PROMPTS, Steering(there.scorer, EveryToken()))


def test_values_of_a_backbone_on_disk_are_those_in_memory(tmp_path):
    decode = partial(tiny.generate, tiny.language_model("llama"), PROMPTS)
    values = tiny.value_model("llama")
    vocabulary = VocabularyValueModel(values.backbone, tiny.candidate_values())
    for number, scorer in enumerate((values, vocabulary)):
        scorer.save_pretrained(tmp_path / f"{number}")
        away = values_on_disk(type(scorer).from_pretrained, tmp_path / f"{number}")
        steered = [decode(Steering(one, EveryToken(), beta=3.0)) for one in (scorer, away)]
        assert tiny.tokens(steered[0]) == tiny.tokens(steered[1])
    away = values_on_disk(ValueModel.from_pretrained, tmp_path / "0")
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        away.save_pretrained(tmp_path / "again")
    again = ValueModel.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again.state_dict(), values.state_dict(), atol=0, rtol=0)
    with pytest.raises(ValueError, match="must lie in memory to learn, weights of this one are"):
        distill(
            away, [[7]], [[8]], [1.0],
            loss="mean", epochs=1, learning_rate=1e-3, batch_size=1, seed=0,
        )  # fmt: skip
