"""What a candidate is worth: the interface that decoding needs, and value scoring with a cached prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from sia.caching import PrefixStore

if TYPE_CHECKING:
    from sia.values import ValueModel


class Session(Protocol):
    """Scores candidates along one batch of responses. Rows are numbered as the prompts were."""

    forwards: Tensor  # int64 (rows of the batch,): forward passes that each row took part in
    tokens: Tensor  # int64 (rows of the batch,): token positions computed for each row

    def append(self, rows: Tensor, tokens: Tensor) -> None:
        """These rows went on with these tokens, both `(n,)`."""

    def score(self, rows: Tensor, candidates: Tensor) -> Tensor:
        """Values float32 `(n, K)` of candidate tokens `(n, K)` as the next token of these rows `(n,)`."""


@runtime_checkable
class Scorer(Protocol):
    """Anything that can open a `Session` over prompts (token ids without padding)."""

    @property
    def vocabulary_size(self) -> int: ...

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Session: ...


class CachedValues:
    """Values of candidates from a `ValueModel` that keeps the keys and values of every prefix and may lag behind.

    One forward pass per call of `score`, whatever K and however far behind: for each asked row it computes the tokens
    not seen yet and, after them, the K candidates, all at the position of the next token; a mask lets each candidate
    see the prefix and itself. Then only the prefix is kept. Rows have prefixes of different lengths: all start at
    column 0 of the store, and the columns beyond a row's length are masked.
    """

    def __init__(self, value_model: ValueModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        device = value_model.device
        lengths = [len(prompt) for prompt in prompts]
        self.value_model = value_model
        self.capacity = max(lengths) + max_new_tokens
        self.history = torch.zeros(len(prompts), self.capacity, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            self.history[row, : len(prompt)] = torch.as_tensor(prompt, device=device)
        self.lengths = torch.tensor(lengths, device=device)  # tokens that belong to each row
        self.cached = torch.zeros_like(self.lengths)  # tokens of each row in the store
        self.store = PrefixStore(len(prompts), self.capacity, value_model.layer_count)
        self.forwards = torch.zeros_like(self.lengths)
        self.tokens = torch.zeros_like(self.lengths)

    def append(self, rows: Tensor, tokens: Tensor) -> None:
        rows, tokens = rows.to(self.history.device), tokens.to(self.history.device)
        self.history[rows, self.lengths[rows]] = tokens
        self.lengths[rows] += 1

    @torch.no_grad()
    def score(self, rows: Tensor, candidates: Tensor) -> Tensor:
        rows, candidates = rows.to(self.history.device), candidates.to(self.history.device)
        cached, lengths = self.cached[rows], self.lengths[rows]
        prefix, unseen = int(cached.max()), int((lengths - cached).max())
        ahead = torch.arange(unseen, device=rows.device)
        columns = cached[:, None] + ahead  # (n, unseen)
        fresh = columns < lengths[:, None]  # the others are padding
        columns = columns.clamp(max=self.capacity - 1)
        values = self.value_model(
            input_ids=torch.cat([self.history[rows[:, None], columns], candidates], dim=1),
            attention_mask=self._mask(cached, fresh, prefix, candidates.shape[1]),
            position_ids=torch.cat([columns, lengths[:, None].expand_as(candidates)], dim=1),
            past_key_values=self.store.select(rows, prefix),
        )
        self.store.keep(columns, fresh)
        self.cached[rows] = lengths
        self.forwards[rows] += 1
        self.tokens[rows] += lengths - cached + candidates.shape[1]
        return values[:, unseen:]

    def _mask(self, cached: Tensor, fresh: Tensor, prefix: int, candidates: int) -> Tensor:
        """What each query may see, as numbers to add to the attention scores: `(n, 1, unseen + K, prefix + unseen + K)`."""
        n, unseen = fresh.shape
        device = fresh.device
        seen = torch.zeros(n, unseen + candidates, prefix + unseen + candidates, dtype=torch.bool, device=device)
        seen[:, :, :prefix] = (torch.arange(prefix, device=device) < cached[:, None])[:, None]
        causal = torch.ones(unseen, unseen, dtype=torch.bool, device=device).tril()
        seen[:, :unseen, prefix : prefix + unseen] = causal
        seen[:, unseen:, prefix : prefix + unseen] = fresh[:, None]
        seen[:, unseen:, prefix + unseen :] = torch.eye(candidates, dtype=torch.bool, device=device)
        dtype = self.value_model.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
