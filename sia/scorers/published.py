"""Reader of the layout in which the value models of the paper are published (Runyi-Hu/SIA).

    model_config.json      model_type: causal_lm or sequence_classification; hidden_size; the
                           backbone may be named, with its base_model_revision
    lora_weights/          a PEFT adapter for the backbone
    token_reward_head.pt   {"token_reward_head": state dict of Linear(hidden_size, 1)}

The adapter is merged into the backbone, which is then read without its own head.
"""

import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from sia._checkpoints import DamagedFileError, reading
from sia._kv_cache import backbone_of, input_device
from sia.scorers.loading import output_size, reading_weights

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import

CONFIG_FILE, ADAPTER_FOLDER, HEAD_FILE = "model_config.json", "lora_weights", "token_reward_head.pt"
PREFIX = "base_model.model."  # of the names of weights in PEFT's files
ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # either will do
KINDS = {
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
}
# in model_config.json
BACKBONE_NAMES = (
    "base_model_name_or_path",
    "base_model_name",
    "base_model",
    "model_name_or_path",
    "model_name",
)
BACKBONE_REVISION = "base_model_revision"


def read(
    folder: Path, backbone: str | Path | None, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, nn.Linear]:
    """Read backbone and head of a published checkpoint.

    Args:
        folder: The checkpoint.
        backbone: Path or Hub id; None for the one that the checkpoint names.
        options: For the backbone's from_pretrained.

    Raises:
        FileNotFoundError: For a missing part.
        ValueError: For parts that do not fit together.
    """
    adapter = folder / ADAPTER_FOLDER
    _check_complete(folder, adapter)
    settings = read_json(folder / CONFIG_FILE)
    kind = settings.get("model_type", "causal_lm")
    if kind not in KINDS:
        raise ValueError(
            f"model_type in {folder / CONFIG_FILE} must be {' or '.join(KINDS)}, got {kind!r}"
        )
    source, revision = named_backbone(folder) if backbone is None else (backbone, None)
    if not source:
        raise ValueError(
            f"{folder} names no backbone: pass backbone, "
            "the path or Hub id of the model that its adapter was trained on"
        )
    model = load_backbone(source, kind, {**options, **revision_option(revision)})
    size = output_size(model)
    if settings.get("hidden_size", size) != size:
        raise ValueError(
            f"the value model in {folder} is for a backbone of hidden size "
            f"{settings['hidden_size']}, {source} has {size}"
        )
    head = _read_head(folder / HEAD_FILE)
    merged = load_adapter(model, adapter, source).merge_and_unload()
    return backbone_of(merged), head.to(input_device(merged))


def _check_complete(folder: Path, adapter: Path) -> None:
    needed = [folder / CONFIG_FILE, folder / HEAD_FILE, adapter / ADAPTER_CONFIG]
    if not (adapter / ADAPTER_WEIGHTS[1]).is_file():
        needed.append(adapter / ADAPTER_WEIGHTS[0])
    for file in needed:
        if not file.is_file():
            raise FileNotFoundError(
                f"no value model in {folder}: expected {CONFIG_FILE}, {ADAPTER_FOLDER}/ and "
                f"{HEAD_FILE}, {file.relative_to(folder)} is missing"
            )


def named_backbone(folder: Path) -> tuple[str | None, str | None]:
    """Return the backbone that a checkpoint names, or else its adapter, and its revision."""
    settings = read_json(folder / CONFIG_FILE)
    if named := next(filter(None, map(settings.get, BACKBONE_NAMES)), None):
        return named, settings.get(BACKBONE_REVISION)
    return backbone_of_adapter(folder / ADAPTER_FOLDER / ADAPTER_CONFIG)


def backbone_of_adapter(file: Path) -> tuple[str | None, str | None]:
    """Return the backbone that the config of an adapter names, and its revision."""
    settings = read_json(file)
    return settings.get("base_model_name_or_path"), settings.get("revision")


def revision_option(revision: str | None) -> dict[str, str]:
    """Return the option of from_pretrained for a revision, if there is one."""
    return {"revision": revision} if revision else {}


