"""Reader of value heads as other libraries save them beside or within a backbone's checkpoint.

    TRL            v_head.summary.weight and .bias in the checkpoint;
                   beside an adapter, in pytorch_model.bin
    LLaMA-Factory  the same names in value_head.safetensors or value_head.bin
    OpenRLHF       PREFIX.weight in the checkpoint; config.json may name the prefix
                   (value_head_prefix), and a mean and a deviation that values are normalised by

Learned from trl/models/modeling_value_head.py (TRL), llamafactory/model/model_utils/valuehead.py
(LLaMA-Factory) and openrlhf/models/model.py (OpenRLHF).
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from sia._kv_cache import backbone_of, input_device
from sia.scorers import published
from sia.scorers.loading import load_backbone

PREFIXES = ("v_head.summary", "v_head", "value_head")
FILES = ("model*.safetensors", "pytorch_model*.bin", "value_head.safetensors", "value_head.bin")


def read_head(folder: Path) -> nn.Linear | None:
    """Return the head in float32; None if there is none.

    Raises:
        ValueError: If it is of another form, or a file is damaged.
    """
    config = folder / published.MODEL_CONFIG
    settings = published.read_json(config) if config.is_file() else {}
    prefixes = [*filter(None, [settings.get("value_head_prefix")]), *PREFIXES]
    names = {f"{prefix}.{part}" for prefix in prefixes for part in ("weight", "bias")}
    tensors: dict[str, Tensor] = {}
    for pattern in FILES:
        for file in sorted(folder.glob(pattern)):
            tensors |= _tensors(file, names)
    prefix = next((prefix for prefix in prefixes if f"{prefix}.weight" in tensors), None)
    if prefix is None:
        return None
    weight = tensors[f"{prefix}.weight"].float()
    bias = tensors.get(f"{prefix}.bias", torch.zeros(1)).float()
    if settings.get("normalize_reward") and "mean" in settings:
        weight, bias = weight / settings["std"], (bias - settings["mean"]) / settings["std"]
    return published.linear_head({"weight": weight, "bias": bias}, folder)


def read(
    folder: Path, head: nn.Linear, backbone: str | Path | None, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, nn.Linear]:
    """Read the backbone of a head: the checkpoint itself or, with an adapter, what it is for.

    Args:
        folder: The checkpoint.
        head: Head, as `read_head` returns it.
        backbone: Path or Hub id for the adapter; None for the one that it names.
        options: For the backbone's from_pretrained.
    """
    if not (folder / published.ADAPTER_CONFIG).is_file():
        published.refuse_backbone(folder, backbone)
        model = load_backbone(folder, options)
        return model, head.to(input_device(model))
    config = folder / published.ADAPTER_CONFIG
    source, revision = (backbone, None) if backbone else published.backbone_of_adapter(config)
    if not source:
        raise ValueError(
            f"{folder} names no backbone: pass backbone, "
            "the path or Hub id of the model that its adapter was trained on"
        )
    options = {**options, **published.revision_option(revision)}
    model = published.load_backbone(source, "causal_lm", options)
    merged = published.load_adapter(model, folder, source).merge_and_unload()
    return backbone_of(merged), head.to(input_device(merged))


def _tensors(file: Path, names: set[str]) -> dict[str, Tensor]:
    """Return those of the named tensors that a file holds."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as content:
                return {name: content.get_tensor(name) for name in names & set(content.keys())}
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"the value model in {file.parent} cannot be read, a file is damaged or truncated: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return {name: content[name] for name in names if name in content}
