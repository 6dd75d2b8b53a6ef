"""The interface that decoding needs of a scorer, and what sessions over cached prefixes share."""

from abc import ABCMeta, abstractmethod
from collections.abc import Collection, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from sia._numbers import as_number, is_finite, python_value
from sia._prefix_cache import CachedPrefixes
from sia.cost import Meter

MOST_PADDING = 1024  # rows of embeddings that models of one family have beyond their tokenizer


class Session(Protocol):
    """Values along one batch of responses.

    Rows are numbered as the prompts were, each prompt having `samples` of them.

    Attributes:
        meters: Counts of what was computed for each row, one meter per model.
    """

    meters: Sequence[Meter]

    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        """Return the values of candidate next tokens.

        Args:
            rows: Row numbers `(n,)`, ascending.
            responses: Tokens of these rows so far, `(n, t)`.
            candidates: Possible next tokens, `(n, K)`.

        Returns:
            Values, float32 `(n, K)`.
        """

    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        """Return the values of responses as they stand.

        Args:
            rows: Row numbers `(n,)`, ascending.
            responses: Tokens of these rows, `(n, t)`.
            lengths: How many of them count, `(n,)`, at least 1.

        Returns:
            Values, float32 `(n,)`.
        """

    def reorder(self, sources: Tensor) -> None:
        """Replace the state of row i by that of row `sources[i]`.

        Args:
            sources: Numbers of rows, `(rows,)`; there may be fewer than before.
        """


