"""Inputs of models: padded token ids, and the tokens that end a response."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig


def pad_left(ids: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, padded on the left, both int64 `(rows, longest)`."""
    input_ids, mask = pad_right([row[::-1] for row in ids], device)
    return input_ids.flip(1), mask.flip(1)


def pad_right(
    sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu", padding: int = 0
) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, padded on the right, both int64 `(rows, longest)`."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.tensor(
        [[*sequence, *[padding] * (longest - len(sequence))] for sequence in sequences],
        device=device,
    )
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    return input_ids, (torch.arange(longest, device=device) < lengths[:, None]).long()


def eos_token_ids(config: GenerationConfig, further: int | None = None) -> list[int]:
    """Return the tokens that end a response: those of the config, and `further` if it is given."""
    configured = config.eos_token_id
    ids = {*(configured if isinstance(configured, (list, tuple)) else [configured]), further}
    return sorted(token for token in ids if token is not None)
