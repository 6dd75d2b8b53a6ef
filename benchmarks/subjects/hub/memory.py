"""Memory that the models of a profile need, and how many GPUs that takes: estimated."""

from collections.abc import Iterable
from math import ceil
from pathlib import Path

from benchmarks.spec.profile import Hardware, HubProfile, Source

CACHE_BYTES = 150 * 1024  # of a token in a cache: 8 billion parameters, 8 key-value heads
RUNTIME = 2e9  # bytes of CUDA, kernels and activations besides
FULL = 0.9  # share of a GPU that weights and caches may fill


def weight_bytes(source: Source, dtype: str) -> float:
    """Return the bytes of a model's weights, from its files where its size is not stated."""
    if source.billions:
        return source.billions * 1e9 * (4 if dtype == "float32" else 2)
    return sum(
        file.stat().st_size for file in Path(source.id, source.subfolder).glob("**/*.safetensors")
    )


def response_bytes(profile: HubProfile) -> float:
    """Return the bytes of a response's two caches, the language model's and the value model's."""
    return 2 * CACHE_BYTES * (profile.prompts.longest // 4 + profile.decoding.max_new_tokens)


def memory(profile: HubProfile, kinds: Iterable[str], hardware: Hardware) -> float:
    """Return the bytes of a worker: the two largest of these models at once, caches, the rest.

    More models are kept where there is room, no fewer than two.
    """
    sizes = sorted(weight_bytes(profile.models[kind], hardware.dtype) for kind in kinds)
    return sum(sizes[-2:]) + hardware.batch_size * response_bytes(profile) + RUNTIME


def gpus_each(needed: float, available: float, gpus: int) -> int:
    """Return how many of so many GPUs one worker takes.

    Args:
        needed: Bytes of a worker.
        available: Bytes of a GPU.
        gpus: GPUs in all.
    """
    return max(1, min(gpus, ceil(needed / (FULL * available))))
