"""Modes of models and of torch for as long as models decode, score or learn."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Turn off dropout and gradient checkpointing, and leave every module as it was found."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def uncompiled() -> AbstractContextManager[None]:
    """Return a context in which what torch has compiled runs as written.

    Compiled code does not know what looks into its layers, and would be compiled again for it.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def learning_mode() -> Iterator[None]:
    """Let gradients flow, and new tensors be float32 on the CPU, whatever the caller has set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    # a device as a context slows every call
    on_cpu = nullcontext() if device.type == "cpu" else torch.device("cpu")
    try:
        with torch.inference_mode(False), torch.enable_grad(), on_cpu:
            yield
    finally:
        torch.set_default_dtype(dtype)
