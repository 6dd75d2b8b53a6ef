"""Distillation of trajectory rewards into values of tokens."""

import copy
import math
import random
from collections import Counter
from itertools import chain

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel, T5Config, T5Model

from sia import ValueModel, distill
from sia.training import distillation_loss, epoch_batches
from tests.helpers import tiny


def new_model():
    return ValueModel.from_backbone(tiny.language_model("qwen3"))


def assert_at_rest(model):
    """No module is in training mode, and no memory is kept for gradients."""
    assert not any(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def bert(decoder=False):
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, is_decoder=decoder,
    )  # fmt: skip
    return ValueModel.from_backbone(tiny.seeded(lambda: BertModel(config), 0))


def t5():
    config = T5Config(vocab_size=tiny.VOCABULARY, d_model=32, num_layers=1, num_heads=4, d_ff=48)
    return ValueModel.from_backbone(tiny.seeded(lambda: T5Model(config), 0))


def test_losses_against_plain_loops():
    values = torch.tensor([[9.0, 1.0, 3.0, 0.0], [9.0, 9.0, 2.0, 4.0]])
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]])
    losses = {
        loss: distillation_loss(values, mask, torch.tensor([1.0, 5.0]), loss).item()
        for loss in ("mean", "token")
    }
    assert losses == {
        "mean": pytest.approx(((2 - 1) ** 2 + (3 - 5) ** 2) / 2),
        "token": pytest.approx(((0 + 4) / 2 + (9 + 1) / 2) / 2),
    }
    with pytest.raises(ValueError, match='loss must be "mean" or "token", got \'sum\''):
        distillation_loss(values, mask, torch.tensor([1.0, 5.0]), "sum")


@pytest.mark.parametrize("loss", ["mean", "token"])
def test_distillation_learns_the_rewards(loss):
    """The reward of a response is whether it has a 7; a seed gives the same weights again."""
    prompts = tiny.prompts(64, seed=1)
    responses, rewards = [[8, 9, tiny.EOS], [7, 9, tiny.EOS]] * 32, [-2.0, 2.0] * 32
    settings = {"loss": loss, "epochs": 12, "learning_rate": 3e-3, "batch_size": 16, "seed": 0}
    tokens, model, again = [], new_model(), new_model()
    distill(model, prompts, responses, rewards, progress=tokens.append, **settings)
    distill(again, prompts, responses, rewards, **settings)
    torch.testing.assert_close(model.state_dict(), again.state_dict(), atol=0, rtol=0)
    low, high = model(torch.tensor([[5, 6, *r] for r in responses[:2]]))[:, 2:].mean(1).tolist()
    assert low < -1 < 1 < high
    assert sum(tokens) == 12 * sum(len(prompt) + 3 for prompt in prompts)
    assert_at_rest(model)


def test_columns_of_a_shuffled_table_go_together_by_place():
    responses = [[8, tiny.EOS], [7, tiny.EOS], [9, tiny.EOS]]
    table = pd.DataFrame({"prompt": tiny.prompts(3), "response": responses, "reward": [0.0, 1, 2]})
    table = table.iloc[[2, 0, 1]]
    settings = {"loss": "token", "epochs": 2, "learning_rate": 3e-3, "batch_size": 2, "seed": 0}
    by_list, by_column = new_model(), new_model()
    distill(by_list, *(table[name].tolist() for name in table), **settings)
    distill(by_column, *(table[name] for name in table), **settings)
    torch.testing.assert_close(by_column.state_dict(), by_list.state_dict(), atol=0, rtol=0)


def test_weights_in_bfloat16_learn_by_steps_below_their_spacing():
    rounded = ValueModel.from_backbone(tiny.language_model("qwen3").bfloat16())
    models, changes = [ValueModel.from_backbone(tiny.language_model("qwen3")), rounded], []
    models[0].backbone.load_state_dict(rounded.backbone.state_dict())
    for model in models:
        before = model.backbone.layers[0].mlp.up_proj.weight.detach().clone()
        responses, rewards = [[8, 9, tiny.EOS], [7, 9, tiny.EOS]] * 8, [-2.0, 2.0] * 8
        distill(
            model, tiny.prompts(16), responses, rewards, loss="token", epochs=20,
            learning_rate=2e-5, batch_size=8, seed=0,
        )  # fmt: skip
        after = model.backbone.layers[0].mlp.up_proj.weight
        assert after.dtype == before.dtype
        assert (after != before).float().mean() > 0.1
        changes.append((after - before).float().detach().flatten())
        assert_at_rest(model)
    assert torch.corrcoef(torch.stack(changes))[0, 1] > 0.5


def test_weights_in_float64_stay_exact():
    model = ValueModel.from_backbone(tiny.language_model("qwen3").double())
    before = model.backbone.layers[0].mlp.up_proj.weight.detach().clone()
    distill(
        model, tiny.prompts(2), [[8, tiny.EOS]] * 2, [0.0, 1.0], loss="token", epochs=1,
        learning_rate=0.0, batch_size=2, seed=0, weight_decay=0.0,
    )  # fmt: skip
    assert torch.equal(model.backbone.layers[0].mlp.up_proj.weight, before)


