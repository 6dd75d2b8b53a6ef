"""Cache layers for transformers models that write in place instead of concatenating at every step.

`preallocated_cache` stands in for transformers' DynamicCache in the decoding loop: rows may leave
it, beams may not be reordered. `PrefixStore` lets some rows of a batch, each with a prefix of its
own length, take part in a forward pass.
"""

from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn import DataParallel
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

# model types whose first position is the one after the number of the padding token
AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
    "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where a model takes its inputs.

    Weights that accelerate offloads lie on "meta", and its hooks move what comes in.
    """
    return torch.device("cpu") if model.device.type == "meta" else model.device


def rounding_of(model: PreTrainedModel) -> float:
    """Return the eps of the dtype that a model computes in, which autocast changes."""
    kind = input_device(model).type
    mixed = torch.is_autocast_enabled(kind)
    return torch.finfo(torch.get_autocast_dtype(kind) if mixed else model.dtype).eps


def check_model(model: Any) -> None:
    """Check that this is a model of transformers, also one within PEFT's or torch.compile's.

    Raises:
        TypeError: If it is something else.
        ValueError: For adapters that lie outside the model (prompt and prefix tuning), and models
            that return tuples or whose tokens see later ones.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        wrapped = isinstance(model, DataParallel | DistributedDataParallel)
        raise TypeError(
            f"a model must be one of transformers, got {type(model).__name__}"
            + ": pass its .module" * wrapped
        )
    # when PEFT's generate is called, the model within has a method of the wrapper
    outer = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)
    kinds = [getattr(wrapper, "active_peft_config", None) for wrapper in (model, outer)]
    inner = dict(model.named_children()).get("_orig_mod", model)
    forwards = callable(getattr(model, "can_generate", None))  # as FSDP does, and TRL does not
    if not (isinstance(inner, PreTrainedModel) or any(kinds) or forwards):
        raise TypeError(
            f"a model must be one of transformers, got {type(model).__name__}: pass the model in it"
        )
    for kind in filter(None, kinds):
        if kind.is_prompt_learning:
            raise ValueError(
                "adapters must lie in the layers of the model, as LoRA's do, "
                f"got {type(kind).__name__}"
            )
    if vars(config.get_text_config()).get("use_bidirectional_attention") in (True, "all"):
        raise ValueError(
            f"cached prefixes need causal attention, {type(model).__name__} lets the tokens of a "
            "prompt see later ones (use_bidirectional_attention)"
        )
    if config.return_dict is False:
        raise ValueError(
            f"{type(model).__name__} must return outputs with names, as transformers' own generate "
            "needs them: expected config.return_dict=True, got False"
        )


def check_float64(model: PreTrainedModel) -> None:
    """Raise ValueError for a device without float64, in which tokens are sampled."""
    if model.device.type == "mps":
        raise ValueError(
            "tokens are sampled in float64, which Apple's MPS lacks: move the model to the CPU"
        )


def check_weights(model: PreTrainedModel) -> None:
    """Raise ValueError for a model on "meta" whose weights nothing brings from elsewhere."""
    if model.device.type == "meta" and not any("_hf_hook" in vars(m) for m in model.modules()):
        raise ValueError(
            f'{type(model).__name__} must have weights, they are on the device "meta": '
            "load it with from_pretrained, outside torch.device"
        )


def check_decoder(model: PreTrainedModel) -> None:
    """Check that a model is a decoder-only language model."""
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"steering needs a decoder-only language model, got {type(model).__name__}"
        )
    check_weights(model)


