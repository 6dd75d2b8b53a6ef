"""The identity of a language model, kept with what was fitted to its hidden states."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from sia._kv_cache import input_device
from sia._numbers import as_number
from sia._offloading import first_entry

TOLERANCE = 0.02  # relative; bfloat16 rounds weights by at most 0.004


@dataclass(frozen=True)
class ModelIdentity:
    """A name for messages, and the first entry of each floating-point parameter.

    The entries tell apart models of one architecture, and survive another dtype, quantised linear
    layers and torch.compile.

    Attributes:
        name: Path or Hub id.
        first_entries: First entry of each parameter, by its name.
    """

    name: str
    first_entries: dict[str, float]

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Read what `asdict` gave of an identity.

        Raises:
            TypeError: If it is something else.
        """
        identity = cls(**settings)
        entries = identity.first_entries
        if not isinstance(entries, dict) or not all(map(_is_number, entries.values())):
            raise TypeError("first_entries must hold numbers by the names of parameters")
        return identity

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Read the identity of a model."""
        device = input_device(model)
        entries = {
            name.replace("_orig_mod.", ""): entry.to(device)
            for name, parameter in model.named_parameters()
            if (entry := first_entry(model, name, parameter)) is not None
        }
        numbers = torch.stack(list(entries.values())).tolist()  # one transfer from a GPU
        return cls(str(model.name_or_path or ""), dict(zip(entries, numbers, strict=True)))

    def check(self, model: PreTrainedModel, fitted: str) -> None:
        """Check that a model is this one.

        Args:
            model: The language model to steer.
            fitted: Name of what was fitted, for the message.

        Raises:
            ValueError: If the model is another one, or has further parameters such as adapters.
        """
        self.check_identity(ModelIdentity.of(model), fitted)

    def check_identity(self, other: "ModelIdentity", fitted: str) -> None:
        """Check that an identity is this one; arguments and errors as of `check`."""
        shared = self.first_entries.keys() & other.first_entries.keys()
        same = bool(shared) and other.first_entries.keys() <= self.first_entries.keys()
        same = same and all(
            math.isclose(
                self.first_entries[name], other.first_entries[name], rel_tol=TOLERANCE, abs_tol=1e-6
            )
            for name in shared
        )
        if not same:
            fitted_to = self.name or "the model it was fitted to"
            raise ValueError(
                f"this {fitted} reads the hidden states of {fitted_to}, got "
                f"{other.name or 'a model'} with other weights: fit one to this model"
            )


def _is_number(value: Any) -> bool:
    return not math.isnan(as_number(value))
