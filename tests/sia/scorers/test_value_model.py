"""The value model: values, saving and loading, and the cache below it."""

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2LMHeadModel,
    LlamaModel,
)

from sia import EveryToken, Steering, ValueModel
from sia._kv_cache import preallocated_cache
from tests.helpers import tiny
from tests.helpers.reference import whole_values
from tests.sia.scorers.test_reward import lora
from tests.sia.scorers.test_value_heads import opt


@torch.no_grad()
def test_values_are_a_linear_reading_of_the_last_hidden_state():
    model, ids = tiny.value_model("llama"), torch.tensor(tiny.prompts(1, longest=9))
    hidden = model.backbone(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model(ids), hidden @ model.head.weight[0] + model.head.bias)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's
@torch.no_grad()
def test_a_value_model_that_torch_has_quantised_is_read():
    model, ids = tiny.value_model("llama"), torch.tensor([tiny.prompts(1)[0]])
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(quantised(ids), model(ids), atol=0.2, rtol=0.05)
    steering = Steering(quantised, EveryToken())
    assert tiny.generate(tiny.language_model("llama"), [[7]], steering, max_new_tokens=2)


def test_padding_changes_nothing():
    model = tiny.value_model("qwen3")
    padded, mask = torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1]])
    values = model(padded, mask, torch.tensor([[0, 0, 0, 1, 2]]))[:, 2:]
    torch.testing.assert_close(values, model(torch.tensor([[7, 8, 9]])), atol=1e-5, rtol=1e-5)


def merged():
    return lora(tiny.language_model("llama")).merge_and_unload()


def tied():
    config = tiny.config("gpt2")
    config.tie_word_embeddings = True
    return tiny.seeded(lambda: GPT2LMHeadModel(config).eval(), 3)


ROUND_TRIPS = {
    "qwen3": lambda: tiny.language_model("qwen3"),
    "merged LoRA": merged,
    "tied embeddings": tied,
    "bfloat16": lambda: tiny.language_model("gemma3").bfloat16(),
    "reward model": lambda: tiny.reward_model("mistral"),
    "projected hidden state": opt,
    "multimodal": tiny.multimodal_model,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_save_and_load_bit_for_bit(kind, tmp_path):
    model, ids = ValueModel.from_backbone(ROUND_TRIPS[kind]()), torch.tensor(tiny.prompts(1))
    model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    loaded = ValueModel.from_pretrained(tmp_path)
    assert type(loaded.backbone) is type(model.backbone)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    # products of equal weights may round otherwise at another place in memory
    rounding = 0.1 if kind == "bfloat16" else 1e-4
    torch.testing.assert_close(loaded(ids), model.eval()(ids), atol=rounding, rtol=0)
    assert loaded(ids).dtype == torch.float32
    assert not loaded.training


class OtherLlama(LlamaModel):
    """A class of the caller, which no config names."""


def subclass():
    return OtherLlama(tiny.config("llama"))


def mixed():
    model = tiny.language_model("qwen3").bfloat16()
    model.model.norm.float()
    return model


def wider():
    model = tiny.language_model("qwen3")
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(32, 48)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lora(tiny.language_model("llama")), r"other weights .*: merge adapters first"),
        (
            lambda: lora(tiny.language_model("llama"), use_dora=True),
            r"\(layers.0.mlp.down_proj.base_layer.weight\): merge adapters first",
        ),
        (subclass, "its config makes a LlamaModel, it is a OtherLlama"),
        (mixed, "must have one dtype, got torch.bfloat16, torch.float32"),
        (wider, "than its config makes .layers.0.mlp.gate_proj.bias."),
    ],
)
def test_models_that_could_not_be_restored_are_not_saved(build, message, tmp_path):
    folder = tmp_path / "values"
    with pytest.raises(ValueError, match=f"the backbone cannot be saved.*{message}"):
        ValueModel.from_backbone(build()).save_pretrained(folder)
    assert not folder.exists()


def test_a_projected_hidden_state_is_read_by_sessions():
    """OPT-350m's last hidden state has word_embed_proj_dim numbers."""
    values = ValueModel.from_backbone(opt())
    torch.nn.init.ones_(values.head.weight)
    candidates = torch.tensor([[9, 10, 11]])
    session = values.start_session([[7, 8]], 4)
    scores = session.score(torch.tensor([0]), torch.tensor([[5]]), candidates)
    expected = whole_values(values, [7, 8, 5], [9, 10, 11])
    torch.testing.assert_close(scores[0], expected, atol=2e-5, rtol=1e-4)


def test_a_head_of_the_wrong_size_is_refused():
    with pytest.raises(
        ValueError, match=r"must be Linear\(32, 1\) for this backbone, got Linear\(31, 1\)"
    ):
        ValueModel(tiny.language_model("qwen3").base_model, torch.nn.Linear(31, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_head_of_a_critic_which_has_no_bias_is_kept(dtype, tmp_path):
    critic, ids = tiny.reward_model("llama").to(dtype), torch.tensor([[5, 6, 7]])
    values = ValueModel(critic.model, critic.score)
    assert values.head is critic.score
    hidden = critic.model(ids).last_hidden_state.float()
    torch.testing.assert_close(values(ids), hidden @ critic.score.weight[0])
    values.save_pretrained(tmp_path)
    torch.testing.assert_close(ValueModel.from_pretrained(tmp_path)(ids), values(ids))


@torch.no_grad()
def test_a_head_that_was_cast_reads_states_in_its_dtype():
    """As FSDP casts the parameters of the part that it runs."""
    values, ids = tiny.value_model("llama"), torch.tensor([[5, 6, 7]])
    expected = values(ids)
    values.head.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = values(ids)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, atol=0.2, rtol=0.05)


@torch.no_grad()
def test_autocast_leaves_the_head_in_float32():
    values, ids = tiny.value_model("llama"), torch.tensor([[5, 6, 7]])
    torch.nn.init.constant_(values.head.bias, 1000.0)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = values.backbone(input_ids=ids).last_hidden_state.float()
        rounded = values(ids)
    torch.testing.assert_close(rounded, hidden @ values.head.weight[0] + values.head.bias)


@torch.no_grad()
def test_preallocated_cache_equals_transformers_own():
    model, ids, kept = (
        tiny.language_model("qwen3"),
        tiny.random_tokens(4, 12),
        torch.tensor([0, 2, 3]),
    )
    caches = [preallocated_cache(model.config, capacity=6), DynamicCache(config=model.config)]

    def assert_same_logits(tokens):
        torch.testing.assert_close(*(model(tokens, past_key_values=c).logits for c in caches))

    for start, end in ((0, 5), (5, 6), (6, 12)):
        assert_same_logits(ids[:, start:end])
    for cache in caches:
        cache.batch_select_indices(kept)
    for _ in range(3):
        assert_same_logits(ids[kept, :1])
    assert [cache.get_seq_length() for cache in caches] == [15, 15]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1e30])
def test_bad_values_stop_with_step_and_row(value):
    """The last is one that float32 knows, but not times β."""
    values = tiny.value_model("qwen3")
    torch.nn.init.constant_(values.head.bias, value)
    message = "values must be finite and at most .*, got (nan|inf|-1e.30) at step 0 of prompt 1"
    with pytest.raises(FloatingPointError, match=message):
        tiny.generate(
            tiny.language_model("qwen3"), [[7, 8, 9], [7, 8]], Steering(values, EveryToken())
        )
