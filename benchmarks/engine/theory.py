"""Random tabular policies and trees, on which the laws of `sia.theory` are computed exactly."""

from collections.abc import Sequence

import pandas as pd
import torch

from benchmarks.analysis.divergence import NOISES, regret_bounds
from sia import theory

STEPS, TREES, CANDIDATES, DRAWS = 3000, 1000, 10, 64


def random_instances(replicates: Sequence[int]) -> pd.DataFrame:
    """Return the rows of `random_steps` of all replicates, then those of `random_trees`."""
    return pd.concat(
        [
            instances(replicate).assign(replicate=replicate)
            for instances in (random_steps, random_trees)
            for replicate in replicates
        ],
        ignore_index=True,
    )


def random_steps(replicate: int) -> pd.DataFrame:
    """Return random single steps: entropy, regret of not steering, divergences and bounds.

    π comes from normal logits of spread 0 to 4, V is normal of spread 0 to 3, β from 0.1 to 4.
    noise_regret_SD: mean loss, over DRAWS, of steering by V with independent normal errors.
    """
    generator = torch.Generator().manual_seed(replicate)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(STEPS, 1, generator=generator, dtype=torch.float64)

    def normal() -> torch.Tensor:
        return torch.randn(STEPS, CANDIDATES, generator=generator, dtype=torch.float64)

    base = (uniform(0, 4) * normal()).softmax(-1)
    values = uniform(0, 3) * normal()
    betas = uniform(0.1, 4)
    best, beta = theory.optimal_policy(base, values, betas), betas[:, 0]
    reached, left_alone = (theory.objective(p, base, values, beta) for p in (best, base))
    spread, entropy = values.amax(1) - values.amin(1), torch.special.entr(base).sum(-1)
    bound = regret_bounds(entropy.numpy(), spread.numpy(), beta.numpy())
    columns = {
        "entropy": entropy,
        "beta": beta,
        "regret": reached - left_alone,
        "kl_base_optimum": theory.divergence(base, best) / beta,
        "kl_optimum_base": theory.divergence(best, base) / beta,
        "bound": torch.from_numpy(bound),
        "hoeffding": beta * spread**2 / 8,
        # `theory.expected_noise_regret` of SD 1, by β
        "noise_predicted": beta / 2 * (1 - best.square().sum(-1)),
    }
    for size in NOISES:
        noisy = (values + size * normal() for _ in range(DRAWS))
        losses = (theory.divergence(theory.optimal_policy(base, v, betas), best) for v in noisy)
        columns[f"noise_regret_{size:g}"] = (sum(losses) / DRAWS / beta).float()
    table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
    return table.assign(experiment="step")


def random_trees(replicate: int) -> pd.DataFrame:
    """Return the regret of sparse steering on trees of 4 tokens out of 3, and its sums by steps.

    About half of the states are steered, those of highest entropy. β = 1.
    """
    generator, records = torch.Generator().manual_seed(1000 + replicate), []
    for _ in range(TREES):
        tree = theory.Tree.random(4, 3, 1.5, 2.0, generator)
        entropies = [torch.special.entr(base).sum(-1) for base in tree.base]
        middle = torch.cat(entropies).median()
        policy = tree.sparse([entropy >= middle for entropy in entropies], 1.0)
        optimum = tree.optimum(1.0)
        records.append(
            {
                "regret": (tree.objective(optimum, 1.0) - tree.objective(policy, 1.0)).item(),
                "sum_under_own": tree.regret_by_steps(policy, policy, 1.0).item(),
                "sum_under_optimum": tree.regret_by_steps(policy, optimum, 1.0).item(),
                "sum_under_base": tree.regret_by_steps(policy, list(tree.base), 1.0).item(),
            }
        )
    return pd.DataFrame.from_records(records).assign(experiment="tree")
