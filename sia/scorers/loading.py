"""Parts that scorers share: models out of their wrappers, complete checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedModel

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