def narrows_logits(model: PreTrainedModel) -> bool:
    """Return whether a language model takes `logits_to_keep`, as older ones of the Hub do not."""
    return cast(Any, model)._supports_logits_to_keep()


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model without its head."""
    backbone = model.base_model
    if backbone is model and model.get_output_embeddings() is not None:
        # Llama 4 calls it otherwise than its class says
        decoder = model.get_decoder()
        if decoder is not model:
            return backbone_of(decoder)
        parts = (part for part in model.children() if isinstance(part, PreTrainedModel))
        backbone = next(parts, model)
    return cast(PreTrainedModel, backbone)


def position_count(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model has positions for; None where nothing limits them.

    Tables of learned positions do, and rotary frequencies that change with every token beyond.
    """
    settings = config.get_text_config().to_dict()
    learned = "rope_parameters" not in settings and settings.get("position_biased_input", True)
    count = settings.get("max_position_embeddings", settings.get("n_positions"))
    if count is None or not (learned or _is_dynamic(config)):
        return None
    return count - settings["pad_token_id"] - 1 if config.model_type in AFTER_PADDING else count


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Check that the positions of a model have room for this many tokens.

    Raises:
        ValueError: If there are more than `position_count`.
    """
    positions = position_count(model.config)
    if positions is None or tokens <= positions:
        return
    if _is_dynamic(model.config):
        raise ValueError(
            f'the rotary scaling "dynamic" of {type(model).__name__} changes with every token '
            f"beyond {positions}, which cached keys cannot follow: prompt and response may take "
            f"{positions} tokens, here they may take {tokens}"
        )
    raise ValueError(
        f"prompt and response must fit into the {positions} positions of "
        f"{type(model).__name__}, they may take {tokens}"
    )


def rotary_switch(model: PreTrainedModel, shortest: int, longest: int) -> int | None:
    """Return the length beyond which a model uses other rotary frequencies (longrope).

    Keys that were computed with the first frequencies do not fit the others, nor do rows on both
    sides into one forward pass, which uses those of its largest position.

    Args:
        model: The model.
        shortest: Smallest number of tokens in a forward pass.
        longest: Largest number. The result is None if the switch is not between the two.
    """
    for kind in _rotary_kinds(model.config):
        if kind.get("rope_type") == "longrope":
            switch = int(kind["original_max_position_embeddings"])
            return switch if shortest <= switch < longest else None
    return None


def _is_dynamic(config: PreTrainedConfig) -> bool:
    return any(kind.get("rope_type") == "dynamic" for kind in _rotary_kinds(config))


def _rotary_kinds(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the settings of rotary embeddings: one, or one by kind of layer, if any."""
    settings = config.get_text_config().to_dict().get("rope_parameters") or {}
    return [kind for kind in settings.values() if isinstance(kind, dict)] or [settings]


