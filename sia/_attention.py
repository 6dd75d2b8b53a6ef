"""The attention signal, read from the language model while it decodes.

The signal says how far back the newest token looks: its attention, averaged over layers and heads,
position 0 left out, each weight multiplied by min(distance, 10), summed. Only this one row of every
attention matrix is computed, beside the model's usual attention, and only while a gate or a caller
asks for it. It is the signal of the paper's attention gate (Hu et al., arXiv 2602.21215).
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sia._modes import uncompiled
from sia.signals import Attention, Signal

MAX_DISTANCE = 10  # larger distances count as this one
# by implementation of transformers: the one that stands in for it while it is observed
OBSERVED = {"sdpa": "sia-observed-sdpa", "eager": "sia-observed-eager"}


class Observer:
    """Collects the newest rows of attention in a forward pass and computes the signals from them.

    Attributes:
        requested: The signals to compute.
        rows: Attention of the newest position by layer, `(batch, heads, keys)` each.
    """

    def __init__(self, requested: Sequence[Attention]) -> None:
        self.requested = requested
        self.rows: dict[int, Tensor] = {}

    def needs(self, layer: int) -> bool:
        return any(signal.layers is None or layer in signal.layers for signal in self.requested)

    def signals(self, newest: Tensor) -> dict[Signal, Tensor]:
        """Return the signals of the last forward pass, float32 `(rows,)`.

        Args:
            newest: Position of the newest token in each row, `(rows,)`.
        """
        if not self.rows:
            raise ValueError(
                "attention gates need a model whose layers use transformers' attention functions, "
                "this one's do not"
            )
        rows, self.rows = self.rows, {}
        signals: dict[Signal, Tensor] = {}
        for signal in self.requested:
            layers = sorted(rows) if signal.layers is None else signal.layers
            if idle := sorted(set(layers) - rows.keys()):
                raise ValueError(f"layers {idle} of the attention signal do not run on text alone")
            reach = [_reach(rows[layer], signal.heads, newest) for layer in layers]
            signals[signal] = torch.stack(reach).mean(0)
        return signals


def _reach(weights: Tensor, heads: tuple[int, ...] | None, newest: Tensor) -> Tensor:
    """Return the attention of one layer weighted by distance, `(rows,)`."""
    averaged = (weights if heads is None else weights[:, list(heads)]).mean(1)
    # keys end at the newest position; with a sliding window they begin later than position 0
    distance = torch.arange(averaged.shape[1] - 1, -1, -1, device=weights.device)
    # position 0 is left out, and so is the padding before it
    counted = distance < newest[:, None].to(weights.device)
    return (averaged * distance.clamp(max=MAX_DISTANCE) * counted).sum(1).to(newest.device)


_observer: ContextVar[Observer] = ContextVar("observer of the decoding that runs in this context")


@lru_cache
def _usual_attention(module_class: type[Any], implementation: str) -> Callable[..., Any]:
    """Return the function that transformers would have called for this class of module."""
    if implementation != OBSERVED["eager"]:
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
    for parent in module_class.__mro__:  # every modelling file of transformers brings its own
        if function := vars(sys.modules[parent.__module__]).get("eager_attention_forward"):
            return function
    raise ValueError(
        f"attention gates cannot look into {module_class.__name__} with eager attention: "
        "load the model with sdpa"
    )


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as transformers does, and show its newest row to the observer."""
    attend = _usual_attention(module.__class__, module.config._attn_implementation)
    output, weights = attend(module, query, key, value, attention_mask, **options)
    observer = _observer.get(None)  # none in another thread that decodes with the same model
    if observer is not None and observer.needs(module.layer_idx):
        observer.rows[module.layer_idx] = (
            _newest_row(query, key, attention_mask, options.get("scaling"))
            if weights is None
            else weights[:, :, -1].float()
        )
    return output, weights


for _implementation, _name in OBSERVED.items():
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_implementation])


@contextmanager
def observe_attention(
    model: PreTrainedModel, requested: Sequence[Attention]
) -> Iterator[Observer | None]:
    """Let an observer see the model's attention; without requested signals, do nothing.

    Raises:
        ValueError: For layers or heads that the model does not have, or an implementation of
            attention that hides its inputs.
    """
    if not requested:
        yield None
        return
    config = model.config.get_text_config()
    for signal in requested:
        for name, numbers, count in (
            ("layers", signal.layers, config.num_hidden_layers),
            ("heads", signal.heads, config.num_attention_heads),
        ):
            if numbers is not None and max(numbers) >= count:
                raise ValueError(
                    f"{name} of the attention signal must be below {count} for this model, "
                    f"got {max(numbers)}"
                )
    implementation = model.config._attn_implementation
    if implementation not in OBSERVED:
        raise ValueError(
            "attention gates need a model with attn_implementation sdpa or eager, "
            f"got {implementation}"
        )
    model.config._attn_implementation = OBSERVED[implementation]
    token = _observer.set(Observer(requested))
    try:
        with uncompiled():
            yield _observer.get()
    finally:
        _observer.reset(token)
        model.config._attn_implementation = implementation


def _newest_row(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Return the attention of the last query, float32 `(batch, heads, keys)`.

    Query heads share keys in groups.
    """
    batch, heads, _, size = query.shape
    groups = query[:, :, -1].view(batch, key.shape[1], heads // key.shape[1], size)
    scores = torch.matmul(groups, key.transpose(2, 3)).view(batch, heads, key.shape[2]).float()
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if mask is not None:
        row = mask[:, :, -1, : key.shape[2]]
        if row.dtype == torch.bool:
            return scores.masked_fill(~row, -torch.inf).softmax(-1)
        scores = scores + row
    return scores.softmax(-1)
