"""Cache layers for transformers models that write in place instead of concatenating at every step.

`preallocated_cache` stands in for transformers' DynamicCache in the decoding loop: rows may leave it, beams may not be reordered.
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


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Errors: ValueError if so many tokens are more than a table of learned positions holds (rotary models have none)."""
    config = model.config.get_text_config().to_dict()
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if "rope_parameters" not in config and positions is not None and tokens > positions:
        raise ValueError(
            f"prompt and response must fit into the {positions} positions of {type(model).__name__}, they may take {tokens}"
        )


class PreallocatedLayer(DynamicLayer):
    """A DynamicLayer with room ahead: an update writes into a buffer that doubles when it is full."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        start, count = self.length, key_states.shape[2]
        self.length += count
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_buffer, self.value_buffer = (
                _buffer(x, max(self.capacity, count)) for x in (key_states, value_states)
            )
        elif self.length > self.key_buffer.shape[2]:
            self.key_buffer, self.value_buffer = (
                _grown(x, 2 * self.length, start) for x in (self.key_buffer, self.value_buffer)
            )
        # this runs in every layer at every step: narrow is the cheapest way to a slice
        self.key_buffer.narrow(2, start, count).copy_(key_states)
        self.value_buffer.narrow(2, start, count).copy_(value_states)
        self.keys, self.values = (
            self.key_buffer.narrow(2, 0, self.length),
            self.value_buffer.narrow(2, 0, self.length),
        )
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        self.key_buffer, self.value_buffer = self.key_buffer[indices], self.value_buffer[indices]
        self.keys, self.values = (
            self.key_buffer.narrow(2, 0, self.length),
            self.value_buffer.narrow(2, 0, self.length),
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(
            torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats)
        )


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """An empty cache for this model with room for `capacity` tokens; layers with a sliding window stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class StoreLayer(DynamicLayer):
    """Keys and values of every row's prefix, `(rows, heads, capacity, size)`; an update serves the selected rows only."""

    def __init__(self, store: PrefixStore) -> None:
        super().__init__()
        self.store = store

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        store, start, count = self.store, self.store.prefix, key_states.shape[2]
        end = start + count
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (
                self._room(key_states, store.capacity),
                self._room(value_states, store.capacity),
            )
        if end > self.keys.shape[2]:
            self.keys, self.values = (
                _grown(x, end + end // 8, x.shape[2]) for x in (self.keys, self.values)
            )
        if len(store.rows) == store.count:  # all rows: nothing is copied
            self.keys.narrow(2, start, count).copy_(key_states)
            self.values.narrow(2, start, count).copy_(value_states)
            return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        self.keys[store.rows, :, start:end] = key_states
        self.values[store.rows, :, start:end] = value_states
        return self.keys[store.rows, :, :end], self.values[store.rows, :, :end]

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
    return states.new_empty(*states.shape[:2], capacity, states.shape[3])


def _grown(buffer: Tensor, capacity: int, filled: int) -> Tensor:
    """A larger buffer with the first `filled` columns of this one; the others are 0, for what is masked must still be finite."""
    room = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
    room[:, :, :filled] = buffer[:, :, :filled]
    return room
