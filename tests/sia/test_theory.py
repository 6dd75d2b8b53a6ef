"""Laws of sia.theory on random instances: identities to rounding, bounds without exception."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sia.theory import (
    Tree,
    divergence,
    expected_noise_regret,
    inverse_binary_entropy,
    largest_regret,
    objective,
    optimal_policy,
    regret_bound,
    step_regret,
)

SEEDS = st.integers(0, 2**31)
BETAS = st.floats(0.05, 5.0)
SPREADS = st.floats(0.0, 4.0)
THOROUGH = settings(max_examples=300, deadline=None)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(rows, candidates, g):
    return torch.randn(rows, candidates, generator=g, dtype=torch.float64)


def instance(seed, concentration, spread, rows=20, candidates=6):
    """Two policies and values of the candidates."""
    g = generator(seed)
    base, other = ((concentration * normal(rows, candidates, g)).softmax(-1) for _ in range(2))
    return base, other, spread * normal(rows, candidates, g)


@THOROUGH
@given(SEEDS, SPREADS, SPREADS, BETAS)
def test_one_steps_regret_is_the_divergence_from_the_policy_to_the_optimum(
    seed, concentration, spread, beta
):
    base, other, values = instance(seed, concentration, spread)
    best = optimal_policy(base, values, beta)
    for policy in (base, other):
        regret = step_regret(policy, base, values, beta)
        torch.testing.assert_close(regret, divergence(policy, best) / beta, atol=1e-9, rtol=1e-7)
        assert (regret >= -1e-9).all()
    torch.testing.assert_close(
        objective(best, base, values, beta), (beta * values + base.log()).logsumexp(-1) / beta
    )


def test_the_other_direction_is_no_identity():
    base, _, values = instance(0, 1.0, 1.0, rows=1000)
    best = optimal_policy(base, values, 1.0)
    regret, forward = step_regret(base, base, values, 1.0), divergence(best, base)
    assert ((regret - forward).abs() > 0.05 * regret).double().mean() > 0.5


def random_subset(tree, share, g):
    """Which states of a tree are steered, by depth."""
    return [torch.rand(len(base), generator=g) < share for base in tree.base]


@THOROUGH
@given(SEEDS, SPREADS, SPREADS, BETAS, st.floats(0, 1))
def test_a_sparse_policy_pays_at_its_own_unsteered_states(seed, concentration, spread, beta, share):
    g = generator(seed)
    tree = Tree.random(3, 3, concentration, spread, g)
    steered = random_subset(tree, share, g)
    policy, optimum = tree.sparse(steered, beta), tree.optimum(beta)
    regret = tree.objective(optimum, beta) - tree.objective(policy, beta)
    by_steps = tree.regret_by_steps(policy, policy, beta)
    torch.testing.assert_close(by_steps, regret, atol=1e-8, rtol=1e-6)
    states = zip(tree.visits(policy), steered, tree.base, optimum, strict=False)
    unsteered = sum(
        (visits * ~on * divergence(base, best)).sum() for visits, on, base, best in states
    )
    torch.testing.assert_close(unsteered / beta, regret, atol=1e-8, rtol=1e-6)
    # the optimum of the tree is the base tilted by the rewards of whole responses
    whole = optimal_policy(tree.visits(list(tree.base))[-1], tree.rewards, beta)
    torch.testing.assert_close(tree.visits(optimum)[-1], whole, atol=1e-9, rtol=1e-6)


def test_under_the_optimums_states_the_sum_is_no_bound():
    """With states as the optimal policy visits them the sum may fall short of the regret."""
    below = 0
    for g in map(generator, range(200)):
        tree = Tree.random(3, 3, 1.0, 2.0, g)
        policy = tree.sparse(random_subset(tree, 0.5, g), 1.0)
        regret = tree.regret_by_steps(policy, policy, 1.0)
        below += bool(tree.regret_by_steps(policy, tree.optimum(1.0), 1.0) < regret - 1e-9)
    assert 20 < below < 180


@THOROUGH
@given(SEEDS, SPREADS, st.floats(0.01, 4.0), BETAS)
def test_no_step_costs_more_than_its_entropy_allows(seed, concentration, value_range, beta):
    g = generator(seed)
    base = (concentration * normal(50, 5, g)).softmax(-1)
    values = value_range * torch.rand(50, 5, generator=g, dtype=torch.float64)
    bound = regret_bound(base, value_range, beta)
    assert (step_regret(base, base, values, beta) <= bound + 1e-9).all()
    assert (bound <= beta * value_range**2 / 8 + 1e-9).all()  # Hoeffding
    # values at the ends of the range cost most
    ends = torch.tensor([*product([0.0, 1.0], repeat=5)][1:-1], dtype=torch.float64)[:, None]
    regret = step_regret(base, base, value_range * ends, beta)
    assert (regret <= bound + 1e-9).all()
    largest = largest_regret((base * ends).sum(-1), value_range, beta)
    torch.testing.assert_close(regret, largest, atol=1e-9, rtol=1e-6)


def test_the_bound_is_reached_by_two_candidates():
    rest = torch.linspace(0.01, 0.5, 20, dtype=torch.float64)
    base = torch.stack([1 - rest, rest], dim=1)
    values = torch.tensor([0.0, 0.3], dtype=torch.float64).expand(20, 2)
    bound, regret = regret_bound(base, 0.3, 1.0), step_regret(base, base, values, 1.0)
    either = torch.maximum(regret, step_regret(base, base, values.flip(1), 1.0))
    torch.testing.assert_close(bound[:-2], either[:-2], atol=1e-12, rtol=1e-3)
    assert (bound[1:] >= bound[:-1] - 1e-12).all()


def test_binary_entropy_is_inverted():
    rest = torch.tensor([1e-6, 0.01, 0.2, 0.5], dtype=torch.float64)
    entropy = -(rest * rest.log() + (1 - rest) * (1 - rest).log())
    torch.testing.assert_close(inverse_binary_entropy(entropy), rest, rtol=1e-6, atol=1e-8)


@THOROUGH
@given(SEEDS, SPREADS, SPREADS, BETAS, st.floats(1e-3, 3.0))
def test_noise_of_any_size_loses_at_most_what_its_range_allows(
    seed, concentration, spread, beta, sigma
):
    """Proposition 2.3, for each draw of the noise: KL(π̂‖π*)/β ≤ β·range²/8.

    And (β/2)·Var under π* as long as β·range is small.
    """
    base, _, values = instance(seed, concentration, spread)
    noise = sigma * normal(*values.shape, generator(seed + 1))
    best = optimal_policy(base, values, beta)
    lost = divergence(optimal_policy(base, values + noise, beta), best) / beta
    width = noise.amax(-1) - noise.amin(-1)
    assert (lost >= -1e-12).all()
    assert (lost <= beta * width.square() / 8 + 1e-9).all()
    variance = (best * noise.square()).sum(-1) - (best * noise).sum(-1).square()
    second_order = beta / 2 * variance
    small = beta * width  # the third cumulant is at most the variance times the width
    close = (lost - second_order).abs() <= (2 / 3 * small + small**2) * second_order + 1e-12
    assert close[small < 0.3].all()


@pytest.mark.parametrize("concentration", [0.3, 1.0, 3.0])
def test_noise_costs_what_second_order_says(concentration):
    base, _, values = instance(1, concentration, 1.0, rows=200)
    g, best = generator(2), optimal_policy(base, values, 1.0)
    lost = [
        divergence(optimal_policy(base, values + 0.1 * normal(*values.shape, g), 1.0), best).mean()
        for _ in range(400)
    ]
    expected = expected_noise_regret(base, values, 1.0, 0.1).mean().item()
    assert torch.stack(lost).mean().item() == pytest.approx(expected, rel=0.05)


def test_surer_policies_suffer_less_from_noise():
    regrets = []
    for concentration in (4.0, 0.2):
        base, _, values = instance(1, concentration, 1.0, rows=500)
        regrets.append(expected_noise_regret(base, values, 1.0, 0.5).mean())
    assert regrets[0] < 0.5 * regrets[1]