def load_backbone(source: str | Path, kind: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load a backbone with all its weights; those of its own head, which is not used, may lack.

    Args:
        source: Path or Hub id.
        kind: What it is loaded as, one of KINDS.
        options: For transformers' from_pretrained.

    Raises:
        ValueError: If weights are damaged or missing.
    """
    labels = {"num_labels": 1} if kind == "sequence_classification" else {}
    with reading_weights(f"the backbone {source}"):
        model, loading = KINDS[kind].from_pretrained(
            source, output_loading_info=True, **labels, **options
        )
    prefix = f"{model.base_model_prefix}."
    if missing := sorted(key for key in loading["missing_keys"] if key.startswith(prefix)):
        raise ValueError(f"the backbone {source} lacks weights: {', '.join(missing)}")
    return refuse_adapted(model, source)


def refuse_adapted(model: PreTrainedModel, source: str | Path) -> PreTrainedModel:
    """Return a backbone in which another adapter can be put.

    Raises:
        ValueError: If it is an adapter itself, which transformers loads together with its base: the
            other one would take its place.
    """
    if "peft_config" in vars(model):
        raise ValueError(
            f"the backbone {source} must be a whole model, got an adapter: merge it into its base "
            "(merge_and_unload of PEFT) and save that"
        )
    return model


def load_adapter(
    model: PreTrainedModel,
    adapter: str | Path,
    source: str | Path,
    *,
    keep_half: bool = False,
    **places: Any,
) -> "PeftModel":
    """Return a backbone with an adapter in its layers.

    Args:
        model: The backbone.
        adapter: Path or Hub id.
        source: Path or Hub id of the backbone, for messages.
        keep_half: Whether an adapter that is all in half precision stays so; PEFT's own way is to
            make it float32.
        **places: Options that say where the adapter lies.

    Raises:
        ValueError: If the adapter is damaged or does not fit.
    """
    from peft import (  # takes seconds to import
        PeftModel,
        get_peft_model_state_dict,
        load_peft_weights,
    )

    try:
        with reading(f"the adapter in {adapter}"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # peft's use of transformers
            warnings.filterwarnings("error", message="Found missing adapter keys")
            weights = load_peft_weights(str(adapter), device="cpu", **places)
            _resize_vocabulary(model, weights)
            widen = not keep_half or any(w.dtype == torch.float32 for w in weights.values())
            # trainable, so that `distill` goes on with it
            adapted = PeftModel.from_pretrained(
                model, adapter, is_trainable=True, autocast_adapter_dtype=widen, **places
            ).eval()
            expected = get_peft_model_state_dict(adapted)
            if foreign := sorted(set(weights) - set(expected)):
                raise ValueError(
                    f"it has weights for layers that the backbone does not have, {foreign[0]} first"
                )
            return adapted
    except DamagedFileError:
        raise
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ValueError(
            f"the adapter in {adapter} does not fit the backbone {source}: "
            + " ".join(line.strip() for line in str(error).splitlines()[:2])
        ) from error


def _resize_vocabulary(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give a backbone as many tokens as the adapter has embeddings for, if it brings any."""
    embeddings = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embeddings]
    brought = [weights[key] for name in names if (key := f"{PREFIX}{name}.weight") in weights]
    if brought and len(brought[0]) != cast(nn.Embedding, embeddings).num_embeddings:
        model.resize_token_embeddings(len(brought[0]), mean_resizing=False)


def _read_head(file: Path) -> nn.Linear:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is no readable torch file of tensors (truncated?)") from error
    if not isinstance(content, dict) or not isinstance(content.get("token_reward_head"), Mapping):
        kind = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file} must hold token_reward_head, the state of a Linear, got {kind}")
    return linear_head(content["token_reward_head"], file)


def linear_head(state: Mapping[str, Tensor], file: Path) -> nn.Linear:
    """Return Linear(hidden, 1) in float32 with the weights that were read from `file`.

    Raises:
        ValueError: If they are of anything else.
    """
    if set(state) != {"weight", "bias"} or state["weight"].ndim != 2 or len(state["weight"]) != 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        raise ValueError(
            f"{file} must hold weight (1, hidden) and bias (1,) of the value head, got {shapes}"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise ValueError(f"the value head in {file} must hold finite numbers, got NaN or infinity")
    head = nn.Linear(state["weight"].shape[1], 1)
    head.load_state_dict(dict(state), assign=True)  # whatever the default device and dtype
    return head


def refuse_backbone(folder: Path, backbone: str | Path | None) -> None:
    """Raise ValueError if a backbone is named for a checkpoint that brings its own."""
    if backbone is not None:
        raise ValueError(f"{folder} brings its own backbone: backbone must be None, got {backbone}")


def read_json(file: Path) -> dict[str, Any]:
    """Return the settings that a JSON file holds, or raise ValueError."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no readable JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold settings by name, got a {type(settings).__name__}")
    return settings
