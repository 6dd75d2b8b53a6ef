"""The equations of steering, as pure functions of tensors, and `Steering`, which says what to steer with and when.

Shapes: `rows` sequences decoded together, `K` candidate tokens of each, in descending order of base logit.
Source: "Inference-time Alignment via Sparse Junction Steering" (arXiv 2602.21215), section on the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sia.gates import Gate, Never
from sia.scorers.base import Scorer

LARGEST_BETA = 1e9  # beyond it, float32 has no room left beside the values: that is math.inf


@dataclass(frozen=True)
class Steering:
    """What to steer with, and when.

    scorer: gives each candidate its value V(s·y); a `ValueModel` as a rule. None goes with `Never()` alone.
    gate: where to intervene (τ of the paper is the threshold of an `EntropyGate`).
    beta: strength β of the tilt π(y|s)·exp(β·V(s·y)); 0 is no steering, `math.inf` lets the values replace the logits.
    candidates: K, how many tokens of highest base logit take part, on steered and unsteered steps alike.
    min_probability: on steered steps a candidate whose base probability among the K is below this gets none; the most
        probable one always stays. 0 is the paper's method.
    """

    scorer: Scorer | None
    gate: Gate
    beta: float = 1.0
    candidates: int = 10
    min_probability: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.gate, Gate):
            raise TypeError(
                f"gate must be a gate such as EntropyGate(threshold=1.0), got {self.gate!r}"
            )
        if self.scorer is None and not isinstance(self.gate, Never):
            raise TypeError(f"a gate that may open needs a scorer, got None with {self.gate!r}")
        if self.scorer is not None and not isinstance(self.scorer, Scorer):
            raise TypeError(
                f"scorer must offer start_session(prompts, max_new_tokens), as a ValueModel does, got {type(self.scorer).__name__}"
            )
        if (
            not isinstance(self.beta, (int, float))
            or math.isnan(self.beta)
            or self.beta < 0
            or LARGEST_BETA < self.beta < math.inf
        ):
            raise ValueError(
                f"beta must be 0 to {LARGEST_BETA:g}, or math.inf (values alone), got {self.beta!r}"
            )
        if (
            isinstance(self.candidates, bool)
            or not isinstance(self.candidates, int)
            or self.candidates < 1
        ):
            raise ValueError(
                f"candidates must be a whole number of at least 1, got {self.candidates!r}"
            )
        if not 0 <= self.min_probability < 1:
            raise ValueError(
                f"min_probability must be at least 0 and less than 1, got {self.min_probability}"
            )


def entropy(logits: Tensor) -> Tensor:
    """H = −Σ p·ln p of softmax(logits) over the last dimension, in nats. Over K candidates at most ln K.

    logits: `(..., K)`; −∞ stands for probability 0. Returns `(...)`.
    """
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def tilt(logits: Tensor, values: Tensor, beta: float) -> Tensor:
    """Logits of π*(y|s) ∝ π(y|s)·exp(β·V(s·y)): logits + β·values; the values alone at β = ∞.

    logits, values: `(rows, K)`. Returns `(rows, K)`, not normalised.
    """
    return values.clone() if math.isinf(beta) else logits + beta * values


def drop_improbable(steered: Tensor, logits: Tensor, min_probability: float) -> Tensor:
    """`steered` with −∞ where the base probability among the candidates is below `min_probability`, never all of a row.

    steered, logits: `(rows, K)`.
    """
    if min_probability == 0:
        return steered
    probabilities = logits.softmax(-1)
    improbable = (probabilities < min_probability) & (
        probabilities < probabilities.amax(-1, keepdim=True)
    )
    return steered.masked_fill(improbable, -math.inf)


def kl_divergence(logits_q: Tensor, logits_p: Tensor) -> Tensor:
    """KL(q‖p) = Σ q·ln(q/p) in nats, between the softmaxes of two sets of logits `(rows, K)`. Returns `(rows,)`."""
    log_q, log_p = logits_q.log_softmax(-1), logits_p.log_softmax(-1)
    terms = log_q.exp() * (log_q - log_p)
    return torch.where(log_q.isinf(), 0.0, terms).sum(-1).clamp(min=0.0)  # 0·ln 0 counts as 0
