"""The equations of steering as pure functions, and `Steering`, which says how to steer and when.

Shapes: `rows` sequences decoded together, each with `K` candidate tokens in descending order of
base logit. Source: "Inference-time Alignment via Sparse Junction Steering" (arXiv 2602.21215).
"""

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical

from sia._numbers import as_number, whole_number
from sia.gates import Gate
from sia.scorers.base import Scorer
from sia.signals import Entropy, PredictedDivergence, Signal

DEFAULT_CANDIDATES = 10  # K of the paper
LARGEST_BETA = 1e9  # beyond it float32 rounds the logits away: that is math.inf


@dataclass(frozen=True)
class Steering:
    """The scorer, gate and strength of steering.

    Attributes:
        scorer: Gives each candidate y its value V(s·y), usually a `ValueModel`.
        gate: Where to intervene (τ of the paper is the threshold of an `EntropyGate`).
        beta: Strength β of the tilt π(y|s)·exp(β·V(s·y)). 0 does not steer; `math.inf` lets the
            values replace the logits.
        candidates: K, the number of tokens of highest base logit that take part at every step,
            steered or not.
        min_probability: Base probability among the K below which a candidate is dropped on
            steered steps; the most probable one always stays. 0 is the paper's method.
    """

    scorer: Scorer
    gate: Gate
    beta: float = 1.0
    _: KW_ONLY
    candidates: int = DEFAULT_CANDIDATES
    min_probability: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.gate, Gate):
            raise TypeError(
                f"gate must be a gate such as EntropyGate(threshold=1.0), got {self.gate!r}"
            )
        if not isinstance(self.scorer, Scorer):
            raise TypeError(
                "scorer must offer start_session(prompts, max_new_tokens), as a ValueModel does, "
                f"got {type(self.scorer).__name__}"
            )
        beta, floor = as_number(self.beta), as_number(self.min_probability)
        if not (0 <= beta <= LARGEST_BETA or beta == math.inf):
            raise ValueError(
                f"beta must be 0 to {LARGEST_BETA:g}, or math.inf (values alone), got {self.beta!r}"
            )
        if not 0 <= floor < 1:
            raise ValueError(
                f"min_probability must be at least 0 and less than 1, got {self.min_probability!r}"
            )
        count = whole_number("candidates", self.candidates, 1)
        for name, number in (("beta", beta), ("min_probability", floor), ("candidates", count)):
            object.__setattr__(self, name, number)


def candidate_count(steering: Steering | None, candidates: int | None) -> int:
    """Return K: that of the steering or, without one, `candidates` (10 by default)."""
    if steering is None:
        return (
            DEFAULT_CANDIDATES if candidates is None else whole_number("candidates", candidates, 1)
        )
    if not isinstance(steering, Steering):
        raise TypeError(
            f"steering must be a Steering(scorer, gate, …), got {type(steering).__name__}"
        )
    if candidates is not None:
        raise ValueError(
            "candidates is for decoding without a steering, which has its own: expected "
            f"Steering(…, candidates={candidates}), got candidates={candidates} beside a Steering"
        )
    return steering.candidates


def entropy(logits: Tensor) -> Tensor:
    """Return H = −Σ p·ln p of softmax(logits) in nats; over K candidates at most ln K.

    Args:
        logits: `(..., K)`; −∞ stands for probability 0.

    Returns:
        Entropies, `(...)`.
    """
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def signal_entropy(signal: Entropy, logits: Tensor, candidate_entropy: Tensor) -> Tensor:
    """Return an entropy signal `(rows,)`, over the candidates or the whole vocabulary.

    Args:
        signal: The signal.
        logits: Logits of the vocabulary, `(rows, vocabulary)`.
        candidate_entropy: Entropy over the K candidates, `(rows,)`.
    """
    if signal.over == "candidates":
        return candidate_entropy
    # of a certain step torch's is −0.0, by which a rise would be −∞
    return Categorical(logits=logits, validate_args=False).entropy() + 0.0


