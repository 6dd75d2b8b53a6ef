"""GPUs that are none: tensors that say "cuda:0", compute on the CPU, and refuse what CUDA refuses.

Values are real, so that control flow may depend on them. Refused are operations on tensors of
several devices (0-dimensional ones of the CPU aside), generators of the CPU for tensors of a GPU,
and `.numpy()`. What only a GPU's kernels do (their rounding, other dtypes) is not emulated.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU = ("cuda", "meta")  # the guard that CUDA is lent calls "cuda" without an index "meta"
aten = torch.ops.aten
MEMORY = 80 * 2**30
PROPERTIES = SimpleNamespace(total_memory=MEMORY, name="emulated", major=9, minor=0)
INDEXES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class EmulatedTensor(torch.Tensor):
    """A tensor on a GPU, by its number, whose values lie in `inner`, a tensor on the CPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor, gpu: int = 0) -> EmulatedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",  # so that autograd looks for no GPU
            requires_grad=values.requires_grad,
        )
        tensor.inner, tensor.gpu = values, gpu
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __tensor_flatten__(self):
        return ["inner"], self.gpu

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["inner"], context)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return emulate(func, args, kwargs or {})

    device = property(lambda self: torch.device("cuda", self.gpu))
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    def __getitem__(self, index):
        return super().__getitem__(_tensors_for_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(_tensors_for_lists(index), value)

    def tolist(self):
        return self.inner.tolist()  # which torch refuses for subclasses, and CUDA does not

    def numpy(self, *_, **__):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
            "tensor to host memory first."
        )

    def __array__(self, *_, **__):
        return self.numpy()

    def __repr__(self) -> str:
        return f"EmulatedTensor({self.inner})"


def _tensors_for_lists(index):
    """Return an index without lists, of which torch would make tensors without values on "meta"."""
    if isinstance(index, tuple):
        return tuple(map(_tensors_for_lists, index))
    return torch.tensor(index) if isinstance(index, list) else index


class EmulatedGenerator(torch.Generator):
    """A generator of the GPU; for another device, torch's own.

    Operations are handed another object than they were called with, of the same state.
    """

    of_gpu: ClassVar[list[torch.Generator]] = []

    def __new__(cls, device="cpu"):
        generator = torch._C.Generator()
        if torch.device(device).type != "cpu":
            cls.of_gpu.append(generator)
        return generator

    @classmethod
    def made(cls, generator: torch.Generator) -> bool:
        return any(torch.equal(x.get_state(), generator.get_state()) for x in cls.of_gpu)


@torch.inference_mode(False)  # whose tensors wrappers cannot view
@torch.no_grad()
def emulate(func, args, kwargs):
    """Run an operation on the values, on the device that CUDA would run it on."""
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    emulated = any(isinstance(tensor, EmulatedTensor) for tensor in tensors)
    on_gpu = devices[0].type in GPU if devices else emulated
    if emulated and not devices and func is not aten.copy_.default:
        check_devices(func, args, tensors)
    generator = kwargs.get("generator")
    if on_gpu and generator is not None and not EmulatedGenerator.made(generator):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if func is aten._fused_sdp_choice.default:
        return 0  # the arithmetic that is written out, for kernels are chosen by device
    plain_args, plain_kwargs = pytree.tree_map(_on_cpu, (args, kwargs))
    plain_kwargs.pop("pin_memory", None)
    results = func(*plain_args, **plain_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if not on_gpu:
        return results
    gpus = [tensor.gpu for tensor in tensors if isinstance(tensor, EmulatedTensor)]
    gpu = devices[0].index or 0 if devices else gpus[0]
    results = pytree.tree_map_only(torch.Tensor, lambda x: EmulatedTensor(x, gpu), results)
    return results if devices else return_and_correct_aliasing(func, args, kwargs, results)


def check_devices(func, args, tensors) -> None:
    """Raise RuntimeError for tensors of several devices, as CUDA does."""
    if func in INDEXES and isinstance(args[0], EmulatedTensor):  # its indices may lie anywhere
        rest = pytree.tree_leaves((args[0], *args[2:]))
        tensors = [x for x in rest if isinstance(x, torch.Tensor)]
    gpus = {x.gpu for x in tensors if isinstance(x, EmulatedTensor)}
    if len(gpus) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cuda:1! ({func}, {[tuple(x.shape) for x in tensors]})"
        )
    others = [x for x in tensors if not isinstance(x, EmulatedTensor) and x.dim() > 0]
    if others:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func}, {[tuple(x.shape) for x in others]})"
        )


def _on_cpu(leaf):
    if isinstance(leaf, EmulatedTensor):
        return leaf.inner
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return emulate(func, args, kwargs or {})


@contextmanager
def _lent_guard() -> Iterator[None]:
    """Let CUDA have the guard of "meta", which does nothing: torch may be built without CUDA."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    guards = (ctypes.c_void_p * 32).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # of c10::DeviceType
    own = guards[cuda]
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = own


@contextmanager
def emulated_cuda() -> Iterator[None]:
    """Let `device="cuda"` work inside, emulated."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    with (
        _lent_guard(),
        mock.patch("torch.cuda._lazy_init"),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=1),
        mock.patch("torch.cuda.set_device"),
        mock.patch("torch.cuda.random.get_rng_state", return_value=torch.zeros(1)),
        mock.patch("torch.cuda.get_rng_state", return_value=torch.zeros(1)),
        mock.patch("torch.cuda.set_rng_state"),
        mock.patch("torch.Generator", EmulatedGenerator),
        mock.patch("torch.cuda.get_device_properties", return_value=PROPERTIES),
        mock.patch("torch.cuda.mem_get_info", return_value=(MEMORY, MEMORY)),
        mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}),  # a mode is of one thread
        _Mode(),
    ):
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(before)


def to_gpu(module: nn.Module, gpu: int = 0) -> nn.Module:
    """Move a module's parameters and buffers to an emulated GPU, from the CPU or another."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                values = EmulatedTensor(_on_cpu(parameter.detach()), gpu)
                child._parameters[name] = nn.Parameter(values, parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = EmulatedTensor(_on_cpu(buffer), gpu)
    return module
