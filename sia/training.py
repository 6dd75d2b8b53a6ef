"""Training a value model from trajectory rewards.

Two losses, both of which have seen nothing but one reward R per response (V_t: value at response token t):
  "mean"   (mean_t V_t − R)²   the paper's (Hu et al., arXiv 2602.21215): the mean of the token values matches the reward
  "token"  mean_t (V_t − R)²   every token's value predicts the reward of what it is part of
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from sia._inputs import pad_right
from sia.scorers.value_model import ValueModel

Loss = Literal["mean", "token"]


def distillation_loss(values: Tensor, response_mask: Tensor, rewards: Tensor, loss: Loss) -> Tensor:
    """The loss, averaged over the batch. values, response_mask: `(batch, length)`; rewards: `(batch,)`."""
    if loss not in get_args(Loss):
        raise ValueError(f'loss must be "mean" or "token", got {loss!r}')
    weights = response_mask / response_mask.sum(1, keepdim=True)
    if loss == "mean":
        return ((values * weights).sum(1) - rewards).square().mean()
    return ((values - rewards[:, None]).square() * weights).sum(1).mean()


def distill(
    value_model: ValueModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rewards: Sequence[float],
    *,
    loss: Loss,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    weight_decay: float = 1e-4,
    progress: Callable[[int], None] = lambda tokens: None,
) -> ValueModel:
    """Trains `value_model` in place with AdamW, a cosine schedule and gradients clipped at norm 1; returns it in eval mode.

    prompts, responses: token ids; a response should end in the end-of-sequence token. rewards: one per response.
    seed: of the order of the examples. progress: called with the number of tokens of each batch.
    """
    if not len(prompts) == len(responses) == len(rewards):
        raise ValueError(
            f"prompts, responses and rewards must be as many, got {len(prompts)}, {len(responses)} and {len(rewards)}"
        )
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    targets = torch.tensor(rewards, dtype=torch.float32, device=value_model.device)

    def batch_loss(indices: list[int]) -> Tensor:
        input_ids, response_mask = pad_pairs(
            [prompts[i] for i in indices], [responses[i] for i in indices], value_model.device
        )
        # padding is on the right and attention is causal: no token sees it, and no mask is needed
        return distillation_loss(value_model(input_ids), response_mask, targets[indices], loss)

    batches = list(
        epoch_batches([len(s) for s in sequences], batch_size, epochs, random.Random(seed))
    )
    optimise(
        value_model,
        batches,
        batch_loss,
        learning_rate,
        weight_decay,
        lambda indices: progress(sum(len(sequences[i]) for i in indices)),
    )
    return value_model


def pad_pairs(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """input_ids of prompts with their responses, padded on the right, and where the response tokens are, both int64 `(batch, longest)`."""
    input_ids, tokens = pad_right(
        [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)], device
    )
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return input_ids, tokens * (torch.arange(input_ids.shape[1], device=device) >= starts[:, None])


def optimise(
    model: nn.Module,
    batches: Sequence[list[int]],
    batch_loss: Callable[[list[int]], Tensor],
    learning_rate: float,
    weight_decay: float,
    progress: Callable[[list[int]], None],
) -> None:
    """AdamW over `batches` of example numbers, 5% warm-up, cosine to zero, gradient norm at most 1. Ends in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    model.train()
    for indices in batches:
        loss = batch_loss(indices)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(indices)
    model.eval()


def epoch_batches(
    lengths: Sequence[int], batch_size: int, epochs: int, rng: random.Random
) -> Iterator[list[int]]:
    """Batches of example numbers, each example once an epoch, of similar length within a batch, in random order."""
    for _ in range(epochs):
        order = rng.sample(range(len(lengths)), len(lengths))
        batches = []
        for start in range(0, len(order), 32 * batch_size):
            bucket = sorted(order[start : start + 32 * batch_size], key=lambda i: lengths[i])
            batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        yield from rng.sample(batches, len(batches))