class HiddenStateSession(Session):
    """A session that reads hidden states of the language model, which decoding hands over."""

    @abstractmethod
    def check_model(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless the hidden states of this language model can be read."""

    @abstractmethod
    def observe(self, hidden: Tensor) -> None:
        """Receive the hidden states `(n, hidden)` of the rows of the next call of `score`."""


class _ScorerType(ABCMeta):
    """Makes whatever has a scorer's two members an instance of `Scorer`, as a protocol would."""

    def __instancecheck__(cls, instance: object) -> bool:
        if cls is not Scorer:
            return super().__instancecheck__(instance)
        return all(hasattr(instance, name) for name in ("vocabulary_size", "start_session"))


class Scorer(metaclass=_ScorerType):
    """Anything that opens a `Session` over prompts: a value model, a reward model, rollouts.

    Scorers add up: `2.0 * helpful - 0.5 * harmful` is a scorer again, as is `sum(several) / 3`. A
    class that has the two members below need not inherit from this one to take part.

    Attributes:
        tokenizer: Tokenizer of the model that scores, if it is known; it must agree with that of
            the language model.
        values_responses: Whether its sessions value whole responses, as a search needs.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    values_responses: bool = True

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Number of tokens, which must be that of the steered model."""

    @abstractmethod
    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> Session:
        """Open a session.

        Args:
            prompts: Token ids without padding.
            max_new_tokens: Longest response.
            samples: Rows per prompt, in succession.
        """

    @property
    def tokenizers(self) -> tuple[PreTrainedTokenizerBase, ...]:
        """The known tokenizers of all models that score: one, or those of the terms of a sum."""
        return () if self.tokenizer is None else (self.tokenizer,)

    def closed_by(
        self, tokenizer: PreTrainedTokenizerBase | None, stop_tokens: Collection[int] = ()
    ) -> Self:
        """Return the scorer as it reads responses of a language model.

        Reward models read what the chat template of its tokenizer writes after a response, in
        place of the token that ended it; for others it is all the same.

        Args:
            tokenizer: Tokenizer of the language model, if it is known.
            stop_tokens: Tokens by which the language model ends a response.
        """
        return self

    def __add__(self, other: "Scorer") -> "SumScorer":
        return SumScorer([*_terms(self), *_terms(other)])

    def __radd__(self, other: "Scorer | int") -> "SumScorer":
        # `sum` begins with 0
        return SumScorer([*([] if other == 0 else _terms(other)), *_terms(self)])

    def __sub__(self, other: "Scorer") -> "SumScorer":
        return self + SumScorer([(-weight, scorer) for weight, scorer in _terms(other)])

    def __rsub__(self, other: "Scorer") -> "SumScorer":
        return -self + other

    def __mul__(self, factor: float) -> "SumScorer":
        number = check_weight(factor)
        return SumScorer([(number * weight, scorer) for weight, scorer in _terms(self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "SumScorer":
        return self * (1 / check_weight(divisor))

    def __neg__(self) -> "SumScorer":
        return -1.0 * self


class SumScorer(Scorer):
    """The weighted sum Σ w·V of scorers, as `2.0 * helpful - 0.5 * harmful` makes it.

    Costs add up. Each scorer reads the same prompts.

    Args:
        terms: Weights and scorers, one at least.

    Raises:
        ValueError: If a weight is not finite, or vocabularies differ.
        TypeError: If one is no scorer.
    """

    def __init__(self, terms: Sequence[tuple[float, Scorer]]) -> None:
        for _, scorer in terms:
            if not isinstance(scorer, Scorer):
                raise TypeError(f"scorers add up with scorers, got {type(scorer).__name__}")
        self.terms = tuple((check_weight(weight), scorer) for weight, scorer in terms)
        self._vocabulary = shared_vocabulary([scorer.vocabulary_size for _, scorer in terms])
        self.values_responses = all(values_responses(scorer) for _, scorer in terms)

    @property
    @override
    def vocabulary_size(self) -> int:
        return self._vocabulary

    @property
    @override
    def tokenizers(self) -> tuple[PreTrainedTokenizerBase, ...]:
        return tuple(
            tokenizer for _, scorer in self.terms for tokenizer in known_tokenizers(scorer)
        )

    @override
    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> "SumSession":
        terms = [
            (weight, scorer.start_session(prompts, max_new_tokens, samples))
            for weight, scorer in self.terms
        ]
        if any(isinstance(session, HiddenStateSession) for _, session in terms):
            return HiddenStateSumSession(terms)
        return SumSession(terms)

    @override
    def closed_by(
        self, tokenizer: PreTrainedTokenizerBase | None, stop_tokens: Collection[int] = ()
    ) -> Self:
        closed = copy(self)
        closed.terms = tuple(
            (weight, close(scorer, tokenizer, stop_tokens)) for weight, scorer in self.terms
        )
        return closed


def known_tokenizers(scorer: Scorer) -> tuple[PreTrainedTokenizerBase, ...]:
    """Return the tokenizers of a scorer; none if it only has the two members of one."""
    # isinstance accepts every class with the two members, which may lack `tokenizers`
    return scorer.tokenizers if issubclass(type(scorer), Scorer) else ()


def close(
    scorer: Scorer, tokenizer: PreTrainedTokenizerBase | None, stop_tokens: Collection[int]
) -> Scorer:
    """Return a scorer as it reads responses of a language model, see `Scorer.closed_by`."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = None  # another library's has no template
    # what only has the members of a scorer reads responses in its own way
    derived = issubclass(type(scorer), Scorer)
    return scorer.closed_by(tokenizer, stop_tokens) if derived else scorer


def values_responses(scorer: Scorer) -> bool:
    """Return whether a scorer values whole responses, besides candidates."""
    # what only has the members of a scorer does not tell
    return not issubclass(type(scorer), Scorer) or scorer.values_responses


def shared_vocabulary(sizes: Sequence[int]) -> int:
    """Return how many tokens scorers and models share; rows of padding may follow them.

    Raises:
        ValueError: If sizes differ by more than padding.
    """
    if not sizes or max(sizes) - min(sizes) > MOST_PADDING:
        raise ValueError(
            "models and scorers must share a vocabulary, but for at most "
            f"{MOST_PADDING} rows of padding, got vocabularies of {list(sizes)} tokens"
        )
    return min(sizes)


def check_weight(weight: Any) -> float:
    """Return the weight of a scorer as a Python number.

    Raises:
        ValueError: Unless it is a finite number.
    """
    number, value = as_number(weight), python_value(weight)
    if not is_finite(number):
        given = value if isinstance(value, float) else type(value).__name__
        raise ValueError(f"the weight of a scorer must be a finite number, got {given}")
    return number


def _terms(scorer: Any) -> Sequence[tuple[float, Scorer]]:
    """Return the terms of a sum, or the scorer as its only term."""
    return scorer.terms if isinstance(scorer, SumScorer) else [(1.0, scorer)]


class SumSession(Session):
    """Sessions of the terms, side by side."""

    def __init__(self, terms: Sequence[tuple[float, Session]]) -> None:
        self.terms = terms
        self.meters = [meter for _, session in terms for meter in session.meters]

    @override
    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        return self._sum([s.score(rows, responses, candidates) for _, s in self.terms])

    @override
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        return self._sum([s.score_responses(rows, responses, lengths) for _, s in self.terms])

    def _sum(self, values: list[Tensor]) -> Tensor:
        device = values[0].device
        weighted = [
            weight * value.to(device) for (weight, _), value in zip(self.terms, values, strict=True)
        ]
        return torch.stack(weighted).sum(0)

    @override
    def reorder(self, sources: Tensor) -> None:
        for _, session in self.terms:
            session.reorder(sources)


class HiddenStateSumSession(SumSession, HiddenStateSession):
    """A sum of which some terms read hidden states."""

    @override
    def check_model(self, model: PreTrainedModel) -> None:
        for session in self._readers:
            session.check_model(model)

    @override
    def observe(self, hidden: Tensor) -> None:
        for session in self._readers:
            session.observe(hidden)

    @property
    def _readers(self) -> list[HiddenStateSession]:
        return [s for _, s in self.terms if isinstance(s, HiddenStateSession)]


class BranchSession(Session):
    """A session that values branches of several tokens; candidates are branches of one."""

    @override
    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        lengths = torch.ones_like(candidates)
        return self.score_branches(rows, responses, candidates[:, :, None], lengths)

    @abstractmethod
    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        """Return the values of several continuations of each response.

        Args:
            rows: Row numbers `(n,)`, ascending.
            responses: Tokens of these rows so far, `(n, t)`.
            branches: Continuations, `(n, K, m)`.
            lengths: How many tokens of each count, `(n, K)`, at least 1.

        Returns:
            Values, float32 `(n, K)`.
        """


class CachedSession(BranchSession):
    """A session that keeps prefixes in a KV cache and reads branches in one forward pass."""

    def __init__(self, prefixes: CachedPrefixes) -> None:
        self.prefixes, self.meters = prefixes, [prefixes.meter]

    @override
    @torch.inference_mode()
    def reorder(self, sources: Tensor) -> None:
        self.prefixes.reorder(sources)

    def read_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, ends: Tensor
    ) -> Tensor:
        """Return the model's output at one token of each branch.

        Args:
            rows: Row numbers `(n,)`, ascending.
            responses: Tokens of these rows so far, `(n, t)`.
            branches: Continuations, `(n, K, m)`.
            ends: Which token of each branch to read, `(n, K)`, from 0.

        Returns:
            Outputs, float32 `(n, K)`.
        """
        prefixes, device = self.prefixes, self.prefixes.cached.device
        depths, sees = branch_layout(*branches.shape[1:], device)
        rows, responses, branches = rows.to(device), responses.to(device), branches.to(device)
        lengths = torch.full_like(rows, responses.shape[1])
        outputs = torch.empty(branches.shape, dtype=torch.float32, device=device)
        for group in prefixes.group_by_lag(rows, lengths, depths.numel()):
            read = prefixes.branch(
                rows[group],
                responses[group],
                lengths[group],
                branches[group].flatten(1),
                depths,
                sees,
            )
            outputs[group] = read.view(-1, *branches.shape[1:]).float()  # half under autocast
        return outputs.gather(2, ends.to(device)[:, :, None]).squeeze(2)


@lru_cache(maxsize=64)
def branch_layout(count: int, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how `count` branches of `depth` tokens follow their prefix.

    Returns:
        Distance of each token from the first after the prefix, `(count·depth,)`, and which tokens
        each one sees, bool `(count·depth, count·depth)`.
    """
    branch = torch.arange(count, device=device).repeat_interleave(depth)
    depths = torch.arange(depth, device=device).repeat(count)
    return depths, (branch[:, None] == branch) & (depths[:, None] >= depths)
