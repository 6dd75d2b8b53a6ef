"""Rewards and log-likelihoods of whole sequences, computed in batches of like length."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sia import RewardScorer
from sia._inputs import pad_right
from sia._kv_cache import check_positions

LOGITS_AT_ONCE = 2**28


def pad_from(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Pad sequences on the right.

    Returns:
        input_ids and, bool, the tokens from `starts` on; both `(sequences, longest)`.
    """
    input_ids, tokens = pad_right(sequences, device)
    positions = torch.arange(input_ids.shape[1], device=device)
    return input_ids, tokens.bool() & (positions >= torch.tensor(starts, device=device)[:, None])


def log_likelihoods(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> Tensor:
    """Return Σ ln π(token) over the tokens from `starts` on, in nats, `(sequences,)`."""
    input_ids, counted = pad_from(sequences, starts, model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    ).view(len(sequences), -1)
    return -(losses * counted[:, 1:]).sum(1)


def positions_at_once(device: torch.device) -> int:
    """Return the number of token positions to compute together.

    On a processor it is what its caches hold, which takes two thirds of the time of many.
    """
    return 2**11 if device.type == "cpu" else 2**15


def batches_by_length(
    lengths: Sequence[int], positions: int, rows: int = 256
) -> Iterator[list[int]]:
    """Yield indices of sequences to compute together, by ascending length.

    A batch has at most `rows` sequences and at most `positions` tokens, padding included.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[i] > positions):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def trajectory_rewards(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], positions: int | None = None
) -> np.ndarray:
    """Return the reward of each whole conversation, as `RewardScorer` reads it, float64.

    Args:
        model: The reward model.
        sequences: Token ids of the conversations.
        positions: Token positions to compute together; None for `positions_at_once`.

    Raises:
        ValueError: For a conversation that is longer than the model has positions for.
    """
    scorer = RewardScorer(model, 0)  # whole conversations bring their own end
    rewards = np.zeros(len(sequences))
    lengths = [len(sequence) for sequence in sequences]
    check_positions(model, max(lengths, default=0))
    positions = positions or positions_at_once(model.device)
    for batch in batches_by_length(lengths, positions):
        whole = [sequences[i] for i in batch]
        if scorer.head is None:
            rewards[batch] = scorer.read_whole(whole).cpu().numpy()
            continue
        input_ids, tokens = pad_right(whole, model.device)
        # padding is on the right and attention is causal: no token sees it
        every = scorer.read(last=input_ids.shape[1], past_key_values=None, input_ids=input_ids)
        last = every.gather(1, tokens.sum(1, keepdim=True) - 1).squeeze(1)
        rewards[batch] = last.cpu().numpy()
    return rewards


def require_finite(rewards: Iterable[float], rated: Iterable[object]) -> None:
    """Raise FloatingPointError, which shows what is rated, for a reward that is not finite."""
    for reward, what in zip(rewards, rated, strict=True):
        if not math.isfinite(reward):
            raise FloatingPointError(f"rewards must be finite, the model gives {reward} for {what}")


@torch.no_grad()
def sequence_log_likelihoods(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> np.ndarray:
    """Return `log_likelihoods` of many sequences, float64 `(sequences,)`."""
    likelihoods = np.zeros(len(sequences))
    vocabulary = model.config.get_text_config().vocab_size
    positions = min(positions_at_once(model.device), LOGITS_AT_ONCE // vocabulary)
    for batch in batches_by_length([len(sequence) for sequence in sequences], positions):
        of_batch = log_likelihoods(model, [sequences[i] for i in batch], [starts[i] for i in batch])
        likelihoods[batch] = of_batch.cpu().numpy()
    return likelihoods
