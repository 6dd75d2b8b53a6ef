"""Arguments taken for a model and places to save one, or their refusal in one sentence."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig
from torch import nn
from transformers import Qwen3ForCausalLM

from sia import (
    AutoregressiveScorer,
    EveryToken,
    JunctionGate,
    ProcessRewardScorer,
    QHead,
    RewardScorer,
    SteeredGenerate,
    Steering,
    ValueModel,
    VocabularyValueModel,
    best_of_n,
    log_likelihoods,
)
from tests.helpers import tiny
from tests.helpers.architectures import build as build_architecture
from tests.sia.scorers.test_reward import ENCODER, adapted
from tests.sia.test_junctions import q_head

MODEL, VALUES = tiny.language_model("qwen3"), tiny.value_model("qwen3")
REWARD = RewardScorer(tiny.reward_model("qwen3"))
STEERING = Steering(VALUES, EveryToken(), 2.0)
IDS = torch.tensor([[7, 8, 9]])
USES = {
    "decoding": lambda model: tiny.generate(model, [[7]]),
    "a search": lambda model: best_of_n(model, tiny.tokenizer(), [[7]], REWARD, 2, progress=False),
    "likelihoods": lambda model: log_likelihoods(model, None, [[7]], [[8]]),
    "values": ValueModel.from_backbone,
    "rewards": RewardScorer,
    "an expert": AutoregressiveScorer,
}


def tuples():
    model = tiny.language_model("qwen3")
    model.config.return_dict = False
    return model


def prompt_tuned():
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return adapted(settings, tiny.language_model("llama"))


def bidirectional():
    """As PaliGemma reads its prompts, and EmbeddingGemma everything."""
    return build_architecture("gemma3_text", use_bidirectional_attention=True)


def on_mps():
    class Qwen3ForCausalLM(type(MODEL)):
        device = torch.device("mps")

    return Qwen3ForCausalLM(MODEL.config).eval()


class WithValueHead(nn.Module):
    """A wrapper of another library, which has the config of the model in it."""

    def __init__(self):
        super().__init__()
        self.pretrained_model, self.config = MODEL, MODEL.config


NO_MODELS = {
    "another library's wrapper": (
        WithValueHead,
        "a model must be one of transformers, got WithValueHead: pass the model in it",
    ),
    "no causal attention": (
        bidirectional,
        "cached prefixes need causal attention, Gemma3ForCausalLM lets the tokens of a prompt see "
        "later ones (use_bidirectional_attention)",
    ),
    "several GPUs": (
        lambda: nn.DataParallel(MODEL),
        "a model must be one of transformers, got DataParallel: pass its .module",
    ),
    "a name": (lambda: "gpt2", "a model must be one of transformers, got str"),
    "nothing": (lambda: None, "a model must be one of transformers, got NoneType"),
    "a scorer": (lambda: VALUES, "a model must be one of transformers, got ValueModel"),
    "tuples": (
        tuples,
        "Qwen3ForCausalLM must return outputs with names, as transformers' own generate needs "
        "them: expected config.return_dict=True, got False",
    ),
    "a tuned prompt": (
        prompt_tuned,
        "adapters must lie in the layers of the model, as LoRA's do, got PromptTuningConfig",
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", NO_MODELS)
def test_arguments_that_are_no_model_are_refused_everywhere(kind, use):
    build, message = NO_MODELS[kind]
    with pytest.raises((TypeError, ValueError)) as error:
        USES[use](build())
    assert str(error.value) == message


@pytest.mark.parametrize("use", ["decoding", "a search", "likelihoods"])
def test_a_device_without_float64_is_refused_where_tokens_are_sampled(use):
    message = "tokens are sampled in float64, which Apple's MPS lacks: move the model to the CPU"
    with pytest.raises(ValueError, match=message):
        USES[use](on_mps())
    assert ValueModel.from_backbone(on_mps())


class Forwarding(nn.Module):
    """A wrapper that answers as the model in it does, as those that shard weights."""

    def __init__(self):
        super().__init__()
        self.module = MODEL

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *arguments, **options):
        return self.module(*arguments, **options)


def test_a_wrapper_that_forwards_to_a_model_is_one():
    expected = tiny.generate(MODEL, [[7, 8]], max_new_tokens=3)
    responses = tiny.generate(Forwarding(), [[7, 8]], max_new_tokens=3)
    assert tiny.tokens(responses) == tiny.tokens(expected)


def test_a_tuned_prompt_is_refused_by_transformers_generate():
    """PEFT hands the model on without its wrapper, which alone would put the prompt in."""
    message = "adapters must lie in the layers of the model, .* got PromptTuningConfig"
    with pytest.raises(ValueError, match=message):
        prompt_tuned().generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2,
            custom_generate=SteeredGenerate(),
        )  # fmt: skip


class Strict(Qwen3ForCausalLM):
    """A model of the Hub from before transformers had `logits_to_keep`."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        use_cache=None, return_dict=None,
    ):  # fmt: skip
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache,
        )  # fmt: skip


