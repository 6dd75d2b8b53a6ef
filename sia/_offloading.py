"""Weights that accelerate has offloaded: they lie on "meta" until a forward pass needs them."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn


def with_weights(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the module's own parameters hold their weights.

    Those of its submodules stay where they are.
    """
    offloaded = any(parameter.is_meta for parameter in module.parameters(recurse=False))
    if not offloaded or "_hf_hook" not in vars(module):
        return nullcontext()
    from accelerate.utils import align_module_device  # has offloaded them

    return align_module_device(module)


def first_entry(model: nn.Module, name: str, parameter: nn.Parameter) -> Tensor | None:
    """Return the first entry of a floating-point parameter in float32; None where it has none.

    Args:
        model: The model.
        name: Of the parameter in the model.
        parameter: The parameter, which may be offloaded.
    """
    if not parameter.is_floating_point() or not parameter.numel():
        return None
    if not parameter.is_meta:
        return parameter[(0,) * parameter.dim()].float()
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    with with_weights(module):
        loaded = module.get_parameter(own_name)
        return None if loaded.is_meta else loaded[(0,) * loaded.dim()].float()
