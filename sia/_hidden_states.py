"""Hidden states that a language model's output embeddings read; decoding computes them anyway."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sia._modes import uncompiled


@dataclass
class HiddenStates:
    """The input of the output embeddings in the latest forward pass, `(rows, length, hidden)`."""

    latest: Tensor | None = None

    def keep(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Keep the input; a forward pre-hook."""
        self.latest = inputs[0]

    @property
    def newest(self) -> Tensor:
        """Hidden states at the last position, `(rows, hidden)`."""
        assert self.latest is not None, "no forward pass has been observed"
        return self.latest[:, -1]


@contextmanager
def observe_hidden_states(model: PreTrainedModel, read: bool) -> Iterator[HiddenStates | None]:
    """Keep what the output embeddings read in every forward pass, if anything reads it.

    What is compiled runs uncompiled meanwhile.
    """
    if not read:
        yield None
        return
    states = HiddenStates()
    handle = model.get_output_embeddings().register_forward_pre_hook(states.keep)
    try:
        with uncompiled():
            yield states
    finally:
        handle.remove()
