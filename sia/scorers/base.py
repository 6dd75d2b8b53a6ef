"""The interface that decoding needs of a scorer, and what sessions over cached prefixes share."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from sia._prefix_cache import CachedPrefixes
from sia.cost import Meter


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
        """Let row i go on from where row `sources[i]` stands; `(rows,)`."""


class HiddenStateSession(Session):
    """A session that reads hidden states of the language model, which decoding hands over."""

    @abstractmethod
    def check_model(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless the hidden states of this language model can be read."""

    @abstractmethod
    def observe(self, hidden: Tensor) -> None:
        """Receive the hidden states `(n, hidden)` of the rows of the next call of `score`."""


@runtime_checkable
class Scorer(Protocol):
    """Anything that opens a `Session` over prompts: a value model, a reward model, rollouts."""

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, which must be that of the steered model."""

    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> Session:
        """Open a session.

        Args:
            prompts: Token ids without padding.
            max_new_tokens: Longest response.
            samples: Rows per prompt, in succession.
        """


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
    """Return how `count` branches of `depth` tokens lie behind their prefix.

    Returns:
        Distance of each token from the first after the prefix, `(count·depth,)`, and which tokens
        each one sees, bool `(count·depth, count·depth)`.
    """
    branch = torch.arange(count, device=device).repeat_interleave(depth)
    depths = torch.arange(depth, device=device).repeat(count)
    return depths, (branch[:, None] == branch) & (depths[:, None] >= depths)
