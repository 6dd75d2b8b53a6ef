"""What decoding costs, counted and not guessed: forward passes, token positions and FLOPs through each model.

A multiplication and an addition are two FLOPs. Counted are the matrix products: the linear layers, queries × keys and
weights × values over the keys that a token may see, and the head that reads the result. Norms, rotations and softmax, below a
few percent in any model worth steering, are not; of a mixture of experts only the dense layers are. For the linear layers this is the
usual 2·N a token (Kaplan et al., "Scaling laws for neural language models", 2020, table 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Cost:
    """Forward passes that one response needed, the token positions computed for it, and their FLOPs.

    model_*: of the language model. value_*: of whatever gives values to candidates or responses: value model, reward model,
    rollouts. junctions: steps at which the gate was open. Padding, and steps on which an ended row waits for others to leave
    the batch with it, are not counted. What several samples of a prompt share is counted for the first of them.
    """

    model_forwards: int = 0
    model_tokens: int = 0
    value_forwards: int = 0
    value_tokens: int = 0
    junctions: int = 0
    model_flops: float = 0.0
    value_flops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Architecture:
    """FLOPs of one model. linear: per token; head: per position whose output is read; attention: per token and key
    that it sees, by the window that limits the keys (None: all before it).
    """

    linear: int
    head: int
    attention: tuple[tuple[int | None, int], ...]

    @classmethod
    def of(cls, backbone: PreTrainedModel, head: Tensor) -> Architecture:
        """backbone: without its head. head: the weight that reads the output, `(outputs, hidden)`."""
        config = backbone.config.get_text_config()
        linear = sum(
            m.weight.numel() for m in backbone.modules() if isinstance(m, (nn.Linear, Conv1D))
        )
        size = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        layers = Counter(attention_windows(backbone))
        per_layer = 4 * config.num_attention_heads * size  # two products of 2 FLOPs each
        return cls(
            2 * linear,
            2 * head.numel(),
            tuple((window, per_layer * count) for window, count in layers.items()),
        )


def attention_windows(model: PreTrainedModel) -> list[int | None]:
    """How many keys a query sees at most in each layer that keeps a cache, None for all.

    Errors: ValueError for layers that keep something else than keys and values (linear attention, state spaces).
    """
    windows: list[int | None] = []
    for layer in DynamicCache(config=model.config).layers:
        kind = type(layer).__name__
        if kind not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            raise ValueError(
                f"prefixes can be cached in layers of full or sliding-window attention only, {type(model).__name__} has {kind}"
            )
        windows.append(layer.sliding_window if layer.is_sliding else None)
    return windows


class Meter:
    """Counts for each row of a batch what one model computes. What is counted is noted first and added up when it is read."""

    def __init__(self, architecture: Architecture, rows: int, device: torch.device | str) -> None:
        self.architecture = architecture
        self._forwards, self._tokens = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._flops = torch.zeros(rows, dtype=torch.float64, device=device)
        self._stretches: list[tuple[Tensor, ...]] = []
        self._branches: list[tuple[Tensor, Tensor]] = []

    def count(
        self, rows: Tensor, forwards: Tensor, start: Tensor, end: Tensor, outputs: Tensor
    ) -> None:
        """These rows computed their tokens number `start` to `end` − 1, in so many forward passes, and read so many outputs; `(n,)`."""
        self._stretches.append((rows, forwards, start, end, outputs))

    def count_branches(self, rows: Tensor, contexts: Tensor) -> None:
        """These rows computed and read further positions in the same forward pass, which see `contexts` `(n, positions)` keys each."""
        self._branches.append((rows, contexts))

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Forward passes and tokens, int64, and FLOPs, float64, each `(rows,)`."""
        architecture = self.architecture
        if self._stretches:
            rows, forwards, start, end, outputs = (
                torch.cat(column) for column in zip(*self._stretches, strict=True)
            )
            flops = architecture.linear * (end - start) + architecture.head * outputs
            for window, per_key in architecture.attention:
                flops += per_key * (_keys_seen(end, window) - _keys_seen(start, window))
            self._forwards.index_add_(0, rows, forwards)
            self._tokens.index_add_(0, rows, end - start)
            self._flops.index_add_(0, rows, flops.double())
        for rows, contexts in self._branches:
            flops = (architecture.linear + architecture.head) * torch.full_like(
                rows, contexts.shape[1]
            )
            for window, per_key in architecture.attention:
                flops += per_key * (contexts if window is None else contexts.clamp(max=window)).sum(
                    1
                )
            self._tokens.index_add_(0, rows, torch.full_like(rows, contexts.shape[1]))
            self._flops.index_add_(0, rows, flops.double())
        self._stretches, self._branches = [], []
        return self._forwards, self._tokens, self._flops


def _keys_seen(tokens: Tensor, window: int | None) -> Tensor:
    """Σ over the first `tokens` positions of the keys that each sees, itself included: Σ min(i, window) for i = 1 … tokens."""
    short = tokens if window is None else tokens.clamp(max=window)
    return short * (short + 1) // 2 + (0 if window is None else (tokens - short) * window)


def costs(model: Meter, scorers: Iterable[Meter], junctions: Tensor) -> list[Cost]:
    """One `Cost` per row. junctions: `(rows,)`."""
    columns = [column.tolist() for column in model.totals()]
    value_columns = [torch.zeros(len(junctions), dtype=column.dtype) for column in model.totals()]
    for meter in scorers:
        value_columns = [
            sum_ + column.cpu() for sum_, column in zip(value_columns, meter.totals(), strict=True)
        ]
    rows = zip(
        *columns, *(column.tolist() for column in value_columns), junctions.tolist(), strict=True
    )
    return [
        Cost(f, t, vf, vt, opened, flops, value_flops)
        for f, t, flops, vf, vt, value_flops, opened in rows
    ]
