"""Responses in the cache of one causal model that may lag behind them, and their continuations.

Continuations are branches after a shared prefix, all computed in one pass under one mask (tree
attention, as in Miao et al., "SpecInfer: Accelerating large language model serving with tree-based
speculative inference and verification", 2024).
"""

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from sia._inputs import pad_right
from sia._kv_cache import (
    PrefixStore,
    check_extended,
    check_positions,
    check_weights,
    input_device,
    narrows_logits,
    rotary_switch,
    rounding_of,
)
from sia._modes import evaluation_mode
from sia.cost import Architecture, Meter, attention_windows

MASKED_ATTENTION = ("sdpa", "eager")  # the implementations that heed a prepared mask
# model types for which the test suite shows that branches equal whole sequences
VERIFIED_MODEL_TYPES = ("qwen3", "llama", "mistral", "gemma2", "gemma3_text", "gpt2")
PASS_OVERHEAD = 300  # about what a forward pass costs on a processor beside its tokens, in tokens
WHOLE_BATCH = 64  # whole sequences that share a forward pass
USUAL_BRANCHES = 16  # branch tokens that the store has room for from the start

Mask = Tensor | dict[str, Tensor] | None


class Forward(Protocol):
    """A forward pass whose output, `(n, last, …)`, is read at the last `last` positions."""

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Mask,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        last: int,
    ) -> Tensor:
        """Run the model."""


def logits_forward(model: PreTrainedModel) -> Forward:
    """Return a forward pass that gives the logits at the last positions, float32 `(n, last, V)`."""
    narrows = narrows_logits(model)

    def forward(*, last: int, past_key_values: Cache | None, **inputs: Any) -> Tensor:
        if narrows:
            inputs["logits_to_keep"] = last
        logits = model(
            **inputs,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            return_dict=True,
        ).logits
        return logits[:, -last:].float()

    return forward