def test_a_model_that_cannot_narrow_its_logits_works_as_one_that_can():
    model, prompts = Strict(MODEL.config).eval(), tiny.prompts(3)
    model.load_state_dict(MODEL.state_dict())
    tokens, totals = [], []
    for each in (model, MODEL):
        for scorer in (VALUES, AutoregressiveScorer(each)):
            steering = Steering(scorer, EveryToken(), 2.0)
            tokens.append(tiny.tokens(tiny.generate(each, prompts, steering, max_new_tokens=4)))
        likelihoods = log_likelihoods(each, None, prompts, [[9, 8, 7]] * 3, candidates=60)
        totals.append([likelihood.total for likelihood in likelihoods])
    assert tokens[:2] == tokens[2:]
    assert totals[0] == pytest.approx(totals[1], abs=1e-4)


def test_a_compiled_model_scores_as_the_one_within():
    compiled = torch.compile(MODEL, backend="eager")
    assert AutoregressiveScorer(compiled).model is MODEL
    assert ValueModel.from_backbone(compiled).backbone is MODEL.model


@pytest.mark.parametrize("pad", [-1, tiny.VOCABULARY])
def test_padding_tokens_without_an_embedding_harm_nothing(pad):
    """As in some checkpoints of Llama; penalties let ended rows go on with padding."""
    prompts, penalty = tiny.prompts(8), {"repetition_penalty": 1.2}
    model, usual, reward = copy.deepcopy(MODEL), copy.deepcopy(MODEL), copy.deepcopy(ENCODER)
    model.generation_config.update(pad_token_id=pad, **penalty)
    usual.generation_config.update(**penalty)
    reward.config.pad_token_id = pad
    for scorer, same in ((VALUES, VALUES), (RewardScorer(reward), RewardScorer(ENCODER))):
        generations, expected = (
            tiny.generate(m, prompts, Steering(s, EveryToken(), 0.5, candidates=60))
            for m, s in ((model, scorer), (usual, same))
        )
        assert tiny.tokens(generations) == tiny.tokens(expected)
        assert any(generation.finished for generation in generations)


def test_a_cache_requested_by_the_checkpoint_is_ignored():
    """Gemma's checkpoints ask for one; a call that does is refused."""
    model = copy.deepcopy(MODEL)
    model.generation_config.cache_implementation = "static"
    options = {"custom_generate": SteeredGenerate(STEERING, seed=0), "max_new_tokens": 4}
    assert torch.equal(model.generate(IDS, **options), MODEL.generate(IDS, **options))


READERS = (
    ValueModel, RewardScorer, ProcessRewardScorer, QHead, VocabularyValueModel, JunctionGate,
)  # fmt: skip


@pytest.mark.parametrize("path", [None, 7, "", b"x"])
@pytest.mark.parametrize("reader", READERS)
def test_invalid_paths_are_refused(reader, path):
    with pytest.raises(
        TypeError, match="a path must name a folder, or a repository of the Hub, got"
    ):
        reader.from_pretrained(path)


@pytest.mark.parametrize("name", ["file", "file/below"])
@pytest.mark.parametrize("build", [lambda: VALUES, lambda: q_head(MODEL)], ids=["values", "head"])
def test_a_file_in_the_place_of_a_folder_is_kept(build, name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"saved as a folder, but .* is a file, or lies below"
    ):
        build().save_pretrained(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_models_are_saved_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    VALUES.save_pretrained("~/values")
    assert (tmp_path / "values/value_head.safetensors").is_file()
    assert not Path("~").exists()
    torch.testing.assert_close(ValueModel.from_pretrained("~/values")(IDS), VALUES(IDS))
