"""Divergences, tilted policies and regret bounds of many steps at once, without torch.

The same quantities of single policies, with their sources, are in `sia.theory`.
"""

import numpy as np
from scipy.special import rel_entr

# SD of errors added to values (of random steps: of SD up to 3; of the lab: of rewards of SD 2)
NOISES = (0.1, 0.3, 1.0, 3.0)


def tilted(base: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the policies proportional to π·exp(V), `(steps, candidates)`."""
    weights = base * np.exp(values - values.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def kl_divergence(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return KL(q‖p) in nats of each row of two `(steps, candidates)`."""
    return rel_entr(q, p).sum(1)


def regret_bounds(
    entropy: np.ndarray, value_range: np.ndarray, beta: np.ndarray | float = 1.0
) -> np.ndarray:
    """Return `sia.theory.regret_bound` of many steps, from entropies and ranges of values."""
    low, high = np.zeros_like(entropy), np.full_like(entropy, 0.5)
    for _ in range(60):  # bisection: the share of two candidates that have this entropy
        middle = (low + high) / 2
        positive = np.maximum(middle, 1e-300)
        binary = -middle * np.log(positive) - (1 - middle) * np.log1p(-middle)
        low, high = (
            np.where(binary < entropy, middle, low),
            np.where(binary < entropy, high, middle),
        )
    x = np.maximum(beta * value_range, 1e-9)
    turning = (np.expm1(x) - x) / (x * np.expm1(x))
    unlikely = _largest_regret(np.minimum(high, turning), x)
    likely = _largest_regret(np.maximum(1 - high, turning), x)
    return np.maximum(unlikely, likely) / beta


def _largest_regret(share: np.ndarray, value_range: np.ndarray) -> np.ndarray:
    """Return the regret where a share of the probability has the larger of two values."""
    return np.log1p(share * np.expm1(value_range)) - share * value_range