class CachedPrefixes:
    """A batch of prefixes (prompt and response so far), computed only as far as was needed.

    One forward pass per call, however far behind: for each row of the call it computes the tokens
    not seen yet and, after them, the row's branches, that is further tokens which do not stay; a
    mask lets each see the prefix and its own ancestors. Rows have prefixes of different lengths:
    all start at column 0 of the store, and columns beyond a row's length are masked.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: PreTrainedModel,
        forward: Forward,
        head: nn.Module,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
        *,
        branching: bool = True,
    ) -> None:
        """Start with prompts of which nothing has been computed.

        Args:
            model: Whatever `forward` runs through; each forward pass puts it into evaluation mode.
            backbone: The model without its head.
            forward: Forward pass through backbone and head.
            head: What reads the output, for the count of FLOPs.
            prompts: Token ids without padding.
            max_new_tokens: Longest continuation of a prompt, branches left out.
            samples: Rows per prompt, in succession.
            branching: Whether `branch` will be called; without, any implementation of attention
                will do (flash).

        Raises:
            ValueError: If the model's positions do not suffice, or it has other layers than of
                attention.
        """
        self.modules = list(model.modules())
        self.windows = attention_windows(backbone)
        check_weights(backbone)
        if branching:
            check_attention(backbone)
        self.takes_masks = backbone.config._attn_implementation in MASKED_ATTENTION
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths) + max_new_tokens
        check_positions(backbone, longest)
        layer_types = backbone.config.get_text_config().to_dict().get("layer_types")
        # whether each pass reads whole sequences
        self.uncached = (
            rotary_switch(backbone, min(lengths) - 1, longest + 1) is not None
            or not set(layer_types or ()) <= {"full_attention", "sliding_attention"}
            or not self._heeds_masks(backbone)
        )
        self.backbone, self.forward, self.samples = backbone, forward, samples
        device = input_device(backbone)
        # what is added to attention scores: of keys that are seen, of others
        self.mask_values = torch.tensor(
            [0.0, torch.finfo(backbone.dtype).min], dtype=backbone.dtype, device=device
        )
        prompt_ids, prompt_mask = pad_right(prompts, device)
        self.history = pad(prompt_ids, (0, max_new_tokens)).repeat_interleave(samples, 0)
        self.capacity = self.history.shape[1]
        self.prompt_lengths = prompt_mask.sum(1).repeat_interleave(samples)
        self.cached = torch.zeros_like(self.prompt_lengths)  # tokens of each row in the store
        # prompts that their rows have in the store
        self.begun = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        rows = len(self.cached)
        self.store = PrefixStore(rows, self.capacity + USUAL_BRANCHES, len(self.windows))
        # of the last pass: rows, their whole lengths, first column of their branches
        self.last_branches: tuple[Tensor, Tensor, int] | None = None
        self.last_tokens: list[Tensor] = []  # of those branches, `(n, K)` each, if read whole
        self.meter = Meter(Architecture.of(backbone, head), rows, device)

    def _heeds_masks(self, backbone: PreTrainedModel) -> bool:
        """Return whether rows with prefixes of different lengths get right outputs."""
        if self.takes_masks:
            return supports_tree_attention(backbone)
        return backbone.config.model_type in VERIFIED_MODEL_TYPES

    def reorder(self, sources: Tensor) -> None:
        """Let row i go on from where row `sources[i]` stands; `(rows,)`."""
        sources = sources.to(self.cached.device)
        changed = sources != torch.arange(len(sources), device=sources.device)
        targets = changed.nonzero().squeeze(1)
        self.store.copy_rows(sources[targets], targets, int(self.cached.max()))
        self.cached = self.cached[sources]

    def shorten(self, rows: Tensor, lengths: Tensor) -> None:
        """Count at most the first `lengths` `(n,)` response tokens of these rows as computed."""
        rows = rows.to(self.cached.device)
        totals = self.prompt_lengths[rows] + lengths.to(rows.device)
        self.cached[rows] = torch.minimum(self.cached[rows], totals)

    def group_by_lag(self, rows: Tensor, lengths: Tensor, branches: int) -> list[Tensor]:
        """Split rows into groups to compute together, each of which lacks about as many tokens.

        Rows of a forward pass are padded to the longest. On a processor a further pass can cost
        less than that; a GPU computes padding beside, and gets one group.

        Args:
            rows: Row numbers `(n,)`, ascending.
            lengths: Lengths of their responses, `(n,)`.
            branches: Number of branch tokens of each row.

        Returns:
            Indices into `rows`, ascending in each group.
        """
        if self.cached.device.type != "cpu":
            return [torch.arange(len(rows), device=self.cached.device)]
        lags = self.prompt_lengths[rows] + lengths - self.cached[rows]
        order = lags.argsort(stable=True)
        return [order[start:end].sort().values for start, end in _cheapest(lags[order] + branches)]

    def last(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        """Return the output at the last token of these rows, `(n, …)`.

        Args:
            rows: Row numbers `(n,)`, ascending.
            responses: Their tokens, `(n, t)`.
            lengths: How many of them count, `(n,)`.
        """
        rows, totals = self._remember(rows, responses, lengths)
        if self.uncached:
            return self._read_whole(
                rows, totals, torch.zeros(len(rows), 1, 0, device=rows.device)
            ).squeeze(1)
        # to read a token it must be computed
        self.cached[rows] = torch.minimum(self.cached[rows], totals - 1)
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
        """Return the output at every branch token, `(n, B, …)`.

        Args:
            rows: Row numbers `(n,)`, ascending.
            responses: Their tokens, `(n, t)`.
            lengths: How many of them count, `(n,)`.
            tokens: Branch tokens of each row, `(n, B)`.
            depths: Distance of each from the first token after the prefix, `(B,)`.
            sees: Which branch tokens each one sees, itself included, bool `(B, B)`.
        """
        rows, totals = self._remember(rows, responses, lengths)
        if self.uncached:
            self.last_branches, self.last_tokens = (rows, totals, 0), [tokens]
            return self._read_whole(rows, totals, [[row[seen] for seen in sees] for row in tokens])
        branches = (tokens, totals[:, None] + depths, sees)
        outputs = self._catch_up(rows, totals, last=tokens.shape[1], branches=branches)
        self.meter.count_branches(rows, totals[:, None] + sees.sum(1))
        return outputs

    def grow(self, tokens: Tensor, depth: int) -> Tensor:
        """Return the output one token further along each branch of the last `branch` call.

        Those branches had one token each. The columns of further tokens follow theirs, until
        the next call of `branch` or `last` writes over them.

        Args:
            tokens: One further token of each branch, `(n, K)`.
            depth: Its number in the branch, at least 1.

        Returns:
            Outputs `(n, K, …)`.
        """
        assert self.last_branches is not None, "grow must follow branch"
        rows, totals, start = self.last_branches
        if self.uncached:
            self.last_tokens.append(tokens)
            return self._read_whole(rows, totals, torch.stack(self.last_tokens, 2))
        count, device = tokens.shape[1], rows.device
        prefix = torch.arange(start, device=device)
        in_prefix = (prefix < totals[:, None])[:, None].expand(-1, count, -1)
        own = torch.eye(count, dtype=torch.bool, device=device).repeat(1, depth + 1)
        seen = torch.cat([in_prefix, own.expand(len(rows), -1, -1)], dim=2)
        positions = (totals + depth)[:, None].expand_as(tokens)
        depths = torch.arange(depth + 1, device=device).repeat_interleave(count)
        keys = torch.cat([prefix.expand(len(rows), -1), depths + totals[:, None]], dim=1)
        with evaluation_mode(self.modules):
            outputs = self.forward(
                input_ids=tokens,
                attention_mask=self._by_layer(seen, positions, keys),
                position_ids=positions,
                past_key_values=self.store.select(rows, start + count * depth),
                last=count,
            )
        self._count(rows, totals, totals)
        self.meter.count_branches(rows, positions + 1)
        return outputs

    def _read_whole(
        self, rows: Tensor, totals: Tensor, tails: Tensor | Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """Return the output at the end of sequences, each computed by itself, `(n, B, …)`.

        Sequences of one length share a forward pass, which needs no mask.

        Args:
            rows: Row numbers `(n,)`.
            totals: Lengths of their prefixes, `(n,)`.
            tails: What follows the prefix: B sequences of tokens for each row.
        """
        sequences = [
            [*self.history[row, :total].tolist(), *tail.tolist()]
            for row, total, of_row in zip(rows.tolist(), totals.tolist(), tails, strict=True)
            for tail in of_row
        ]
        outputs: dict[int, Tensor] = {}
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=rows.device)
        for length in lengths.unique():
            for places in (lengths == length).nonzero().squeeze(1).split(WHOLE_BATCH):
                with evaluation_mode(self.modules):
                    output = self.forward(
                        input_ids=torch.tensor([sequences[i] for i in places], device=rows.device),
                        attention_mask=None,
                        position_ids=None,
                        past_key_values=None,
                        last=1,
                    )
                outputs |= zip(places.tolist(), output[:, 0], strict=True)
        branches = len(sequences) // len(rows)
        zeros = torch.zeros_like(lengths)
        self.meter.count(rows.repeat_interleave(branches), zeros + 1, zeros, lengths, zeros + 1)
        return torch.stack([outputs[i] for i in range(len(sequences))]).unflatten(
            0, (len(rows), branches)
        )

    def _catch_up(
        self,
        rows: Tensor,
        totals: Tensor,
        last: int,
        outputs: int = 0,
        branches: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute what rows lack of their first `totals` tokens, and their branches after it.

        Args:
            rows: Row numbers `(n,)`, ascending.
            totals: Lengths of their prefixes, `(n,)`.
            last: Number of last positions to read.
            outputs: How many outputs of each row are needed, branches left out, for the meter.
            branches: Tokens and positions, `(n, B)`, and which of them each sees, `(B, B)`.

        Returns:
            Outputs `(n, last, …)`.
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
        with evaluation_mode(self.modules):
            output = self.forward(
                input_ids=torch.cat([self.history[rows[:, None], columns], tokens], dim=1),
                attention_mask=self._mask(cached, fresh, prefix, queries, sees),
                position_ids=queries,
                past_key_values=self.store.select(rows, prefix),
                last=last,
            )
        check_extended(self.store, self.backbone)
        self.store.keep(columns, fresh)
        self._count(rows, cached, totals, outputs)
        self.cached[rows] = totals
        self.last_branches = (rows, totals, prefix + unseen)
        return output

    def _count(self, rows: Tensor, start: Tensor, end: Tensor, outputs: int = 0) -> None:
        """Count one forward pass of these rows."""
        self.meter.count(rows, torch.ones_like(rows), start, end, torch.full_like(rows, outputs))

    def _remember(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Write responses after prompts that are computed; return rows and whole lengths."""
        device = self.history.device
        rows, responses, lengths = rows.to(device), responses.to(device), lengths.to(device)
        prompts = self.prompt_lengths[rows]
        if responses.shape[1]:
            columns = prompts[:, None] + torch.arange(responses.shape[1], device=device)
            self.history[rows[:, None], columns] = responses
        self._share_prompts(rows)
        return rows, prompts + lengths

    def _share_prompts(self, rows: Tensor) -> None:
        """Compute prompts of these rows once, but for their last tokens, for all their samples."""
        if self.uncached or self.samples == 1 or bool(self.begun[rows // self.samples].all()):
            return
        prompts = torch.unique(rows // self.samples)
        prompts = prompts[~self.begun[prompts]]
        self.begun[prompts] = True
        first = prompts * self.samples
        siblings = first[:, None] + torch.arange(self.samples, device=rows.device)
        totals = self.prompt_lengths[first] - 1
        longest, several = int(totals.max()), totals > 0  # one token has nothing before it
        if longest > 0:
            self._catch_up(first[several], totals[several], last=1)
            sources = first.repeat_interleave(self.samples - 1)
            self.store.copy_rows(sources, siblings[:, 1:].flatten(), longest)
        self.cached[siblings] = totals[:, None]

    def _mask(
        self, cached: Tensor, fresh: Tensor, prefix: int, queries: Tensor, sees: Tensor
    ) -> Mask:
        """Return what each query may see.

        Args:
            cached: Tokens of each row in the store, `(n,)`.
            fresh: Which of the unseen columns are no padding, bool `(n, unseen)`.
            prefix: Columns of the store that take part.
            queries: Positions of unseen tokens, then branches, `(n, unseen + B)`; the keys are the
                prefix, then the same.
            sees: Which branch tokens each one sees, bool `(B, B)`.
        """
        (n, unseen), device = fresh.shape, fresh.device
        count = queries.shape[1]
        columns = torch.arange(prefix, device=device)
        if not self.takes_masks:  # by tokens and padding: all that flash attention knows
            return torch.cat([columns < cached[:, None], fresh], dim=1).long()
        seen = torch.zeros(n, count, prefix + count, dtype=torch.bool, device=device)
        seen[:, :, :prefix] = (columns < cached[:, None])[:, None]
        causal = torch.ones(unseen, unseen, dtype=torch.bool, device=device).tril_()
        seen[:, :unseen, prefix : prefix + unseen] = causal
        seen[:, unseen:, prefix : prefix + unseen] = fresh[:, None]
        seen[:, unseen:, prefix + unseen :] = sees
        return self._by_layer(seen, queries, torch.cat([columns.expand(n, -1), queries], dim=1))

    def _by_layer(self, seen: Tensor, queries: Tensor, keys: Tensor) -> Mask:
        """Return masks to add to attention scores, `(n, 1, queries, keys)`.

        One mask for models whose layers are alike; else one by kind of layer, narrowed to the
        window of those that have one.

        Args:
            seen: What each query may see without windows, bool `(n, queries, keys)`.
            queries: Positions of the queries, `(n, queries)`.
            keys: Positions of the keys, `(n, keys)`.
        """
        shown, hidden = self.mask_values
        masks: dict[str, Tensor] = {}
        for window in set(self.windows):
            near = seen
            if window is not None:
                near = seen & (queries[:, :, None] - keys[:, None] < window)
            kind = "full_attention" if window is None else "sliding_attention"
            masks[kind] = torch.where(near, shown, hidden)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _cheapest(tokens: Tensor) -> list[tuple[int, int]]:
    """Return stretches of rows to compute in a forward pass each, split as long as that pays.

    tokens: of each row, `(n,)`, ascending.
    """
    # tokens of padding that a split after so many rows saves, less what a further pass costs
    count = torch.arange(1, len(tokens), device=tokens.device)
    saved = count * (tokens[-1] - tokens[:-1]) - PASS_OVERHEAD
    if len(saved) == 0 or int(saved.max()) <= 0:
        return [(0, len(tokens))]
    middle = int(saved.argmax()) + 1
    second = [(middle + start, middle + end) for start, end in _cheapest(tokens[middle:])]
    return _cheapest(tokens[:middle]) + second


def check_attention(backbone: PreTrainedModel) -> None:
    """Check that the attention implementation takes prepared masks.

    Raises:
        ValueError: If it does not (flash, flex).
    """
    implementation = backbone.config._attn_implementation
    if implementation not in MASKED_ATTENTION:
        raise ValueError(
            f"scoring candidates needs attn_implementation {' or '.join(MASKED_ATTENTION)}, "
            f"got {implementation}"
        )


_tried: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def supports_tree_attention(backbone: PreTrainedModel) -> bool:
    """Return whether branches of a prefix get what each gets as a sequence of its own.

    Tried out once with each backbone of a type that the test suite does not cover. Not so in
    models whose attention does not follow a prepared mask and positions (ALiBi, some that attend
    locally), however they go wrong.

    Args:
        backbone: The model without its head.
    """
    if backbone.config.model_type in VERIFIED_MODEL_TYPES:
        return True
    if backbone not in _tried:
        try:
            with evaluation_mode(backbone.modules()):
                agrees = _branches_agree(backbone)
        except Exception:  # other people's models fail in ways of their own
            agrees = False
        if agrees is None:
            return False
        _tried[backbone] = agrees
    return _tried[backbone]


@torch.no_grad()
def _branches_agree(backbone: PreTrainedModel) -> bool | None:
    """Compare eight branches of a short prefix with whole sequences, by their hidden states.

    A head could hide what differs. So would an offset that all states share, wherefore differences
    are measured by how far the states lie apart; None where they do not, and nothing can be told.
    """
    device, vocabulary = input_device(backbone), backbone.config.get_text_config().vocab_size
    prefix = [i % vocabulary for i in (1, 2, 3)]
    branches = [i % vocabulary for i in range(4, 12)]
    sees = torch.eye(11, dtype=torch.bool, device=device)
    sees[:, :3] = torch.ones(11, 3, dtype=torch.bool, device=device).tril()
    hidden, rounding = torch.finfo(backbone.dtype).min, rounding_of(backbone)
    mask = torch.zeros(11, 11, dtype=backbone.dtype, device=device).masked_fill_(~sees, hidden)

    def states(sequences: list[list[int]], **inputs: Tensor | None) -> Tensor:
        input_ids = torch.tensor(sequences, device=device)
        outputs = backbone(input_ids=input_ids, **inputs, use_cache=False, return_dict=True)
        return outputs.last_hidden_state.float()

    # whole sequences have positions as the model numbers them by itself
    sequences = [[*prefix, branch] for branch in branches]
    expected = states(sequences, attention_mask=None)[:, -1]
    # attention with a mask may run in another kernel, which rounds otherwise: branches are compared
    # with whole sequences under one, and these with the others more loosely
    positions = torch.tensor([[0, 1, 2, *[3] * len(branches)]], device=device)
    masked = states(
        sequences,
        attention_mask=mask[None, None, :4, :4].expand(len(sequences), -1, -1, -1),
        position_ids=positions[:, :4].expand(len(sequences), -1),
    )[:, -1]
    branched = states(
        [[*prefix, *branches]], attention_mask=mask[None, None], position_ids=positions
    )[0, 3:]
    spread = (expected - expected.mean(0)).norm(dim=1).mean()
    if bool(spread <= rounding * expected.norm(dim=1).mean()):
        return None
    by_mask = (masked - expected).norm(dim=1).max() / spread
    by_branches = (branched - masked).norm(dim=1).max() / spread
    # rounding adds up over the layers
    return bool(by_mask <= max(1e-3, 64 * rounding) and by_branches <= max(1e-3, 32 * rounding))
