"""The layout in which the value models of the paper are published (Runyi-Hu/SIA on the Hub):

    model_config.json      model_type: causal_lm or sequence_classification; hidden_size; the backbone may be named
    lora_weights/          a PEFT adapter for the backbone
    token_reward_head.pt   {"token_reward_head": state dict of Linear(hidden_size, 1)}

The adapter is merged into the backbone, which is then read without its own head.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

CONFIG_FILE, ADAPTER_FOLDER, HEAD_FILE = "model_config.json", "lora_weights", "token_reward_head.pt"
KINDS = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
}
BACKBONE_NAMES = (
    "base_model_name_or_path",
    "base_model_name",
    "base_model",
    "model_name_or_path",
    "model_name",
)  # in model_config.json


def read(
    folder: Path, backbone: str | Path | None, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, nn.Linear]:
    """Backbone and head. backbone: path or Hub id, None for the one that the checkpoint names. options: for its from_pretrained.

    Errors: FileNotFoundError for a missing part, ValueError for parts that do not fit together.
    """
    from peft import (  # takes seconds to import
        PeftModel,
        get_peft_model_state_dict,
        load_peft_weights,
    )

    adapter = folder / ADAPTER_FOLDER
    weights = [adapter / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    for needed in (
        folder / CONFIG_FILE,
        folder / HEAD_FILE,
        adapter / "adapter_config.json",
        weights[0],
    ):
        if not needed.is_file() and not (needed is weights[0] and weights[1].is_file()):
            raise FileNotFoundError(
                f"no value model in {folder}: expected {CONFIG_FILE}, {ADAPTER_FOLDER}/ and {HEAD_FILE},"
                f" {needed.relative_to(folder)} is missing"
            )
    settings = _read_json(folder / CONFIG_FILE)
    kind = settings.get("model_type", "causal_lm")
    if kind not in KINDS:
        raise ValueError(
            f"model_type in {folder / CONFIG_FILE} must be {' or '.join(KINDS)}, got {kind!r}"
        )
    if backbone is None:
        named = [settings[name] for name in BACKBONE_NAMES if settings.get(name)]
        backbone = (
            named[0]
            if named
            else _read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        )
    if not backbone:
        raise ValueError(
            f"{folder} names no backbone: pass backbone, the path or Hub id of the model that its adapter was trained on"
        )
    labels = {"num_labels": 1} if kind == "sequence_classification" else {}
    try:
        model, loading = KINDS[kind].from_pretrained(
            backbone, output_loading_info=True, **labels, **options
        )
    except SafetensorError as error:
        raise ValueError(
            f"the backbone {backbone} cannot be read, a file is damaged or truncated: {error}"
        ) from error
    missing = sorted(
        key for key in loading["missing_keys"] if key.startswith(f"{model.base_model_prefix}.")
    )  # its own head is not used
    if missing:
        raise ValueError(f"the backbone {backbone} lacks weights: {', '.join(missing)}")
    size = model.config.get_text_config().hidden_size
    if settings.get("hidden_size", size) != size:
        raise ValueError(
            f"the value model in {folder} is for a backbone of hidden size {settings['hidden_size']}, {backbone} has {size}"
        )
    head = read_head(folder / HEAD_FILE)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # peft's use of transformers
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, adapter)
            foreign = sorted(
                set(load_peft_weights(str(adapter), device="cpu"))
                - set(get_peft_model_state_dict(adapted))
            )
            if foreign:
                raise ValueError(
                    f"it has weights for layers that the backbone does not have, {foreign[0]} first"
                )
            model = adapted.merge_and_unload()
    except SafetensorError as error:
        raise ValueError(
            f"the adapter in {adapter} cannot be read, a file is damaged or truncated: {error}"
        ) from error
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ValueError(
            f"the adapter in {adapter} does not fit the backbone {backbone}: {str(error).splitlines()[0]}"
        ) from error
    return model.base_model, head.to(model.device)


def read_head(file: Path) -> nn.Linear:
    """The head of a published checkpoint. Errors: ValueError if the file holds anything else."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is no readable torch file of tensors (truncated?)") from error
    if not isinstance(content, dict) or not isinstance(content.get("token_reward_head"), Mapping):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file} must hold token_reward_head, the state of a Linear, got {found}")
    return linear_head(content["token_reward_head"], file)


def linear_head(state: Mapping[str, Tensor], file: Path) -> nn.Linear:
    """Linear(hidden, 1) in float32 with these weights. Errors: ValueError for anything else."""
    if set(state) != {"weight", "bias"} or state["weight"].ndim != 2 or len(state["weight"]) != 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise ValueError(
            f"{file} must hold weight (1, hidden) and bias (1,) of the value head, got {shapes}"
        )
    head = nn.Linear(state["weight"].shape[1], 1)
    head.load_state_dict(dict(state))
    return head


def local_folder(path: str | Path, subfolder: str, revision: str | None) -> Path:
    """The folder itself, or the Hub's, downloaded into its cache.

    Errors: FileNotFoundError, in one sentence, if it is neither a folder here nor can be had from the Hub.
    """
    if Path(path).is_dir():
        return Path(path) / subfolder
    if Path(path).is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise FileNotFoundError(
            f"no value model in {path}: there is no such folder, and a Hub id has the form owner/name"
        )
    try:
        patterns = [f"{subfolder}/*"] if subfolder else None
        return (
            Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
            / subfolder
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no value model in {path}: it is no folder here, and the Hub does not give it ({reason})"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no readable JSON: {error}") from error
