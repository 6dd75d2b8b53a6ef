"""Values of any candidates from one hidden state: Q(s, y) = u_y · f(h_s) + b_y."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from sia._numbers import whole_number
from sia.cost import Architecture, weights_used


class CandidateValues(nn.Module):
    """Values of candidates from hidden states, all in float32, also under autocast.

    Args:
        hidden: Size of the hidden states.
        vocabulary: Number of tokens.
        rank: Size of the vector of each token.
    """

    def __init__(self, hidden: int, vocabulary: int, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, rank)
        self.inner, self.outer = nn.Linear(hidden, 2 * rank), nn.Linear(2 * rank, rank, bias=False)
        self.tokens, self.bias = nn.Embedding(vocabulary, rank), nn.Embedding(vocabulary, 1)

    @property
    def architecture(self) -> Architecture:
        """FLOPs of f per position; the products with K vectors, far fewer, are not counted."""
        return Architecture(linear=2 * weights_used(self), head=0, attention=())

    def project(self, hidden: Tensor) -> Tensor:
        """Return f(h), `(..., rank)`, of hidden states `(..., hidden)`."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.linear.weight.dtype)
            return self.linear(hidden) + self.outer(nn.functional.gelu(self.inner(hidden)))

    def forward(self, hidden: Tensor, candidates: Tensor) -> Tensor:
        """Return values, float32 `(rows, K)`.

        Args:
            hidden: Hidden states, `(rows, hidden)`.
            candidates: Token ids, `(rows, K)`.
        """
        return self.read(self.project(hidden), candidates)

    def read(self, projected: Tensor, candidates: Tensor) -> Tensor:
        """Return the values of candidates `(rows, K)` from f(h) `(rows, rank)`."""
        vectors = self.tokens(candidates)
        bias = self.bias(candidates)
        with torch.autocast(projected.device.type, enabled=False):
            return torch.baddbmm(bias, vectors, projected[:, :, None]).squeeze(2)

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments that the head was built with."""
        vocabulary, rank = self.tokens.weight.shape
        return {"hidden": self.linear.in_features, "vocabulary": vocabulary, "rank": rank}

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Self:
        """Build a head from its tensors, stored in any precision.

        Raises:
            ValueError: If they do not fit the sizes, or are not finite.
        """
        for name, size in sizes.items():
            whole_number(name, size, 1)
        values = cls(**sizes)
        try:
            # assigned, whatever torch's default dtype is
            values.load_state_dict({k: w.float() for k, w in weights.items()}, assign=True)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"the weights of the head do not fit {dict(sizes)}: {reason}"
            ) from error
        if not all(bool(tensor.isfinite().all()) for tensor in values.parameters()):
            raise ValueError("the weights of the head must be finite, got NaN or infinity")
        return values.eval().requires_grad_(False)