class PreallocatedLayer(DynamicLayer):
    """A DynamicLayer with room ahead: updates write into a buffer that doubles when it is full.

    Args:
        capacity: Number of tokens that the first buffer holds.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `(batch, heads, tokens, size)`; return all so far."""
        start, count = self.length, key_states.shape[2]
        self.length += count
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            capacity = max(self.capacity, count)
            self.key_buffer, self.value_buffer = (
                states.new_empty(*states.shape[:2], capacity, states.shape[3])
                for states in (key_states, value_states)
            )
        elif self.length > self.key_buffer.shape[2]:
            self.key_buffer = _grown(self.key_buffer, 2 * self.length, start)
            self.value_buffer = _grown(self.value_buffer, 2 * self.length, start)
        # this runs in every layer at every step: narrow is the cheapest way to a slice
        self.key_buffer.narrow(2, start, count).copy_(key_states)
        self.value_buffer.narrow(2, start, count).copy_(value_states)
        return self._show_filled()

    def _show_filled(self) -> tuple[Tensor, Tensor]:
        """Set and return the filled part of the buffers."""
        self.keys = self.key_buffer.narrow(2, 0, self.length)
        self.values = self.value_buffer.narrow(2, 0, self.length)
        return self.keys, self.values

    @override
    def get_seq_length(self) -> int:
        return self.length

    @override
    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.is_initialized:  # a layer that has not run has no buffers
            return
        self.key_buffer, self.value_buffer = self.key_buffer[indices], self.value_buffer[indices]
        self._show_filled()

    @override
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(len(self.key_buffer), device=self.key_buffer.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def check_extended(cache: Cache, model: PreTrainedModel, tokens: int | None = None) -> None:
    """Raise ValueError if the first forward pass left no keys in the cache, or not one per token.

    Args:
        cache: After the pass.
        model: The model.
        tokens: How many keys there must be; None for some.
    """
    layers = cast(list[DynamicLayer], cache.layers)  # `attention_windows` has looked at them
    extended = any(layer.is_initialized for layer in layers)
    if not extended or tokens not in (None, cache.get_seq_length()):
        raise ValueError(
            f"steering needs a model that extends transformers' caches, {type(model).__name__} "
            "does not"
        )


def preallocated_cache(config: PreTrainedConfig, capacity: int) -> DynamicCache:
    """Return an empty cache for a model with room for `capacity` tokens.

    Layers with a sliding window stay transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [
        PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache


class StoreLayer(DynamicLayer):
    """Keys and values of every row's prefix; an update serves the selected rows only.

    Attributes:
        keys: `(rows, heads, capacity, size)`, set by the first update; values are alike.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, store: "PrefixStore") -> None:
        super().__init__()
        self.store = store

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values of the selected rows after the prefix; return theirs so far."""
        store, start, count = self.store, self.store.prefix, key_states.shape[2]
        end = start + count
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            # zeros, for masked entries must still be finite
            self.keys, self.values = (
                states.new_zeros(store.count, states.shape[1], store.capacity, states.shape[3])
                for states in (key_states, value_states)
            )
        if end > self.keys.shape[2]:
            self.keys = _grown(self.keys, end + end // 8, self.keys.shape[2])
            self.values = _grown(self.values, end + end // 8, self.values.shape[2])
        if len(store.rows) == store.count:  # all rows: nothing is copied
            self.keys.narrow(2, start, count).copy_(key_states)
            self.values.narrow(2, start, count).copy_(value_states)
            return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        self.keys[store.rows, :, start:end] = key_states
        self.values[store.rows, :, start:end] = value_states
        return self.keys[store.rows, :, :end], self.values[store.rows, :, :end]

    @override
    def get_seq_length(self) -> int:
        return self.store.prefix


class PrefixStore(DynamicCache):
    """Prefixes of different lengths, all from column 0 on, for forward passes of some rows.

    select → forward pass with this cache → keep. The forward pass writes its columns after the
    longest selected prefix; `keep` moves those that are to stay to the end of their row's prefix.
    """

    def __init__(self, count: int, capacity: int, layers: int) -> None:
        super().__init__()
        self.count, self.capacity = count, capacity
        self.store_layers = [StoreLayer(self) for _ in range(layers)]
        self.layers = [*self.store_layers]

    def select(self, rows: Tensor, prefix: int) -> Self:
        """Make the next forward pass one of these rows, ascending, after `prefix` columns."""
        self.rows, self.prefix = rows, prefix
        return self

    def keep(self, targets: Tensor, keep: Tensor) -> None:
        """Move columns of the last forward pass to where they are to stay.

        Args:
            targets: Where each column is to lie, `(selected rows, columns)`.
            keep: Which columns stay, bool of the same shape.
        """
        if len(targets) == 1:
            return  # its prefix is the longest: everything lies where it is to stay
        row, column = keep.nonzero(as_tuple=True)
        source, target = self.prefix + column, targets[row, column]
        moved = source != target
        rows, source, target = self.rows[row[moved]], source[moved], target[moved]
        for states in self._states() if len(rows) else ():
            states[rows, :, target] = states[rows, :, source]

    def copy_rows(self, sources: Tensor, targets: Tensor, columns: int) -> None:
        """Copy the first columns of rows `sources` to rows `targets`, both `(n,)`."""
        for states in self._states():
            states[targets, :, :columns] = states[sources, :, :columns]

    def _states(self) -> list[Tensor]:
        layers = [layer for layer in self.store_layers if layer.is_initialized]
        return [states for layer in layers for states in (layer.keys, layer.values)]


def _grown(buffer: Tensor, capacity: int, filled: int) -> Tensor:
    """Return a larger buffer with the first `filled` columns of this one, zeros after them."""
    return pad(buffer[:, :, :filled], (0, 0, 0, capacity - filled))
