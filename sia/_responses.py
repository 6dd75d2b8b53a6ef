"""The record that decoding keeps of each response, token by token."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sia.cost import Cost
from sia.generation import Generation
from sia.signals import Signal


@dataclass
class Responses:
    """Columns `(rows, max_new_tokens)` as in `Generation`; the first `lengths` entries count.

    Attributes:
        lengths: Number of tokens of each row, `(rows,)`.
        finished: Whether a stop token ended the row, `(rows,)`.
    """

    tokens: Tensor
    entropy: Tensor
    steered: Tensor
    base_token: Tensor
    kl: Tensor
    signals: dict[Signal, Tensor]
    lengths: Tensor
    finished: Tensor

    @classmethod
    def empty(
        cls, rows: int, max_new_tokens: int, signals: Iterable[Signal], device: torch.device
    ) -> Self:
        """Allocate the record of `rows` responses."""

        def blank(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        return cls(
            tokens=blank(torch.int64, max_new_tokens),
            entropy=blank(torch.float32, max_new_tokens),
            steered=blank(torch.bool, max_new_tokens),
            base_token=blank(torch.int64, max_new_tokens),
            kl=blank(torch.float32, max_new_tokens),
            signals={signal: blank(torch.float32, max_new_tokens) for signal in signals},
            lengths=blank(torch.int64),
            finished=blank(torch.bool),
        )

    def reorder(self, sources: Tensor) -> None:
        """Make row i a copy of row `sources[i]`."""
        for name, column in vars(self).items():
            if name != "signals":
                setattr(self, name, column[sources])
        self.signals = {signal: column[sources] for signal, column in self.signals.items()}

    def sequences(self, input_ids: Tensor, pad_token_id: int) -> Tensor:
        """Return prompts and responses, padded on the right: `(rows, length)`."""
        length = int(self.lengths.max())
        beyond = torch.arange(length, device=self.tokens.device) >= self.lengths[:, None]
        tokens = self.tokens[:, :length].masked_fill(beyond, pad_token_id)
        return torch.cat([input_ids, tokens], dim=1)

    def generations(
        self, tokenizer: PreTrainedTokenizerBase | None, rows: Iterable[int], costs: Sequence[Cost]
    ) -> list[Generation]:
        """Build the `Generation` of each of these rows; `costs` is indexed by row number."""
        names = ("entropy", "steered", "base_token", "kl")
        columns = {"token_ids": self.tokens} | {name: vars(self)[name] for name in names}
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}
        signals = {signal: column.cpu().numpy() for signal, column in self.signals.items()}
        lengths, finished = self.lengths.tolist(), self.finished.tolist()
        generations = []
        for row in rows:
            written = slice(lengths[row])
            fields: dict[str, Any] = {
                name: array[row, written].copy() for name, array in arrays.items()
            }
            text = None
            if tokenizer is not None:
                text = str(tokenizer.decode(fields["token_ids"], skip_special_tokens=True))
            generation = Generation(
                text=text,
                finished=finished[row],
                cost=costs[row],
                signals={signal: array[row, written].copy() for signal, array in signals.items()},
                **fields,
            )
            generations.append(generation)
        return generations
