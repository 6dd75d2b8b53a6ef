"""Adapters of PEFT (LoRA and the like) in the layers of a backbone, saved apart from it."""

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from sia.scorers import loading, published
from sia.scorers.loading import PLACE_OPTIONS, existing, load_backbone

if TYPE_CHECKING:
    from peft import PeftConfig  # takes seconds to import

HEADS = ("score.", "classifier.", "logits_proj.")  # how the names of their weights begin
PLAIN_STARTS = (None, True, False, "gaussian")  # others (PiSSA, …) change the backbone's weights


def sole_adapter(backbone: PreTrainedModel) -> "tuple[str, PeftConfig] | None":
    """Return name and config of the adapter that can be saved apart from its backbone, if any.

    It is active in all its layers, alone, and names the backbone. The config is for the backbone
    without a head: it has no task, and names layers as they are called there.
    """
    configs = vars(backbone).get("peft_config", {})
    if len(configs) != 1:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    ((name, config),) = configs.items()
    layers = {
        path: module
        for path, module in backbone.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    active = all(
        layer.active_adapters == [name] and not (layer.merged or layer.disable_adapters)
        for layer in layers.values()
    )
    settings = vars(config)
    plain = settings.get("init_lora_weights") in PLAIN_STARTS and not settings.get("alpha_pattern")
    if not (layers and active and plain and config.base_model_name_or_path):
        return None
    alone = copy(config)
    alone.task_type, alone.inference_mode, alone.target_modules = None, True, set(layers)
    if "feedforward_modules" in settings:  # of IA³, a part of the targets
        inputs = {path for path, layer in layers.items() if vars(layer).get("is_feedforward")}
        vars(alone)["feedforward_modules"] = inputs
    return name, alone


def save(backbone: PreTrainedModel, name: str, config: "PeftConfig", folder: Path) -> None:
    """Write the adapter that `sole_adapter` returns, as PEFT does for a model without a head."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(backbone, adapter_name=name)
    save_file(
        {f"{published.PREFIX}{key}": weight.contiguous() for key, weight in weights.items()},
        folder / published.ADAPTER_WEIGHTS[0],
    )
    config.save_pretrained(str(folder))


def load(folder: Path, source: str | Path | None, options: dict[str, Any]) -> PreTrainedModel:
    """Return a backbone with the adapter in a folder, which `save` wrote.

    Args:
        folder: With the adapter.
        source: Path or Hub id of the backbone; None for the one that the adapter names.
        options: For the backbone's from_pretrained.
    """
    places: dict[str, str] = {}
    if source is None:
        source, places = _named_model(folder / published.ADAPTER_CONFIG)
    backbone = published.refuse_adapted(load_backbone(source, {**options, **places}), source)
    adapted = published.load_adapter(backbone, folder, source, keep_half=True)
    return cast(PreTrainedModel, adapted.get_base_model())


def load_complete(
    auto_class: Any, path: str | Path, noun: str, options: Mapping[str, Any]
) -> PreTrainedModel:
    """Load a model with all its weights, a checkpoint of its own or an adapter for a backbone.

    The adapter must bring what the backbone lacks, the head: none is made up.

    Args:
        auto_class: Auto class of the model.
        path: Local folder or Hub id.
        noun: Name of what is loaded, for messages.
        options: For transformers' from_pretrained.

    Raises:
        OSError: If it is not there.
        ValueError: If weights are damaged or missing.
    """
    path = existing(path, noun)
    places = {name: options[name] for name in PLACE_OPTIONS if name in options}
    file = find_adapter_config_file(path, **places)
    if file is None or (Path(path) / published.MODEL_CONFIG).is_file():
        return loading.load_complete(auto_class, path, noun, options)
    from peft import load_peft_weights

    weights = load_peft_weights(path, device="cpu", **places)
    source, place = _named_model(Path(file))
    brought = {name.removeprefix(published.PREFIX): weight for name, weight in weights.items()}
    # of a head of several layers, the last gives fewest numbers
    heads = [len(weight) for name, weight in brought.items() if name.startswith(HEADS)]
    labels = {"num_labels": min(heads)} if heads else {}
    own = ("revision", "subfolder")  # of the adapter
    further = {name: value for name, value in options.items() if name not in own}
    model = loading.load_complete(auto_class, source, noun, {**labels, **further, **place}, brought)
    adapted = published.load_adapter(model, path, source, **places)
    return cast(PreTrainedModel, adapted.get_base_model())


def _named_model(file: Path) -> tuple[str, dict[str, str]]:
    """Return path or Hub id of the model that an adapter's config names, and its revision."""
    named, revision = published.backbone_of_adapter(file)
    if not named:
        raise ValueError(
            f"base_model_name_or_path in {file} must be the path or Hub id of the model that the "
            f"adapter was trained on, got {named!r}"
        )
    return named, published.revision_option(revision)
