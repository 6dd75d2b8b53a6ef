"""The value model: values, saving and loading, and the cache below it."""

import pytest
import torch
from transformers import DynamicCache

from sia import EveryToken, Steering, ValueModel
from sia._kv_cache import preallocated_cache
from tests.helpers import tiny


@torch.no_grad()
def test_values_are_a_linear_reading_of_the_last_hidden_state():
    model, ids = tiny.value_model("llama"), torch.tensor(tiny.prompts(1, longest=9))
    hidden = model.backbone(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model(ids), hidden @ model.head.weight[0] + model.head.bias)


@torch.no_grad()
def test_padding_changes_nothing():
    model = tiny.value_model("qwen3")
    padded, mask = torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1]])
    values = model(padded, mask, torch.tensor([[0, 0, 0, 1, 2]]))[:, 2:]
    torch.testing.assert_close(values, model(torch.tensor([[7, 8, 9]])), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_save_and_load_bit_for_bit(tmp_path):
    model, ids = tiny.value_model("qwen3"), torch.tensor(tiny.prompts(1))
    model.save_pretrained(tmp_path)
    loaded = ValueModel.from_pretrained(tmp_path)
    assert type(loaded.backbone) is type(model.backbone)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert torch.equal(loaded(ids), model(ids))
    assert loaded(ids).dtype == torch.float32
    assert not loaded.training


def test_a_head_of_the_wrong_size_is_refused():
    with pytest.raises(
        ValueError, match=r"must be Linear\(32, 1\) for this backbone, got Linear\(31, 1\)"
    ):
        ValueModel(tiny.language_model("qwen3").base_model, torch.nn.Linear(31, 1))


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


def test_bad_values_stop_with_step_and_row():
    values = tiny.value_model("qwen3")
    torch.nn.init.constant_(values.head.bias, torch.nan)
    with pytest.raises(
        FloatingPointError, match="values must be finite, got NaN or infinity at step 0 of prompt 1"
    ):
        tiny.generate(
            tiny.language_model("qwen3"), [[7, 8, 9], [7, 8]], Steering(values, EveryToken())
        )
