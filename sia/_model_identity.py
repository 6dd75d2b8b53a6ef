"""The identity of a language model, kept with what was fitted to its hidden states."""

import math
import sys
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from sia._kv_cache import input_device
from sia._numbers import as_number
from sia._offloading import few_entries

TOLERANCE = 0.02  # relative; bfloat16 rounds weights by at most 0.004


@dataclass(frozen=True)
class ModelIdentity:
    """A name for messages, and a few entries of each floating-point parameter.

    The entries tell apart models of one architecture, and survive another dtype, quantised linear
    layers, torch.compile and PEFT's wrapper. Adapters that are disabled or not active have none.

    Attributes:
        name: Path or Hub id.
        entries: Entries of each parameter, by its name; only the first if read from an older file.
    """

    name: str
    entries: dict[str, list[float]]

    @classmethod
    def from_settings(cls, name: str, entries: Any = None, first_entries: Any = None) -> Self:
        """Read what `asdict` gave of an identity.

        Args:
            name: Same as in the class.
            entries: Same as in the class.
            first_entries: What older files have instead: the first entry of each parameter.

        Raises:
            TypeError: If it is something else.
        """
        if isinstance(first_entries, dict):
            entries = {parameter: [entry] for parameter, entry in first_entries.items()}
        if not isinstance(entries, dict) or not all(map(_are_numbers, entries.values())):
            raise TypeError("entries must hold numbers by the names of parameters")
        return cls(name, {_unwrapped(parameter): few for parameter, few in entries.items()})

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Read the identity of a model."""
        device, idle = input_device(model), _idle_adapters(model)
        entries = {
            _unwrapped(name): few.to(device)
            for name, parameter in model.named_parameters()
            if parameter not in idle and (few := few_entries(model, name, parameter)) is not None
        }
        numbers = iter(torch.cat(list(entries.values())).tolist())  # one transfer from a GPU
        listed = {name: list(islice(numbers, len(few))) for name, few in entries.items()}
        return cls(str(model.name_or_path or ""), listed)

    def check(self, model: PreTrainedModel, fitted: str) -> None:
        """Check that a model is this one.

        Args:
            model: The language model to steer.
            fitted: Name of what was fitted, for the message.

        Raises:
            ValueError: If the model is another one, or has further parameters such as adapters, or
                lacks some that are not quantised.
        """
        other = ModelIdentity.of(model)
        missing = {name.rpartition(".")[0] for name in self.entries.keys() - other.entries.keys()}
        if not missing <= _quantised_layers(model):
            raise self._refusal(other, fitted)
        self.check_identity(other, fitted)

    def check_identity(self, other: "ModelIdentity", fitted: str) -> None:
        """Check what an identity has of this one; arguments and errors as of `check`."""
        shared = self.entries.keys() & other.entries.keys()
        same = bool(shared) and other.entries.keys() <= self.entries.keys()
        same = same and all(
            math.isclose(own, entry, rel_tol=TOLERANCE, abs_tol=1e-6)
            for name in shared
            for own, entry in zip(self.entries[name], other.entries[name], strict=False)
        )
        if not same:
            raise self._refusal(other, fitted)

    def _refusal(self, other: "ModelIdentity", fitted: str) -> ValueError:
        fitted_to = self.name or "the model it was fitted to"
        return ValueError(
            f"this {fitted} reads the hidden states of {fitted_to}, got "
            f"{other.name or 'a model'} with other weights: fit one to this model"
        )


def _unwrapped(name: str) -> str:
    """Return the name of a parameter in the model that torch.compile and PEFT wrap."""
    return name.replace("_orig_mod.", "").removeprefix("base_model.model.")


def _idle_adapters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of PEFT's adapters that are disabled or not active."""
    if "peft" not in sys.modules:  # takes seconds to import
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {
        parameter
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for adapters in layer.children()
        if isinstance(adapters, nn.ModuleDict | nn.ParameterDict)
        for name, parameter in adapters.named_parameters()
        if layer.disable_adapters or name.partition(".")[0] not in layer.active_adapters
    }


def _quantised_layers(model: nn.Module) -> set[str]:
    """Return the names of layers with packed weights, or with any that are no floating-point."""
    names = set()
    for name, layer in model.named_modules():
        weights = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if is_packed(layer) or not all(weight.is_floating_point() for weight in weights):
            names.add(_unwrapped(f"{name}.").removesuffix("."))
    return names


def is_packed(layer: nn.Module) -> bool:
    """Return whether torch has quantised a layer: its weights are packed and no parameters."""
    weights = (*layer.parameters(), *layer.buffers())  # adapters have some, and a layer within
    return not weights and {"in_features", "out_features"} <= vars(layer).keys()


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and not any(math.isnan(as_number(v)) for v in values)
