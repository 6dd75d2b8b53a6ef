"""Memory that the models of a profile need, and how many GPUs that takes: estimated."""

from collections.abc import Iterable
from math import ceil
from pathlib import Path

from benchmarks.spec.model_kinds import JUNCTION, Q_HEAD, ModelKind
from benchmarks.spec.profile import Hardware, HubProfile, Source

CACHE_BYTES = 150 * 1024  # of a token in a cache: 8 billion parameters, 8 key-value heads
RUNTIME = 2e9  # bytes of CUDA, kernels and activations besides
FULL = 0.9  # share of a GPU that weights and caches may fill


def weight_bytes(source: Source, dtype: str) -> float:
    """Return the bytes of a model's weights, from local files where its size is not stated.

    They are 0 if they are not known: a part is on the Hub, or the backbone of an adapter not named.
    """
    if source.billions:
        return source.billions * 1e9 * (4 if dtype == "float32" else 2)
    adapters = Path(source.id, source.subfolder).glob("**/adapter_config.json")
    if len(source.folders) < 1 + (bool(source.backbone) or any(adapters)):
        return 0.0
    files = (file for folder in source.folders for file in folder.glob("**/*.safetensors"))
    return float(sum(file.stat().st_size for file in files))


def unknown_sizes(profile: HubProfile, kinds: Iterable[str]) -> str:
    """Return a sentence that names those of these models whose size is not known; else nothing."""
    names = [
        f"models.{kind}"
        for kind in sorted(kinds)
        if not weight_bytes(profile.models[kind], "bfloat16")
        and ModelKind.parse(kind).name not in (JUNCTION, Q_HEAD)  # small, and read with a model
    ]
    if not names:
        return ""
    return f"the size of {', '.join(names)} is not known and counts as nothing: state its billions"


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
