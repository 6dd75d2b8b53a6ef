"""Models that read a response after the tokens that close it: reward and process reward models."""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from sia._inputs import pad_right
from sia._kv_cache import backbone_of, check_positions, input_device
from sia._modes import evaluation_mode
from sia._numbers import whole_number
from sia._prefix_cache import CachedPrefixes, check_attention, supports_tree_attention
from sia.cost import Architecture, Meter
from sia.scorers.base import BranchSession, CachedSession, Scorer
from sia.scorers.loading import output_size

BATCH = 64  # whole sequences that a model reads at once


class ClosedScorer(Scorer):
    """A model that is read at the last token of a response with its closing.

    Args:
        model: The model.
        closing: Tokens appended to every response; with none it is read at its own last token.
        end_tokens: Tokens that end a response; the model reads the closing in their place.
    """

    def __init__(
        self, model: PreTrainedModel, closing: Sequence[int], end_tokens: Iterable[int]
    ) -> None:
        self.model, self.closing = model, [whole_number("closing", token) for token in closing]
        self.end_tokens = sorted(set(end_tokens))

    @property
    @override
    def vocabulary_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @override
    def closed_by(
        self, tokenizer: PreTrainedTokenizerBase | None, stop_tokens: Collection[int] = ()
    ) -> Self:
        closed = copy(self)
        closed.end_tokens = sorted({*self.end_tokens, *stop_tokens})
        return closed

    @property
    @abstractmethod
    def head(self) -> nn.Module | None:
        """Module that `read` reads single tokens with; None if the model reads only sequences."""

    @abstractmethod
    def read(self, *, last: int, past_key_values: Cache | None, **inputs: Any) -> Tensor:
        """Return the values of the last tokens, float32 `(n, last)`."""

    @torch.inference_mode()
    def read_whole(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return the values of whole sequences, closing included, float32 `(sequences,)`."""
        model = self.model
        device, config = input_device(model), model.config.get_text_config()
        # some checkpoints have -1, or a token without an embedding
        padding = config.pad_token_id if config.pad_token_id in range(config.vocab_size) else 0
        values: dict[int, Tensor] = {}
        for indices in self._batches(sequences):
            input_ids, mask = pad_right([sequences[i] for i in indices], device, padding)
            inputs = {"input_ids": input_ids, "attention_mask": mask}
            with evaluation_mode(model.modules()):
                if self.head is None:
                    read = model(**inputs, return_dict=True).logits.float().squeeze(-1)
                else:
                    every = self.read(last=input_ids.shape[1], past_key_values=None, **inputs)
                    read = every.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
            values |= zip(indices, read, strict=True)
        return torch.stack([values[i] for i in range(len(sequences))])

    def _batches(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the indices of sequences to read at once.

        What may not be a decoder that follows masks gets sequences without padding, since it may
        look at the last column (XLNet) or mix neighbours (ConvBERT); an encoder and decoder gets
        one sequence at a time.
        """
        order = list(range(len(sequences)))
        groups = [order]
        if self.head is None or not supports_tree_attention(backbone_of(self.model)):
            order.sort(key=lambda i: len(sequences[i]))
            groups = [list(group) for _, group in groupby(order, lambda i: len(sequences[i]))]
        batch = 1 if self.model.config.is_encoder_decoder else BATCH
        return [group[i : i + batch] for group in groups for i in range(0, len(group), batch)]

    @property
    def supports_caching(self) -> bool:
        """True if prefixes can be cached: the model is a causal decoder that follows masks."""
        if self.head is None:
            return False
        check_attention(self.model)
        return supports_tree_attention(backbone_of(self.model))

    @override
    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> "CachedRewardSession | WholeSequenceSession":
        session = CachedRewardSession if self.supports_caching else WholeSequenceSession
        return session(self, prompts, max_new_tokens, samples)


def outside_backbone(model: PreTrainedModel) -> list[nn.Module]:
    """Return a model's parts beside its backbone; some classes make their head before it."""
    backbone = backbone_of(model)
    return [part for part in model.children() if part is not backbone]


class CachedRewardSession(CachedSession):
    """A session of a decoder that keeps prefixes: candidates and their closing are branches."""

    def __init__(
        self,
        scorer: ClosedScorer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        assert scorer.head is not None
        model = scorer.model
        device = input_device(model)
        self.closing = torch.tensor(scorer.closing, dtype=torch.int64, device=device)
        self.end_tokens = torch.tensor(scorer.end_tokens, dtype=torch.int64, device=device)
        super().__init__(
            CachedPrefixes(
                model,
                backbone_of(model),
                scorer.read,
                scorer.head,
                prompts,
                max_new_tokens + len(scorer.closing),
                samples,
            )
        )

    @override
    @torch.inference_mode()
    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        closed, kept = self._close(branches, lengths)
        return self.read_branches(rows, responses, closed, kept + len(self.closing) - 1)

    @override
    @torch.inference_mode()
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        closed, kept = self._close(responses, lengths)
        values = self.prefixes.last(rows, closed, kept + len(self.closing))
        if len(self.closing):  # what was put there does not stay
            own_end = _last_tokens(responses, lengths) == self.closing[0].to(responses.device)
            self.prefixes.shorten(rows, torch.where(own_end, lengths, kept))
        return values

    def _close(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return `tokens` `(…, m + c)` with the closing in place, and where it begins `(…)`."""
        count = len(self.closing)
        if count == 0:
            return tokens, lengths
        ended = torch.isin(_last_tokens(tokens, lengths), self.end_tokens.to(tokens.device))
        kept = torch.where(ended, lengths - 1, lengths)
        room = torch.cat([tokens, tokens[..., -1:].expand(*tokens.shape[:-1], count)], dim=-1)
        places = kept[..., None] + torch.arange(count, device=tokens.device)
        return room.scatter(-1, places, self.closing.to(tokens.device).expand_as(places)), kept


def _last_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return token number `lengths` − 1 of each sequence. tokens: `(…, m)`, lengths: `(…)`."""
    return tokens.gather(-1, lengths[..., None] - 1).squeeze(-1)


class WholeSequenceSession(BranchSession):
    """A session of a model that reads whole sequences: every candidate costs its full length."""

    def __init__(
        self,
        scorer: ClosedScorer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        model = scorer.model
        longest = max(len(prompt) for prompt in prompts) + max_new_tokens + len(scorer.closing)
        check_positions(model, longest)
        self.scorer = scorer
        self.prompts = [prompt for prompt in prompts for _ in range(samples)]
        backbone = backbone_of(model)
        head = scorer.head
        if head is None:  # of an encoder
            head = nn.Linear(output_size(backbone), 1, device="meta")
        architecture = Architecture.of(backbone, head)
        self.meters = [Meter(architecture, len(self.prompts), input_device(model))]

    @override
    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        count = branches.shape[1]
        prefixes = responses[:, None].expand(-1, count, -1)
        whole = torch.cat([prefixes, branches], dim=2).flatten(0, 1)
        whole_lengths = responses.shape[1] + lengths.flatten()
        values = self.score_responses(rows.repeat_interleave(count), whole, whole_lengths)
        return values.view(-1, count)

    @override
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        scorer, sequences = self.scorer, []
        for row, response, length in zip(
            rows.tolist(), responses.tolist(), lengths.tolist(), strict=True
        ):
            ended = bool(scorer.closing) and response[length - 1] in scorer.end_tokens
            kept = response[: length - ended]
            sequences.append([*self.prompts[row], *kept, *scorer.closing])
        device = input_device(scorer.model)
        self._count(rows.to(device), [len(sequence) for sequence in sequences])
        return scorer.read_whole(sequences)

    @override
    def reorder(self, sources: Tensor) -> None:
        """Do nothing: no state is kept between calls."""

    def _count(self, rows: Tensor, lengths: list[int]) -> None:
        """Count one forward pass per sequence, in which every token may see every other."""
        zeros = torch.zeros_like(rows)
        self.meters[0].count(rows, zeros + 1, zeros, zeros, zeros)
        for row, length in zip(rows.split(1), lengths, strict=True):
            contexts = torch.full((1, length), length, device=rows.device)
            self.meters[0].count_branches(row, contexts)
