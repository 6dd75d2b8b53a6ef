"""Laws of sia.theory on random instances: identities to rounding, bounds without exception."""

import math

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


def instance(seed, concentration, spread, rows=20, candidates=6):
    g = generator(seed)
    base = (
        concentration * torch.randn(rows, candidates, generator=g, dtype=torch.float64)
    ).softmax(-1)
    other = (
        concentration * torch.randn(rows, candidates, generator=g, dtype=torch.float64)
    ).softmax(-1)
    return base, other, spread * torch.randn(rows, candidates, generator=g, dtype=torch.float64)


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


@THOROUGH
@given(SEEDS, SPREADS, SPREADS, BETAS, st.floats(0, 1))
def test_a_sparse_policy_pays_at_its_own_unsteered_states(seed, concentration, spread, beta, share):
    g = generator(seed)
    for _ in range(4):
        check_sparse_policy(Tree.random(3, 3, concentration, spread, g), beta, share, g)


def check_sparse_policy(tree, beta, share, g):
    steered = [torch.rand(len(base), generator=g) < share for base in tree.base]
    policy, optimum = tree.sparse(steered, beta), tree.optimum(beta)
    regret = tree.objective(optimum, beta) - tree.objective(policy, beta)
    torch.testing.assert_close(
        tree.regret_by_steps(policy, policy, beta), regret, atol=1e-8, rtol=1e-6
    )
    unsteered = sum(
        (reached * ~on * divergence(base, best)).sum()
        for reached, on, base, best in zip(
            tree.visits(policy), steered, tree.base, optimum, strict=False
        )
    )
    torch.testing.assert_close(unsteered / beta, regret, atol=1e-8, rtol=1e-6)
    # the optimum of the tree is the base tilted by the rewards of whole responses
    whole = optimal_policy(tree.visits(list(tree.base))[-1], tree.rewards, beta)
    torch.testing.assert_close(tree.visits(optimum)[-1], whole, atol=1e-9, rtol=1e-6)


def test_under_the_optimums_states_the_sum_is_no_bound():
    """With states as the optimal policy visits them the sum may fall short of the regret."""
    short = 0
    for seed in range(200):
        g = generator(seed)
        tree = Tree.random(3, 3, 1.0, 2.0, g)
        policy = tree.sparse([torch.rand(len(base), generator=g) < 0.5 for base in tree.base], 1.0)
        regret = tree.regret_by_steps(policy, policy, 1.0)
        short += bool(tree.regret_by_steps(policy, tree.optimum(1.0), 1.0) < regret - 1e-9)
    assert 20 < short < 180


@THOROUGH
@given(SEEDS, SPREADS, st.floats(0.01, 4.0), BETAS)
def test_no_step_costs_more_than_its_entropy_allows(seed, concentration, value_range, beta):
    g = generator(seed)
    base = (concentration * torch.randn(50, 5, generator=g, dtype=torch.float64)).softmax(-1)
    values = value_range * torch.rand(50, 5, generator=g, dtype=torch.float64)
    bound = regret_bound(base, value_range, beta)
    assert (step_regret(base, base, values, beta) <= bound + 1e-9).all()
    assert (bound <= beta * value_range**2 / 8 + 1e-9).all()  # Hoeffding
    for subset in range(1, 31):  # values at the ends of the range cost most
        ends = torch.tensor([(subset >> k) & 1 for k in range(5)], dtype=torch.float64)
        regret = step_regret(base, base, value_range * ends.expand(50, 5), beta)
        assert (regret <= bound + 1e-9).all()
        torch.testing.assert_close(
            regret, largest_regret((base * ends).sum(-1), value_range, beta), atol=1e-9, rtol=1e-6
        )


def test_the_bound_is_reached_by_two_candidates():
    rest = torch.linspace(0.01, 0.5, 20, dtype=torch.float64)
    base = torch.stack([1 - rest, rest], dim=1)
    values = torch.tensor([0.0, 0.3], dtype=torch.float64).expand(20, 2)
    bound, regret = regret_bound(base, 0.3, 1.0), step_regret(base, base, values, 1.0)
    either = torch.maximum(regret, step_regret(base, base, values.flip(1), 1.0))
    torch.testing.assert_close(bound[:-2], either[:-2], atol=1e-12, rtol=1e-3)
    assert (bound[1:] >= bound[:-1] - 1e-12).all()


@pytest.mark.parametrize("rest", [1e-6, 0.01, 0.2, 0.5])
def test_binary_entropy_is_inverted(rest):
    entropy = -(rest * math.log(rest) + (1 - rest) * math.log(1 - rest))
    assert inverse_binary_entropy(
        torch.tensor([entropy], dtype=torch.float64)
    ).item() == pytest.approx(rest, rel=1e-6, abs=1e-8)


@THOROUGH
@given(SEEDS, SPREADS, SPREADS, BETAS, st.floats(1e-3, 3.0))
def test_noise_of_any_size_loses_at_most_what_its_range_allows(
    seed, concentration, spread, beta, sigma
):
    """Proposition 2.3, for each draw of the noise: KL(π̂‖π*)/β ≤ β·range²/8, and (β/2)·Var under π* as long as β·range is small."""
    base, _, values = instance(seed, concentration, spread)
    noise = sigma * torch.randn(values.shape, generator=generator(seed + 1), dtype=torch.float64)
    best = optimal_policy(base, values, beta)
    lost = divergence(optimal_policy(base, values + noise, beta), best) / beta
    width = noise.amax(-1) - noise.amin(-1)
    assert (lost >= -1e-12).all()
    assert (lost <= beta * width.square() / 8 + 1e-9).all()
    variance = (best * noise.square()).sum(-1) - (best * noise).sum(-1).square()
    small = beta * width < 0.3
    assert ((lost - beta / 2 * variance).abs() <= 0.7 * beta * width * beta / 2 * variance + 1e-12)[
        small
    ].all()


@pytest.mark.parametrize("concentration", [0.3, 1.0, 3.0])
def test_noise_costs_what_second_order_says(concentration):
    base, _, values = instance(1, concentration, 1.0, rows=200)
    sigma, beta, g = 0.1, 1.0, generator(2)
    best = optimal_policy(base, values, beta)
    noisy = [
        divergence(
            optimal_policy(
                base,
                values + sigma * torch.randn(values.shape, generator=g, dtype=torch.float64),
                beta,
            ),
            best,
        )
        for _ in range(400)
    ]
    measured, expected = (
        torch.stack(noisy).mean().item() / beta,
        expected_noise_regret(base, values, beta, sigma).mean().item(),
    )
    assert measured == pytest.approx(expected, rel=0.05)


def test_surer_policies_suffer_less_from_noise():
    sure, unsure = (
        expected_noise_regret(*(instance(1, c, 1.0, rows=500)[i] for i in (0, 2)), 1.0, 0.5).mean()
        for c in (4.0, 0.2)
    )
    assert sure < 0.5 * unsure
