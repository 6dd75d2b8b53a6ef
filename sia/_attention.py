"""How far back the newest token looks, taken from the attention of the model while it decodes.

The signal of one step: attention of the newest position, averaged over layers and heads, position 0 left out, each weight
multiplied by min(distance, 10), summed. Only this one row of every attention matrix is computed, beside the model's usual
attention and only while somebody asks for the signal. It is the attention gate's of the paper (Hu et al., arXiv 2602.21215).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sia.signals import Attention, Signal

FARTHEST = 10  # distances are clipped here
OBSERVED = {
    "sdpa": "sia-observed-sdpa",
    "eager": "sia-observed-eager",
}  # what stands in for transformers' own attention


class Observer:
    """What `observe_attention` hands out: after each forward pass it reads the signals of the newest position."""

    def __init__(self, wanted: Sequence[Attention]) -> None:
        self.wanted = wanted
        self.rows: dict[
            int, Tensor
        ] = {}  # by layer: attention of the newest position, (batch, heads, keys)

    def signals(self, newest: Tensor) -> dict[Signal, Tensor]:
        """The signals float32 `(rows,)`. newest: the position of the newest token in each row `(rows,)`."""
        if not self.rows:
            raise ValueError(
                "attention gates need a model whose layers use transformers' attention functions, this one's do not"
            )
        signals: dict[Signal, Tensor] = {}
        for wanted in self.wanted:
            layers = sorted(self.rows) if wanted.layers is None else wanted.layers
            per_layer = []
            for layer in layers:
                weights = self.rows[layer]
                weights = (
                    weights if wanted.heads is None else weights[:, list(wanted.heads)]
                ).mean(1)
                # keys end at the newest position; in a layer with a sliding window they begin later than position 0
                distance = torch.arange(weights.shape[1] - 1, -1, -1, device=weights.device)
                counted = distance < newest[:, None].to(
                    weights.device
                )  # position 0 is left out, and padding before it
                per_layer.append(
                    (weights * distance.clamp(max=FARTHEST) * counted).sum(1).to(newest.device)
                )
            signals[wanted] = torch.stack(per_layer).mean(0)
        self.rows = {}
        return signals


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_observer: ContextVar[Observer] = ContextVar("observer of the decoding that runs in this context")


@lru_cache
def _usual_attention(module_class: type[nn.Module], implementation: str) -> AttentionFunction:
    """What transformers would have called for this class of attention module."""
    if implementation != OBSERVED["eager"]:
        return cast(AttentionFunction, ALL_ATTENTION_FUNCTIONS["sdpa"])
    for parent in module_class.__mro__:  # every modelling file of transformers brings its own
        function = vars(sys.modules[parent.__module__]).get("eager_attention_forward")
        if function is not None:
            return cast(AttentionFunction, function)
    raise ValueError(
        f"attention gates cannot look into {module_class.__name__} with eager attention: load the model with sdpa"
    )


def _attend(
    module: Any,  # an attention module of transformers
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers, which also keeps the newest row of the layers that are wanted."""
    output, weights = _usual_attention(module.__class__, module.config._attn_implementation)(
        module, query, key, value, attention_mask, **options
    )
    observer = _observer.get(None)  # none in another thread that decodes with the same model
    if observer and any(w.layers is None or module.layer_idx in w.layers for w in observer.wanted):
        newest = (
            _newest_row(query, key, attention_mask, options.get("scaling"))
            if weights is None
            else weights[:, :, -1].float()
        )
        observer.rows[module.layer_idx] = newest
    return output, weights


for _implementation, _name in OBSERVED.items():
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_implementation])


@contextmanager
def observe_attention(
    model: PreTrainedModel, wanted: Sequence[Attention]
) -> Iterator[Observer | None]:
    """While this lasts, the model's attention keeps what the `wanted` signals need. With nothing wanted it does nothing.

    Errors: ValueError for layers or heads that the model does not have, or an attention implementation that hides its inputs.
    """
    if not wanted:
        yield None
        return
    config = model.config.get_text_config()
    for attention in wanted:
        for name, chosen, count in (
            ("layers", attention.layers, config.num_hidden_layers),
            ("heads", attention.heads, config.num_attention_heads),
        ):
            if chosen is not None and max(chosen) >= count:
                raise ValueError(
                    f"{name} of the attention signal must be below {count} for this model, got {max(chosen)}"
                )
    implementation = model.config._attn_implementation
    if implementation not in OBSERVED:
        raise ValueError(
            f"attention gates need a model with attn_implementation sdpa or eager, got {implementation}"
        )
    model.config._attn_implementation = OBSERVED[implementation]
    token = _observer.set(Observer(wanted))
    try:
        yield _observer.get()
    finally:
        _observer.reset(token)
        model.config._attn_implementation = implementation


def _newest_row(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of the last query, `(batch, heads, keys)`, in float32. Query heads share keys in groups."""
    batch, heads, _, size = query.shape
    groups = query[:, :, -1].view(batch, key.shape[1], heads // key.shape[1], size)
    scores = torch.matmul(groups, key.transpose(2, 3)).view(batch, heads, key.shape[2]).float()
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if mask is not None:
        row = mask[:, :, -1, : key.shape[2]]
        scores = (
            scores.masked_fill(~row, float("-inf")) if row.dtype == torch.bool else scores + row
        )
    return scores.softmax(-1)
