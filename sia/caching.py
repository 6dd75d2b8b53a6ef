"""Cache layers for transformers models that write in place instead of concatenating at every step.

`growing_cache` stands in for transformers' DynamicCache in the decoding loop: rows may leave it, beams may not be reordered.
`PrefixStore` lets some rows of a batch, each with a prefix of its own length, take part in a forward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs. Weights that accelerate offloads lie on "meta", and its hooks move what comes in."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


class GrowingLayer(DynamicLayer):
    """A DynamicLayer with room ahead: an update writes into a buffer that doubles when it is full."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [_buffer(states, max(self.capacity, end)) for states in (key_states, value_states)]
        elif end > self._buffers[0].shape[-2] or len(key_states) != len(self._buffers[0]):
            old = (self.keys, self.values)
            self._buffers = [_buffer(states, max(self.capacity, 2 * end)) for states in (key_states, value_states)]
            for buffer, states in zip(self._buffers, old, strict=True):
                buffer[:, :, :start] = states
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        start = self.get_seq_length()
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, :start] for buffer in self._buffers)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))


def growing_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """An empty cache for this model with room for `capacity` tokens; layers with a sliding window stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class StoreLayer(DynamicLayer):
    """Keys and values of every row's prefix, `(rows, heads, capacity, size)`; an update serves the selected rows only."""

    def __init__(self, store: PrefixStore) -> None:
        super().__init__()
        self.store = store

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        store, start = self.store, self.store.prefix
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._room(key_states, store.capacity), self._room(value_states, store.capacity)
        if end > self.keys.shape[2]:
            self.keys, self.values = self._grown(self.keys, 2 * end), self._grown(self.values, 2 * end)
        rows = slice(None) if len(store.rows) == store.count else store.rows  # a slice of all rows copies nothing
        self.keys[rows, :, start:end] = key_states
        self.values[rows, :, start:end] = value_states
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    def _grown(self, states: Tensor, capacity: int) -> Tensor:
        room = self._room(states, capacity)
        room[:, :, : states.shape[2]] = states
        return room

    def _room(self, states: Tensor, capacity: int) -> Tensor:
        # zeros: what is masked must still be finite
        return states.new_zeros(self.store.count, states.shape[1], capacity, states.shape[3])

    def get_seq_length(self) -> int:
        return self.store.prefix

    def copy_rows(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        for states in (self.keys, self.values):
            states[targets, :, :columns] = states[sources, :, :columns]

    def move(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        for states in (self.keys, self.values):
            states[rows, :, target] = states[rows, :, source]


class PrefixStore(DynamicCache):
    """Prefixes of different lengths, all from column 0 on, of which some rows at a time take part in a forward pass.

    select → forward pass with this cache → keep. The forward pass writes its columns behind the longest selected
    prefix; `keep` moves those that are to stay to the end of their own row's prefix.
    """

    def __init__(self, count: int, capacity: int, layers: int) -> None:
        super().__init__()
        self.count, self.capacity = count, capacity
        self.layers = [StoreLayer(self) for _ in range(layers)]

    def select(self, rows: Tensor, prefix: int) -> Cache:
        """The next forward pass is of these rows, sorted, after the first `prefix` columns."""
        self.rows, self.prefix = rows, prefix
        return self

    def keep(self, targets: Tensor, keep: Tensor) -> None:
        """Column j of the forward pass becomes column `targets[:, j]` where `keep[:, j]`; both `(selected rows, columns)`."""
        if len(targets) == 1:
            return  # its prefix is the longest: everything lies where it is to stay
        row, column = keep.nonzero(as_tuple=True)
        source, target = self.prefix + column, targets[row, column]
        moved = source != target
        row, source, target = row[moved], source[moved], target[moved]
        if len(row):
            for layer in self.layers:
                layer.move(self.rows[row], source, target)

    def copy_rows(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """The first columns of rows `targets` become those of rows `sources`, both `(n,)`."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.copy_rows(sources, targets, columns)


def _buffer(states: Tensor, capacity: int) -> Tensor:
    return states.new_empty(*states.shape[:2], capacity, states.shape[-1])
