"""Parts that scorers share: models out of their wrappers, complete checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sia._checkpoints import expand_home

if TYPE_CHECKING:
    from peft import PeftModel  # takes seconds to import


def unwrap(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """Return the transformers model that PEFT wraps, its adapters in place; others as they are.

    Raises:
        ValueError: For adapters that lie outside the model (prompt and prefix tuning).
    """
    if isinstance(model, PreTrainedModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "adapters must lie in the layers of the model, as LoRA's do, "
            f"got {type(model.active_peft_config).__name__}"
        )
    return cast(PreTrainedModel, model.get_base_model())


def load_complete(
    auto_class: Any, path: str | Path, noun: str, options: Mapping[str, Any]
) -> PreTrainedModel:
    """Load a model with all its weights, those of its head too: none are made up.

    Raises:
        OSError: If it is not there.
        ValueError: If weights are damaged or missing.
    """
    path = expand_home(path)
    if not Path(path).is_dir() and str(path).count("/") != 1:
        raise FileNotFoundError(
            f"no {noun} in {path}: there is no such folder, and a Hub id has the form owner/name"
        )
    try:
        model, loading = auto_class.from_pretrained(path, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ValueError(
            f"the {noun} {path} cannot be read, a file is damaged or truncated: {error}"
        ) from error
    mismatched = [key for key, *_ in loading["mismatched_keys"]]
    if missing := sorted([*loading["missing_keys"], *mismatched]):
        raise ValueError(
            f"{path} is no {noun}: expected all weights of {type(model).__name__}, "
            f"{', '.join(missing)} missing"
        )
    return model


def load_backbone(folder: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    """Load the backbone of a value model with all its weights, whatever heads lie beside it.

    Raises:
        ValueError: If weights are damaged, missing, or of other sizes than config.json says.
    """
    try:
        backbone, loading = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise ValueError(
            f"the value model in {folder} cannot be read, a file is damaged or truncated: {error}"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    if loading["missing_keys"]:
        raise ValueError(
            f"the value model in {folder} lacks weights of its backbone: "
            f"{', '.join(sorted(loading['missing_keys']))}"
        )
    return backbone


def check_reproducible(backbone: PreTrainedModel) -> None:
    """Check that `load_backbone` would bring a backbone back bit for bit.

    Raises:
        ValueError: If its config makes another model (adapters in its layers, modules quantised or
            put in by hand, a class of one's own), or its weights have several dtypes.
    """
    if "quantization_config" in backbone.config.to_dict():
        return  # transformers saves and loads what it quantises in its own ways
    try:
        with torch.device("meta"):
            again = AutoModel.from_config(backbone.config)
    except ValueError as error:  # a config that no class is registered for
        raise ValueError(f"the backbone cannot be saved: {error}") from error
    kinds = type(backbone), type(again)
    if kinds[0] is not kinds[1]:
        raise ValueError(
            f"the backbone cannot be saved: its config makes a {kinds[1].__name__}, "
            f"it is a {kinds[0].__name__}"
        )
    shapes = [
        {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
        for model in (backbone, again)
    ]
    if different := sorted(dict(shapes[0].items() ^ shapes[1].items())):
        raise ValueError(
            "the backbone cannot be saved, it has other weights than its config makes "
            f"({different[0]}): merge adapters first, as PEFT's merge_and_unload does"
        )
    dtypes = sorted({str(weight.dtype) for weight in backbone.parameters()})
    if len(dtypes) > 1:
        raise ValueError(
            "the backbone cannot be saved, its weights must have one dtype, "
            f"got {', '.join(dtypes)}"
        )


def cast_buffers(backbone: PreTrainedModel) -> dict[str, Tensor]:
    """Return buffers that no checkpoint of transformers holds and that are not in float32."""
    stored = backbone.state_dict().keys()
    return {
        name: buffer.detach().clone()
        for name, buffer in backbone.named_buffers()
        if name not in stored and buffer.is_floating_point() and buffer.dtype != torch.float32
    }


def output_size(backbone: PreTrainedModel) -> int:
    """Return the size of a backbone's last hidden state, which OPT projects to another."""
    config = backbone.config.get_text_config()
    return config.to_dict().get("word_embed_proj_dim") or config.hidden_size


def tokenizer_beside(
    path: str | Path, options: Mapping[str, Any]
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a checkpoint, None if there is none.

    Args:
        path: Local folder or Hub id.
        options: Of the model's from_pretrained; those that say where it lies count.
    """
    path = expand_home(path)
    if Path(path).is_dir() and not list(Path(path).glob("**/tokenizer*")):
        return None
    places = {k: v for k, v in options.items() if k in ("revision", "subfolder", "token")}
    try:
        return AutoTokenizer.from_pretrained(path, **places)
    except (OSError, ValueError):
        return None