def step_signals(
    signals: Iterable[Signal], logits: Tensor, candidate_entropy: Tensor, hidden: Tensor | None
) -> dict[Signal, Tensor]:
    """Return those of the signals, `(rows,)` each, that a step's logits and hidden states decide.

    Args:
        signals: Entropies and predicted divergences are read, others are left out.
        logits: Logits of the vocabulary, `(rows, vocabulary)`.
        candidate_entropy: Entropy over the K candidates, `(rows,)`.
        hidden: `(rows, size)`; None without a signal that is predicted.
    """
    values: dict[Signal, Tensor] = {}
    for signal in signals:
        if isinstance(signal, Entropy):
            values[signal] = signal_entropy(signal, logits, candidate_entropy)
        elif isinstance(signal, PredictedDivergence) and hidden is not None:
            values[signal] = signal.predictor.predict(hidden)
    return values


def tilt(logits: Tensor, values: Tensor, beta: float) -> Tensor:
    """Return logits of π*(y|s) ∝ π(y|s)·exp(β·V(s·y)): logits + β·values, or values at β = ∞.

    Args:
        logits: Base logits, `(rows, K)`; −∞ stays −∞.
        values: Values V(s·y), `(rows, K)`.
        beta: Strength β.

    Returns:
        Logits that are not normalised, `(rows, K)`.
    """
    if math.isinf(beta):
        # a processor may have made −∞ the smallest number (remove_invalid_values)
        return values.masked_fill(logits <= torch.finfo(logits.dtype).min, -torch.inf)
    return logits + beta * values


def drop_improbable(steered: Tensor, logits: Tensor, min_probability: float) -> Tensor:
    """Return `steered` with −∞ for improbable candidates; the most probable ones always stay.

    Args:
        steered: Logits after the tilt, `(rows, K)`.
        logits: Base logits, `(rows, K)`.
        min_probability: Smallest base probability among the K candidates that stays.
    """
    if min_probability == 0:
        return steered
    probabilities = logits.softmax(-1)
    most_probable = probabilities.amax(-1, keepdim=True)
    improbable = (probabilities < min_probability) & (probabilities < most_probable)
    return steered.masked_fill(improbable, -math.inf)


def steer(logits: Tensor, values: Tensor, steering: Steering) -> Tensor:
    """Return the logits to sample from on a steered step: the tilt, without improbable candidates.

    Args:
        logits: Base logits, `(rows, K)`.
        values: Values V(s·y), `(rows, K)`.
        steering: Its β and `min_probability`.
    """
    tilted = tilt(logits, values, steering.beta)
    return drop_improbable(tilted, logits, steering.min_probability)


def kl_divergence(logits_q: Tensor, logits_p: Tensor) -> Tensor:
    """Return KL(q‖p) = Σ q·ln(q/p) in nats between the softmaxes of two sets of logits.

    Args:
        logits_q: `(rows, K)`; −∞ stands for probability 0, and 0·ln 0 for 0.
        logits_p: `(rows, K)`; −∞ only where those of q are too.

    Returns:
        Divergences, `(rows,)`.
    """
    log_q, log_p = logits_q.log_softmax(-1), logits_p.log_softmax(-1)
    terms = log_q.exp() * (log_q - log_p)
    return torch.where(log_q.isinf(), 0.0, terms).sum(-1).clamp(min=0.0)


def divergence(logits: Tensor, steered: Tensor) -> Tensor:
    """Return KL(π‖π*) in nats: β times the regret of leaving a step unsteered (Lemma 2.1).

    Candidates that steering rules out take no part in either distribution.

    Args:
        logits: Base logits, `(rows, K)`.
        steered: Logits after the tilt, `(rows, K)`; −∞ stands for probability 0.

    Returns:
        Divergences, `(rows,)`.
    """
    return kl_divergence(logits.masked_fill(steered == -math.inf, -math.inf), steered)
