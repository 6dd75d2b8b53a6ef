"""The predictor of a `JunctionGate`: from a hidden state to the divergence that steering causes.

By Lemma 2.1 of the paper (arXiv 2602.21215) leaving a step unsteered costs KL(π‖π*)/β. Entropy
stands in for that divergence; this predicts it, from the hidden state that decoding has anyway.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Self

import safetensors.torch
import torch
from torch import Tensor, nn

from sia._model_identity import ModelIdentity

WEIGHTS = ("first.weight", "first.bias", "second.weight", "second.bias")
LARGEST_LOG = 5.0  # exp of it, 148 nats, is more than any KL between usual distributions
SMALLEST_LOG = -14.0


@dataclass(frozen=True)
class JunctionPredictor:
    """A network of two layers on a hidden state; equal to another if the weights are equal.

    Attributes:
        weights: Weight and bias of both layers, by name.
        model: The language model whose hidden states it reads.
        digest: Hash of the weights.
    """

    weights: Mapping[str, Tensor] = field(compare=False, repr=False)
    model: ModelIdentity = field(compare=False, repr=False)
    digest: str

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], model: ModelIdentity) -> Self:
        """Build the predictor from its weights, see `WEIGHTS`.

        Raises:
            KeyError: If one is missing.
            ValueError: If they do not fit together, or are not finite.
        """
        exact = {name: weights[name].detach().float().cpu().contiguous() for name in WEIGHTS}
        first, *others = (tuple(tensor.shape) for tensor in exact.values())
        if len(first) != 2 or others != [first[:1], (1, *first[:1]), (1,)]:
            raise ValueError(
                "the weights of a junction gate must be of (width, hidden), (width,), (1, width) "
                f"and (1,), got {', '.join(map(str, (first, *others)))}"
            )
        if not all(bool(tensor.isfinite().all()) for tensor in exact.values()):
            raise ValueError("the weights of a junction gate must be finite, got NaN or infinity")
        return cls(exact, model, hashlib.sha256(safetensors.torch.save(exact)).hexdigest()[:16])

    def predict(self, hidden: Tensor) -> Tensor:
        """Return the predicted KL(π‖π*) in nats, float32 `(rows,)`.

        Args:
            hidden: Hidden states, `(rows, hidden)`.

        Raises:
            ValueError: If they are of another size than those that it was fitted to.
        """
        size = self.weights["first.weight"].shape[1]
        if hidden.shape[1] != size:
            raise ValueError(
                f"this junction gate reads hidden states of size {size}, got {hidden.shape[1]}: "
                "fit one to this model"
            )
        first, first_bias, second, second_bias = _weights_on(self, hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            x = nn.functional.gelu(nn.functional.linear(hidden.float(), first, first_bias))
            log_divergence = nn.functional.linear(x, second, second_bias).squeeze(-1)
        return log_divergence.clamp_(SMALLEST_LOG, LARGEST_LOG).exp_()


@lru_cache(maxsize=8)
def _weights_on(predictor: JunctionPredictor, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(predictor.weights[name].to(device) for name in WEIGHTS)


def poisson_loss(log_prediction: Tensor, divergence: Tensor) -> Tensor:
    """Return the Poisson deviance of exp(`log_prediction`), up to a constant, as a mean.

    Its minimum is the conditional mean of the divergence, which ranks states by what steering them
    gains on average.
    """
    log_prediction = log_prediction.clamp(SMALLEST_LOG, LARGEST_LOG)
    return (log_prediction.exp() - divergence * log_prediction).mean()
