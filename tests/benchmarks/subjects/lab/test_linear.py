"""Linear layers by oneDNN against torch's own."""

import copy

import pytest
import torch
from torch import nn

from benchmarks.spec.profile import ModelSize
from benchmarks.subjects.lab import models, training
from benchmarks.subjects.lab.linear import OneDnnLinear, use_onednn
from sia import ValueModel

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
SIZE = ModelSize(hidden_size=24, layers=2, heads=4, key_value_heads=2, feed_forward=40)


def pair(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """The same layer twice: torch's, and by oneDNN."""
    with torch.random.fork_rng():
        torch.manual_seed(inputs + outputs)
        plain = nn.Linear(inputs, outputs, bias=bias)
    return plain, use_onednn(copy.deepcopy(plain))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "x",
    [
        numbers(7),
        numbers(5, 7),
        numbers(2, 3, 7),
        numbers(4, 6, 7)[:, -1:],
        numbers(6, 7, 4).transpose(1, 2),
        numbers(0, 7),
    ],
    ids=["vector", "rows", "batch", "last positions", "strided", "empty"],
)
def test_outputs_and_gradients_are_those_of_torch(x, bias):
    results = []
    for layer in pair(7, 9, bias):
        x_again = x.clone().requires_grad_()
        y = layer(x_again)
        (y * (y - 1)).sum().backward()
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), y.detach())
        results.append(
            [y.detach(), x_again.grad, *(parameter.grad for parameter in layer.parameters())]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_unneeded_gradients_are_not_computed():
    _, layer = pair(7, 9, True)
    layer.weight.requires_grad_(False)
    x = numbers(5, 7)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is None
    assert torch.equal(layer.bias.grad, torch.full((9,), 5.0))


def test_a_second_derivative_is_refused():
    _, layer = pair(7, 9, True)
    x = numbers(5, 7).requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype):
    plain, layer = (one.to(dtype) for one in pair(7, 9, True))
    assert torch.equal(layer(numbers(5, 7).to(dtype)), plain(numbers(5, 7).to(dtype)))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_every_lab_model_computes_by_onednn_and_learns_the_same(family):
    model = models.new_language_model(family, SIZE, 50, seed=0)
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, OneDnnLinear):
            layer.__class__ = nn.Linear
    reward = models.new_reward_model(model, family)
    for each in (model, reward, ValueModel.from_backbone(model).backbone):
        layers = [layer for layer in each.modules() if isinstance(layer, nn.Linear)]
        assert len(layers) >= 7 * SIZE.layers
        assert all(type(layer) is OneDnnLinear for layer in layers)
    sequences = [[3 + (i * j) % 47 for j in range(1, 12)] for i in range(1, 9)]
    losses = [training.next_token_loss(one, sequences, [0] * 8) for one in (model, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)
