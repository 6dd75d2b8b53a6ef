"""Responses in the cache of one causal model that may lag behind them, and what the model says of their continuations.

Continuations are branches after a shared prefix, all computed in one pass under one mask (tree attention, as in Miao et al., "SpecInfer:
Accelerating large language model serving with tree-based speculative inference and verification", 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sia._kv_cache import PrefixStore, check_positions, input_device
from sia.cost import Architecture, Meter, attention_windows

MASKED_ATTENTION = ("sdpa", "eager")  # the implementations that heed a prepared mask
VERIFIED_MODEL_TYPES = (
    "qwen3",
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
)  # model types of which the test suite shows it
PASS_OVERHEAD = 300  # about what a forward pass costs on a processor beside its tokens, in tokens
USUAL_BRANCHES = 16  # branch tokens that the store has room for from the start


class Forward(Protocol):
    """A forward pass whose output, `(n, last, …)`, is read at the last `last` positions."""

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask,
        position_ids: Tensor,
        past_key_values: Cache | None,
        last: int,
    ) -> Tensor: ...


def logits_forward(model: PreTrainedModel) -> Forward:
    """Return a forward pass of a language model whose output is its logits, float32."""

    def forward(*, last: int, past_key_values: Cache | None, **inputs: Any) -> Tensor:
        logits = model(
            **inputs,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            logits_to_keep=last,
        ).logits
        return logits[:, -last:].float()

    return forward


class CachedPrefixes:
    """A batch of prefixes (prompt and response so far), of which the model has computed as much as it was asked for.

    One forward pass per call, however far behind: for each asked row it computes the tokens not seen yet and, after them, its
    branches, that is further tokens which do not stay; a mask lets each see the prefix and its own ancestors. Rows
    have prefixes of different lengths: all start at column 0 of the store, and columns beyond a row's length are masked.

    prompts: token ids, each of `samples` rows in succession. head: weight that reads the output, for the count of FLOPs.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        forward: Forward,
        head: Tensor,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        check_attention(backbone)
        check_positions(backbone, max(len(prompt) for prompt in prompts) + max_new_tokens)
        if not supports_tree_attention(backbone, forward):
            raise ValueError(
                f"the attention of {type(backbone).__name__} does not follow prepared masks: its prefixes cannot be cached"
            )
        self.backbone, self.forward, self.samples = backbone, forward, samples
        self.windows = attention_windows(backbone)
        device = input_device(backbone)
        self.mask_values = torch.tensor(
            [0.0, torch.finfo(backbone.dtype).min], dtype=backbone.dtype, device=device
        )  # seen, not seen
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.capacity = int(lengths.max()) + max_new_tokens
        history = torch.zeros(len(prompts), self.capacity, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            history[row, : len(prompt)] = torch.as_tensor(prompt)
        self.history = history.to(device).repeat_interleave(samples, 0)
        self.prompt_lengths = lengths.to(device).repeat_interleave(samples)
        self.cached = torch.zeros_like(self.prompt_lengths)  # tokens of each row in the store
        self.begun = torch.zeros(
            len(prompts), dtype=torch.bool, device=device
        )  # prompts that their rows have in the store
        self.store = PrefixStore(
            len(self.cached), self.capacity + USUAL_BRANCHES, len(self.windows)
        )
        self.last_branches: tuple[Tensor, Tensor, int] | None = (
            None  # rows, whole lengths, first column of the branches
        )
        self.meter = Meter(Architecture.of(backbone, head), len(self.cached), device)

    def reorder(self, sources: Tensor) -> None:
        """Row i goes on from where row `sources[i]` stands; `(rows,)`."""
        sources = sources.to(self.cached.device)
        targets = (
            (sources != torch.arange(len(sources), device=sources.device)).nonzero().squeeze(1)
        )
        self.store.copy_rows(sources[targets], targets, int(self.cached.max()))
        self.cached = self.cached[sources]

    def shorten(self, rows: Tensor, lengths: Tensor) -> None:
        """Of the responses of these rows no more than the first `lengths` `(n,)` tokens count as computed."""
        rows = rows.to(self.cached.device)
        self.cached[rows] = torch.minimum(
            self.cached[rows], self.prompt_lengths[rows] + lengths.to(rows.device)
        )

    def group_by_lag(self, rows: Tensor, lengths: Tensor, branches: int) -> list[Tensor]:
        """Places among `rows` `(n,)`, ascending, of those to compute together: one group, or several that lack about as many tokens.

        Rows of a forward pass are padded to the longest. On a processor a further pass can cost less than that; a GPU computes
        padding beside. lengths: of the responses `(n,)`. branches: how many branch tokens each row has.
        """
        if self.cached.device.type != "cpu":
            return [torch.arange(len(rows), device=self.cached.device)]
        lags = self.prompt_lengths[rows] + lengths - self.cached[rows]
        order = lags.argsort(stable=True)
        return [order[start:end].sort().values for start, end in _cheapest(lags[order] + branches)]

    def last(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        """The output at the last token of these rows, `(n, …)`. responses: their tokens `(n, t)`, of which `lengths` `(n,)` count."""
        rows, totals = self._remember(rows, responses, lengths)
        self._share_prompts(rows)
        self.cached[rows] = torch.minimum(
            self.cached[rows], totals - 1
        )  # to read a token it must be computed
        unseen = totals - self.cached[rows]
        outputs = self._catch_up(rows, totals, last=int(unseen.max()), outputs=1)
        return outputs[torch.arange(len(rows), device=rows.device), unseen - 1]

    def branch(
        self,
        rows: Tensor,
        responses: Tensor,
        lengths: Tensor,
        tokens: Tensor,
        depths: Tensor,
        sees: Tensor,
    ) -> Tensor:
        """The output at every branch token, `(n, B, …)`.

        rows: `(n,)`, ascending; responses: their tokens `(n, t)`, of which `lengths` `(n,)` count. tokens: `(n, B)`; depths: how far each
        stands behind the prefix, `(B,)`, 0 for the next token; sees: which branch tokens each sees, itself included, bool `(B, B)`.
        """
        rows, totals = self._remember(rows, responses, lengths)
        self._share_prompts(rows)
        outputs = self._catch_up(
            rows, totals, last=tokens.shape[1], branches=(tokens, totals[:, None] + depths, sees)
        )
        self.meter.count_branches(rows, totals[:, None] + sees.sum(1))
        return outputs

    def grow(self, tokens: Tensor, depth: int) -> Tensor:
        """The output one token further along each of the branches of the last `branch` call, which had one token each.

        tokens: `(n, K)`, number `depth` ≥ 1 of each branch. Their columns stand behind those of the branches, until the next
        call of `branch` or `last` writes over them.
        """
        rows, totals, start = self.last_branches
        count, end = tokens.shape[1], start + tokens.shape[1] * depth
        own = torch.eye(count, dtype=torch.bool, device=rows.device).repeat(
            1, depth + 1
        )  # (K, K·(depth + 1))
        column = torch.arange(start, device=rows.device)
        seen = torch.cat(
            [
                (column < totals[:, None])[:, None].expand(-1, count, -1),
                own.expand(len(rows), -1, -1),
            ],
            dim=2,
        )
        positions = (totals + depth)[:, None].expand_as(tokens)
        branch_positions = (
            torch.arange(depth + 1, device=rows.device).repeat_interleave(count) + totals[:, None]
        )
        keys = torch.cat([column.expand(len(rows), -1), branch_positions], dim=1)
        outputs = self.forward(
            input_ids=tokens,
            attention_mask=self._by_layer(seen, lambda: (positions, keys)),
            position_ids=positions,
            past_key_values=self.store.select(rows, end),
            last=count,
        )
        self._count(rows, totals, totals)
        self.meter.count_branches(rows, positions + 1)
        return outputs

    def _catch_up(
        self,
        rows: Tensor,
        totals: Tensor,
        last: int,
        outputs: int = 0,
        branches: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The forward pass: these rows compute what they lack of their first `totals` tokens, and their branches behind it.

        branches: tokens and positions, `(n, B)`, and which of them each sees `(B, B)`. outputs: how many are read of each row's own.
        """
        cached = self.cached[rows]
        prefix, unseen = int(cached.max()), int((totals - cached).max())
        columns = cached[:, None] + torch.arange(unseen, device=rows.device)
        fresh = columns < totals[:, None]  # the others are padding
        columns = columns.clamp(max=self.capacity - 1)
        tokens, positions, sees = branches or (
            columns[:, :0],
            columns[:, :0],
            fresh.new_zeros(0, 0),
        )
        queries = torch.cat([columns, positions], dim=1)
        output = self.forward(
            input_ids=torch.cat([self.history[rows[:, None], columns], tokens], dim=1),
            attention_mask=self._mask(cached, fresh, prefix, queries, sees),
            position_ids=queries,
            past_key_values=self.store.select(rows, prefix),
            last=last,
        )
        self.store.keep(columns, fresh)
        self._count(rows, cached, totals, outputs)
        self.cached[rows] = totals
        self.last_branches = (rows, totals, prefix + unseen)
        return output

    def _count(self, rows: Tensor, start: Tensor, end: Tensor, outputs: int = 0) -> None:
        self.meter.count(rows, torch.ones_like(rows), start, end, torch.full_like(rows, outputs))

    def _remember(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the responses behind their prompts. Returns rows and their whole lengths, on this model's device."""
        device = self.history.device
        rows, responses, lengths = rows.to(device), responses.to(device), lengths.to(device)
        prompts = self.prompt_lengths[rows]
        if responses.shape[1]:
            columns = prompts[:, None] + torch.arange(responses.shape[1], device=device)
            self.history[rows[:, None], columns] = responses
        return rows, prompts + lengths

    def _share_prompts(self, rows: Tensor) -> None:
        """Computes a prompt that several rows begin with once, but for its last token, and copies it to all of them."""
        if self.samples == 1 or bool(self.begun[rows // self.samples].all()):
            return
        prompts = torch.unique(rows // self.samples)
        prompts = prompts[~self.begun[prompts]]
        self.begun[prompts] = True
        first = prompts * self.samples
        siblings = first[:, None] + torch.arange(self.samples, device=rows.device)
        totals = self.prompt_lengths[first] - 1
        if int(totals.max()) > 0:
            self._catch_up(first, totals, last=1)
            self.store.copy_rows(
                first.repeat_interleave(self.samples - 1),
                siblings[:, 1:].flatten(),
                int(totals.max()),
            )
        self.cached[siblings] = totals[:, None]

    def _mask(
        self, cached: Tensor, fresh: Tensor, prefix: int, queries: Tensor, sees: Tensor
    ) -> Tensor | dict[str, Tensor]:
        """What each query may see. queries: positions `(n, unseen + B)` of unseen tokens, then branches; keys: prefix, then the same."""
        (n, unseen), device = fresh.shape, fresh.device
        seen = torch.zeros(
            n, queries.shape[1], prefix + queries.shape[1], dtype=torch.bool, device=device
        )
        seen[:, :, :prefix] = (torch.arange(prefix, device=device) < cached[:, None])[:, None]
        seen[:, :unseen, prefix : prefix + unseen] = torch.ones(
            unseen, unseen, dtype=torch.bool, device=device
        ).tril_()
        seen[:, unseen:, prefix : prefix + unseen] = fresh[:, None]
        seen[:, unseen:, prefix + unseen :] = sees
        return self._by_layer(
            seen,
            lambda: (
                queries,
                torch.cat([torch.arange(prefix, device=device).expand(n, -1), queries], dim=1),
            ),
        )

    def _by_layer(
        self, seen: Tensor, places: Callable[[], tuple[Tensor, Tensor]]
    ) -> Tensor | dict[str, Tensor]:
        """`seen` `(n, queries, keys)` as numbers to add to the attention scores, `(n, 1, queries, keys)`; narrowed to the window of
        layers that have one, by their kind where a model has two. places: positions of queries and keys, `(n, queries)`, `(n, keys)`.
        """
        masks = {}
        for window in set(self.windows):
            allowed = seen
            if window is not None:
                queries, keys = places()
                allowed = seen & (queries[:, :, None] - keys[:, None] < window)
            mask = torch.where(allowed, *self.mask_values)[:, None]
            masks["full_attention" if window is None else "sliding_attention"] = mask
        return masks if len(masks) > 1 else mask


def _cheapest(tokens: Tensor) -> list[tuple[int, int]]:
    """Stretches of rows to compute in a forward pass each, split in two as long as that pays. tokens: of the rows, `(n,)`, ascending."""
    count = torch.arange(1, len(tokens))
    saved = (
        count * (tokens[-1] - tokens[:-1]) - PASS_OVERHEAD
    )  # of padding, by a split after so many rows
    if len(saved) == 0 or int(saved.max()) <= 0:
        return [(0, len(tokens))]
    middle = int(saved.argmax()) + 1
    return _cheapest(tokens[:middle]) + [
        (middle + start, middle + end) for start, end in _cheapest(tokens[middle:])
    ]


def check_attention(backbone: PreTrainedModel) -> None:
    """Errors: ValueError for an attention implementation that takes no prepared masks (flash, flex)."""
    implementation = backbone.config._attn_implementation
    if implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"scoring candidates needs attn_implementation {' or '.join(MASKED_ATTENTION)}, got {implementation}"
        )


_checked: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def supports_tree_attention(backbone: PreTrainedModel, forward: Forward) -> bool:
    """Whether branches of a short prefix get what each gets as a sequence of its own; tried out once with each backbone of a
    type that the test suite does not cover.

    Not so in models whose attention does not follow a prepared mask and positions (ALiBi, some that attend locally), however
    they go wrong.
    """
    if backbone.config.model_type in VERIFIED_MODEL_TYPES:
        return True
    if backbone not in _checked:
        device, vocabulary = input_device(backbone), backbone.config.get_text_config().vocab_size
        prefix, branches = (
            [i % vocabulary for i in (1, 2, 3)],
            [i % vocabulary for i in range(4, 12)],
        )
        whole = torch.tensor([[*prefix, branch] for branch in branches], device=device)
        positions = torch.arange(4, device=device).expand(len(branches), -1)
        sees = torch.eye(11, dtype=torch.bool, device=device)
        sees[:, :3] = torch.ones(11, 3, dtype=torch.bool, device=device).tril()
        numbers = torch.finfo(backbone.dtype)
        mask = torch.zeros(11, 11, dtype=backbone.dtype, device=device).masked_fill_(
            ~sees, numbers.min
        )
        try:
            expected = forward(
                input_ids=whole,
                attention_mask=None,
                position_ids=positions,
                past_key_values=None,
                last=1,
            )[:, 0]
            tokens = torch.tensor([[*prefix, *branches]], device=device)
            places = torch.tensor([[0, 1, 2, *[3] * len(branches)]], device=device)
            found = forward(
                input_ids=tokens,
                attention_mask=mask[None, None],
                position_ids=places,
                past_key_values=None,
                last=8,
            )[0]
            if not bool(expected.any()):
                return True  # a head of zeros, from which nothing can be told
            tolerance = max(1e-3, 8 * numbers.eps)  # of rounding in this dtype
            _checked[backbone] = bool(
                (found - expected).abs().max() <= tolerance * expected.abs().max()
            )
        except Exception:  # other people's models fail in ways of their own
            _checked[backbone] = False
    return _checked[backbone]