def test_distill_refuses_unequal_lists():
    settings = {"loss": "mean", "epochs": 1, "learning_rate": 1e-3, "batch_size": 1, "seed": 0}
    with pytest.raises(ValueError, match="must be as many, got 1, 1 and 2"):
        distill(new_model(), [[5]], [[6]], [1.0, 2.0], **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rewards": [0.0, math.nan]},
            "example 1: a reward must be a number .* nan",
        ),
        ({"rewards": [math.inf, 0.0]}, "example 0: .* got inf"),
        ({"rewards": [0.0, 1e30]}, "example 1: .* got 1e.30"),
        ({"rewards": [0.0, None]}, "example 1: .* got None"),
        ({"responses": [[7], []]}, "example 1: a response needs at least one token, got none"),
        ({"responses": [[7], [60]]}, "example 1: .* below the vocabulary of 60 tokens, got 60"),
        ({"prompts": [[-1], [5]]}, "example 0: .* got -1"),
        ({"prompts": [[5], []]}, "example 1: a prompt needs at least one token, got none"),
        ({"prompts": ["hello", [5]]}, "example 0: .* list of token ids, got 'hello'"),
        ({"responses": [[7], None]}, "example 1: .* list of token ids, got None"),
        ({"responses": [[7], [7, "8"]]}, "example 1: .* got one that holds '8'"),
        ({"responses": [[7.0], [7]]}, "example 0: .* got one that holds 7.0"),
        ({"responses": [[7], [[7]]]}, r"example 1: .* got one that holds \[7\]"),
        ({"prompts": [], "responses": [], "rewards": []}, "at least one example, got none"),
        ({"loss": "sum"}, 'loss must be "mean" or "token", got .sum.'),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        (
            {"learning_rate": math.inf},
            "learning_rate must be a finite number .* got inf",
        ),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number of at least 0, got -1.0"),
    ],
)
def test_distill_names_the_example_that_it_cannot_learn_from(change, message):
    settings = {"loss": "mean", "epochs": 1, "learning_rate": 1e-3, "batch_size": 2, "seed": 0}
    data = {"prompts": [[5], [5]], "responses": [[7], [8]], "rewards": [0.0, 1.0]} | change
    model = new_model()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        distill(model, **settings | data)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model: model.requires_grad_(False), ValueError, "all weights .* are frozen"),
        (lambda model: model.half(), ValueError, "must be float32 or bfloat16 .* got float16"),
        (lambda model: model.to("meta"), ValueError, "must lie in memory to learn, weights of"),
        (lambda model: model.backbone, TypeError, "must be a ValueModel, got Qwen3Model"),
        (lambda _: bert(), ValueError, r"must be causal to learn, .* see later ones \(BertModel"),
        (lambda _: t5(), ValueError, r"must be causal to learn, .* see later ones \(T5Model"),
    ],
)
def test_distill_refuses_what_cannot_learn(change, error, message):
    settings = {"loss": "mean", "epochs": 1, "learning_rate": 1e-3, "batch_size": 2, "seed": 0}
    with pytest.raises(error, match=message):
        distill(change(new_model()), [[5]], [[7]], [1.0], **settings)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's
def test_distill_refuses_layers_without_gradients():
    values = new_model()
    values.backbone = torch.ao.quantization.quantize_dynamic(values.backbone, {torch.nn.Linear})
    settings = {"loss": "mean", "epochs": 1, "learning_rate": 1e-3, "batch_size": 2, "seed": 0}
    with pytest.raises(ValueError, match="layers that torch has quantised have no gradients, this"):
        distill(values, [[5]], [[7]], [1.0], **settings)


def test_training_that_would_end_in_nan_stops():
    model = new_model()
    torch.nn.init.constant_(model.head.bias, torch.nan)
    settings = {"loss": "mean", "epochs": 1, "learning_rate": 1e-3, "batch_size": 2, "seed": 0}
    with pytest.raises(FloatingPointError, match=r"must be finite, got nan .* from examples .0"):
        distill(model, [[5]], [[7]], [1.0], **settings)
    assert_at_rest(model)


def test_a_causal_model_of_a_bidirectional_type_learns():
    settings = {"loss": "mean", "epochs": 1, "learning_rate": 1e-3, "batch_size": 2, "seed": 0}
    assert_at_rest(distill(bert(decoder=True), [[5]], [[7]], [1.0], **settings))


def test_epoch_batches_show_each_example_once_an_epoch():
    batches = list(epoch_batches([i % 7 for i in range(50)], 8, 3, random.Random(0)))
    assert Counter(chain(*batches)) == dict.fromkeys(range(50), 3)
    assert max(map(len, batches)) == 8
