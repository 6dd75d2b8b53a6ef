"""The value model: what it computes, saving and loading, caching, and training."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import DynamicCache

from sia import EveryToken, Steering, ValueModel, generate
from sia._kv_cache import preallocated_cache
from sia.training import distill, distillation_loss, epoch_batches
from tests.helpers import tiny


def test_values_are_a_linear_reading_of_the_last_hidden_state():
    model = tiny.value_model("llama")
    ids = torch.tensor(tiny.prompts(1, longest=9))
    with torch.no_grad():
        hidden = model.backbone(input_ids=ids).last_hidden_state
        values = model(ids)
    torch.testing.assert_close(values, hidden @ model.head.weight[0] + model.head.bias)
    assert values.dtype == torch.float32
    assert values.shape == ids.shape


def test_padding_changes_nothing():
    model = tiny.value_model("qwen3")
    ids = torch.tensor([[7, 8, 9]])
    padded, mask = torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(padded, mask, positions)[:, 2:], model(ids), atol=1e-5, rtol=1e-5
        )


def test_save_and_load_bit_for_bit(tmp_path):
    model = tiny.value_model("qwen3")
    model.save_pretrained(tmp_path)
    loaded = ValueModel.from_pretrained(tmp_path)
    assert type(loaded.backbone) is type(model.backbone)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert not loaded.training
    ids = torch.tensor(tiny.prompts(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


def test_a_head_works_in_float32_on_a_bfloat16_backbone():
    model = ValueModel.from_backbone(tiny.language_model("qwen3").to(torch.bfloat16))
    assert model.head.weight.dtype == torch.float32
    with torch.no_grad():
        assert model(torch.tensor([[7, 8]])).dtype == torch.float32


@pytest.mark.parametrize("missing", ["value_head.safetensors", "model.safetensors", "config.json"])
def test_incomplete_checkpoints_are_refused(tmp_path, missing):
    tiny.value_model("qwen3").save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing"):
        ValueModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no value model in"):
        ValueModel.from_pretrained(tmp_path / "nowhere")


def test_a_head_of_the_wrong_size_is_refused():
    with pytest.raises(
        ValueError, match=r"must be Linear\(32, 1\) for this backbone, got Linear\(31, 1\)"
    ):
        ValueModel(tiny.language_model("qwen3").base_model, torch.nn.Linear(31, 1))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_lagging_cache_equals_full_recomputation(family):
    """Rows of different lengths are asked at different times; every value equals that of the whole sequence."""
    model, generator = tiny.value_model(family), torch.Generator().manual_seed(0)
    prompts = tiny.prompts(5, seed=2)
    session = model.start_session(prompts, max_new_tokens=20)
    texts = [list(prompt) for prompt in prompts]
    responses = torch.randint(3, 60, (5, 20), generator=generator)
    worst = 0.0
    for step in range(20):
        asked = torch.rand(5, generator=generator) < 0.4
        rows = asked.nonzero().squeeze(1)
        if len(rows):
            candidates = torch.randint(3, 60, (len(rows), 6), generator=generator)
            values = session.score(rows, responses[rows, :step], candidates)
            for row, tokens, found in zip(rows.tolist(), candidates.tolist(), values, strict=True):
                with torch.no_grad():
                    expected = model(torch.tensor([[*texts[row], token] for token in tokens]))[
                        :, -1
                    ]
                worst = max(worst, (expected - found).abs().max().item())
        for text, token in zip(texts, responses[:, step].tolist(), strict=True):
            text.append(token)
    assert worst < 1e-5


def test_preallocated_cache_equals_transformers_own():
    model = tiny.language_model("qwen3")
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    caches = [preallocated_cache(model.config, capacity=6), DynamicCache(config=model.config)]
    kept = torch.tensor([0, 2, 3])
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 12)):
            logits = [
                model(input_ids=ids[:, start:end], past_key_values=cache).logits for cache in caches
            ]
            torch.testing.assert_close(*logits)
        for cache in caches:
            cache.batch_select_indices(kept)
        for _ in range(3):
            logits = [
                model(input_ids=ids[kept, :1], past_key_values=cache).logits for cache in caches
            ]
            torch.testing.assert_close(*logits)
    assert [cache.get_seq_length() for cache in caches] == [15, 15]


def test_bad_values_stop_with_step_and_row():
    values = tiny.value_model("qwen3")
    with torch.no_grad():
        values.head.bias.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match="values must be finite, got NaN or infinity at step 0 of prompt 1"
    ):
        generate(
            tiny.language_model("qwen3"),
            tiny.tokenizer(),
            [[7, 8, 9], [7, 8]],
            Steering(values, EveryToken()),
            progress=False,
        )


def test_losses_against_plain_loops():
    values = torch.tensor([[9.0, 1.0, 3.0, 0.0], [9.0, 9.0, 2.0, 4.0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    rewards = torch.tensor([1.0, 5.0])
    assert distillation_loss(values, mask, rewards, "mean").item() == pytest.approx(
        ((2 - 1) ** 2 + (3 - 5) ** 2) / 2
    )
    assert distillation_loss(values, mask, rewards, "token").item() == pytest.approx(
        ((0 + 4) / 2 + (9 + 1) / 2) / 2
    )
    with pytest.raises(ValueError, match='loss must be "mean" or "token", got \'sum\''):
        distillation_loss(values, mask, rewards, "sum")


@pytest.mark.parametrize("loss", ["mean", "token"])
def test_distillation_learns_the_rewards(loss):
    """Reward: whether the response says 7. Both losses learn it; what they make of single tokens differs."""
    prompts = tiny.prompts(64, seed=1)
    responses = [[7 if i % 2 else 8, 9, tiny.EOS] for i in range(64)]
    rewards = [2.0 if i % 2 else -2.0 for i in range(64)]
    settings = {"loss": loss, "epochs": 12, "learning_rate": 3e-3, "batch_size": 16, "seed": 0}
    counted = []
    model = ValueModel.from_backbone(tiny.language_model("qwen3"))
    distill(model, prompts, responses, rewards, progress=counted.append, **settings)
    again = distill(
        ValueModel.from_backbone(tiny.language_model("qwen3")),
        prompts,
        responses,
        rewards,
        **settings,
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    with torch.no_grad():
        means = [
            model(torch.tensor([[5, 6, *response]]))[0, 2:].mean().item()
            for response in responses[:2]
        ]
    assert means[0] < -1.0
    assert means[1] > 1.0
    assert sum(counted) == 12 * sum(len(p) + 3 for p in prompts)
    assert not model.training


def test_distill_refuses_unequal_lists():
    with pytest.raises(ValueError, match="must be as many, got 1, 1 and 2"):
        distill(
            ValueModel.from_backbone(tiny.language_model("qwen3")), [[5]], [[6]], [1.0, 2.0],
            loss="mean", epochs=1, learning_rate=1e-3, batch_size=1, seed=0,
        )  # fmt: skip


def test_epoch_batches_show_each_example_once_an_epoch():
    lengths = [i % 7 for i in range(50)]
    batches = list(epoch_batches(lengths, 8, 3, random.Random(0)))
    counts = [sum(batch.count(i) for batch in batches) for i in range(50)]
    assert counts == [3] * 50
    assert max(len(batch) for batch in batches) == 8
