"""Cost of steering some steps and not others: identities and bounds on small tabular policies.

One step: base policy π over K candidates with values V, objective J(q) = E_q[V] − (1/β)·KL(q‖π),
optimum π* ∝ π·exp(βV) with J(π*) = (1/β)·ln E_π[exp(βV)]. For every q

    J(π*) − J(q) = (1/β)·KL(q‖π*)                   (regret identity; Lemma 2.1 for q = π)

A tree of T steps with a reward R at each leaf: the soft values V*(leaf) = R,
V*(s) = (1/β)·ln E_π[exp(β·V*(s·y))] make the same π* optimal for E_q[R] − (1/β)·KL(q‖π) over whole
responses, and for every q

    J(π*) − J(q) = (1/β)·Σ_t E_{s_t ~ q}[KL(q(·|s_t)‖π*(·|s_t))]
                                                    (Theorem 2.2, with equality, under q's states)

so that a policy that is π* where a gate is open and π elsewhere pays (1/β)·KL(π‖π*) at each
unsteered state that it visits. The identity is that of KL-regularised control (Todorov,
"Linearly-solvable Markov decision problems", 2006; Korbak, Perez and Buckley, "RL with KL penalties
is better viewed as Bayesian inference", 2022). Entropies in nats; all tensors float64.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


def optimal_policy(base: Tensor, values: Tensor, beta: float) -> Tensor:
    """Return π* ∝ π·exp(β·V). base: probabilities `(…, K)`; values: `(…, K)`."""
    return (base.log() + beta * values).softmax(-1)


def objective(policy: Tensor, base: Tensor, values: Tensor, beta: float) -> Tensor:
    """Return J(q) = E_q[V] − (1/β)·KL(q‖π), `(…)`."""
    return (policy * values).sum(-1) - divergence(policy, base) / beta


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """Return KL(q‖p) of probabilities `(…, K)`; 0·ln 0 counts as 0."""
    return torch.where(q > 0, q * (q.log() - p.log()), 0.0).sum(-1)


def step_regret(policy: Tensor, base: Tensor, values: Tensor, beta: float) -> Tensor:
    """Return J(π*) − J(q), `(…)`, from the definition of J."""
    best = objective(optimal_policy(base, values, beta), base, values, beta)
    return best - objective(policy, base, values, beta)


@dataclass(frozen=True)
class Tree:
    """All responses of T steps over K tokens.

    Attributes:
        base: π at each state, a tensor `(K^t, K)` for t = 0 … T−1.
        rewards: Rewards of the leaves, `(K^T,)`.
    """

    base: tuple[Tensor, ...]
    rewards: Tensor

    @classmethod
    def random(
        cls,
        steps: int,
        tokens: int,
        concentration: float,
        spread: float,
        generator: torch.Generator,
    ) -> Self:
        """Draw a tree.

        Args:
            steps: T.
            tokens: K.
            concentration: Standard deviation of the normal logits of π.
            spread: Standard deviation of the normal rewards.
            generator: Source of randomness.
        """

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        base = tuple((concentration * normal(tokens**t, tokens)).softmax(-1) for t in range(steps))
        return cls(base, spread * normal(tokens**steps))

    def soft_values(self, beta: float) -> list[Tensor]:
        """Return V* of the states that each token leads to: `(K^t, K)` for t = 0 … T−1."""
        values, below = [], self.rewards
        for base in reversed(self.base):
            values.append(below.view(base.shape))
            below = (base.log() + beta * values[-1]).logsumexp(-1) / beta
        return values[::-1]

    def visits(self, policy: list[Tensor]) -> list[Tensor]:
        """Return the probability of each state under a policy: `(K^t,)` for t = 0 … T.

        policy: tensors shaped as `base`.
        """
        reached = [self.rewards.new_ones(1)]
        for step in policy:
            reached.append((reached[-1][:, None] * step).flatten())
        return reached

    def objective(self, policy: list[Tensor], beta: float) -> Tensor:
        """Return E_q[R] − (1/β)·KL(q‖π), by summing over all responses."""
        response, base = self.visits(policy)[-1], self.visits(list(self.base))[-1]
        return (response * self.rewards).sum() - divergence(response, base) / beta

    def optimum(self, beta: float) -> list[Tensor]:
        """Return π*, tensors shaped as `base`."""
        return [
            optimal_policy(base, values, beta)
            for base, values in zip(self.base, self.soft_values(beta), strict=True)
        ]

    def sparse(self, steered: list[Tensor], beta: float) -> list[Tensor]:
        """Return π* at the states where `steered`, bool `(K^t,)`, and π elsewhere."""
        return [
            torch.where(on[:, None], best, base)
            for on, best, base in zip(steered, self.optimum(beta), self.base, strict=True)
        ]

    def regret_by_steps(self, policy: list[Tensor], under: list[Tensor], beta: float) -> Tensor:
        """Return (1/β)·Σ_t E_{s_t}[KL(q‖π*)], with states as the policy `under` visits them.

        This is the regret of q where `under` is q itself.
        """
        total = self.rewards.new_zeros(())
        steps = zip(self.visits(under), policy, self.optimum(beta), strict=False)
        for reached, step, best in steps:
            total = total + (reached * divergence(step, best)).sum()
        return total / beta


def expected_noise_regret(base: Tensor, values: Tensor, beta: float, sigma: float) -> Tensor:
    """Return the regret of steering by V + ε, to second order in βσ, `(…)`.

    With ε ~ N(0, σ²) independent for each candidate, E[KL(π̂‖π*)]/β ≈ (β/2)·E[Var_{π*}(ε)]
    = (βσ²/2)·(1 − Σ π*²): the less, the surer the steered policy (Proposition 2.3).
    """
    best = optimal_policy(base, values, beta)
    return beta * sigma**2 / 2 * (1 - best.square().sum(-1))


def largest_regret(likely: Tensor | float, value_range: float, beta: float) -> Tensor:
    """Return the most that leaving a step alone can cost.

    That is (1/β)·(ln(1 + a·(exp(βr) − 1)) − a·βr): KL(π‖π*) is convex in V, so its maximum over
    values in a range r lies where each is at an end of the range.

    Args:
        likely: Base probability a of the candidates whose value is the upper end of the range.
        value_range: Range r of the values.
        beta: Strength β of the steering.
    """
    a = torch.as_tensor(likely, dtype=torch.float64)
    return (torch.log1p(a * math.expm1(beta * value_range)) - a * beta * value_range) / beta


def regret_bound(base: Tensor, value_range: float, beta: float) -> Tensor:
    """Return a bound on (1/β)·KL(π‖π*) from the entropy of π `(…)` and the range of the values.

    With entropy H ≤ ln 2, all but at most ε = h⁻¹(H) of the probability lies on one candidate (h:
    binary entropy), so that the probability a of `largest_regret` is below ε or above 1 − ε. Above
    ln 2 the entropy says nothing: the bound is the largest over all a, at most β·r²/8 (Hoeffding).
    """
    entropy = torch.special.entr(base).sum(-1)
    rest = inverse_binary_entropy(entropy)
    scaled = beta * value_range
    # where largest_regret has its one maximum
    worst = (math.expm1(scaled) - scaled) / (scaled * math.expm1(scaled)) if scaled > 0 else 0.5
    if_rare = largest_regret(rest.clamp(max=worst), value_range, beta)
    if_likely = largest_regret((1 - rest).clamp(min=worst), value_range, beta)
    return torch.maximum(if_rare, if_likely)


def inverse_binary_entropy(entropy: Tensor) -> Tensor:
    """Return the ε ≤ 1/2 with −ε·ln ε − (1−ε)·ln(1−ε) = H, by bisection; 1/2 from H = ln 2 on."""
    low, high = torch.zeros_like(entropy), torch.full_like(entropy, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.special.entr(middle) + torch.special.entr(1 - middle) < entropy
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high
