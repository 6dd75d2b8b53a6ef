"""Matrix products of the lab's models by oneDNN, which uses the whole vector width of a processor.

MKL, which torch takes for float32, stops at half of it on AMD's. Both differ in the order of
summation alone; `benchmarks/perf/linear_layers.py` times them.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Module = TypeVar("Module", bound=nn.Module)


def use_onednn(model: Module) -> Module:
    """Let a model's linear layers compute by oneDNN, if torch has it; return the same model."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
    return model


class OneDnnLinear(nn.Linear):
    """Linear layer for float32 on a processor; it leaves all other inputs to torch."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product, and keep what its gradient needs."""
        if (
            not input.numel()
            or input.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or input.device.type != "cpu"
        ):
            return super().forward(input)
        if torch.is_grad_enabled():
            return _Linear.apply(input, self.weight, self.bias)
        return _product(input, self.weight, self.bias)


class _Linear(Function):
    """Product y = x·Wᵀ + b with gradients by the same operator; x `(…, in)`, W `(out, in)`."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = context.saved_tensors
        of_x, of_weight, of_bias = context.needs_input_grad
        rows = gradient.reshape(-1, len(weight))  # (n, out)
        return (
            _product(gradient, weight.t()) if of_x else None,
            _product(x.reshape(-1, weight.shape[1]).t(), rows.t()).t() if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x·Wᵀ + b by the operator of torch's own compiler, which has no derivative."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
