"""Device, dtype and batch size of a run on models of the Hub."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.spec.profile import Hardware, HubProfile

GIB = 2**30
BYTES_PER_TOKEN = 150 * 1024  # of a cache: 8 billion parameters with 8 key-value heads


def choose_device(device: str = "", dtype: str = "", gpus: int | None = None) -> tuple[str, str]:
    """Return device and dtype: as requested, else a GPU in bfloat16 or the processor in float32.

    Args:
        device: cpu, cuda, or empty to choose.
        dtype: float32, bfloat16, float16, or empty to choose.
        gpus: GPUs of a cluster; None: ask this machine.

    Raises:
        ValueError: For a device that is not there, or an unknown dtype.
    """
    has_gpu = torch.cuda.is_available() if gpus is None else gpus > 0
    device = device or ("cuda" if has_gpu else "cpu")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if device not in ("cpu", "cuda") or (device == "cuda" and not has_gpu):
        raise ValueError(f"device must be cpu, or cuda where there is a GPU, got {device!r}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return device, dtype


def detect_hardware(
    profile: HubProfile,
    device: str = "",
    dtype: str = "",
    batch_size: int = 0,
    gpus: int | None = None,
) -> Hardware:
    """Return device and dtype as `choose_device` does, and the batch size.

    Args:
        profile: Settings of the run.
        device: See `choose_device`, as for `dtype` and `gpus`.
        dtype: Type of the weights.
        batch_size: Responses decoded together; 0: the profile's, or fewer if they should not fit.
        gpus: GPUs of a cluster.
    """
    device, dtype = choose_device(device, dtype, gpus)
    if not batch_size:
        room = 2 * GIB  # beside the models
        if device == "cuda" and gpus is None:
            room = torch.cuda.get_device_properties(0).total_memory / 4
        elif device == "cuda":  # what the smallest usual GPUs of clusters have
            room = 10 * GIB
        tokens = profile.prompts.longest // 4 + profile.decoding.max_new_tokens
        per_response = 2 * BYTES_PER_TOKEN * tokens  # in the caches of two models
        batch_size = int(np.clip(room // per_response, 1, profile.decoding.batch_size))
    return Hardware(device, dtype, batch_size)
