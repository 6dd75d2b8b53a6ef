"""Weights that accelerate has offloaded: they lie on "meta" until a forward pass needs them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

ENTRIES = 5  # of a parameter, that tell a model


def with_weights(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the module's own parameters hold their weights.

    Those of its submodules stay where they are.
    """
    offloaded = any(parameter.is_meta for parameter in module.parameters(recurse=False))
    if not offloaded or "_hf_hook" not in vars(module):
        return nullcontext()
    from accelerate.utils import align_module_device  # has offloaded them

    return align_module_device(module)


def few_entries(model: nn.Module, name: str, parameter: nn.Parameter) -> Tensor | None:
    """Return a few entries of a floating-point parameter, float32 `(n,)`; None where it has none.

    Args:
        model: The model.
        name: Name of the parameter in the model.
        parameter: The parameter, which may be offloaded.
    """
    if not parameter.is_floating_point() or not parameter.numel():
        return None
    if not parameter.is_meta:
        return _diagonal(parameter)
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    with with_weights(module):
        loaded = module.get_parameter(own_name)
        return None if loaded.is_meta else _diagonal(loaded)


def _diagonal(parameter: Tensor) -> Tensor:
    """Return entries of the first rows, as a vocabulary may get more rows, in columns far apart."""
    entries = torch.atleast_1d(parameter.detach())[:ENTRIES]
    while entries.dim() > 1:
        entries = entries[..., :: max(1, entries.shape[-1] // ENTRIES)].diagonal(0, 0, -1)
    return entries.float()
