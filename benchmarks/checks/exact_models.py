"""Models, prompts and numbers that are the same on any machine: what the exact half of `make check` is asked of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import astuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.spec.profile import ModelSize
from benchmarks.subjects.lab import models
from benchmarks.subjects.lab.tokenizer import build_tokenizer
from sia import Generation, ValueModel

FAMILIES = ("qwen3", "llama")
SIZE = ModelSize(hidden_size=32, layers=2, heads=4, key_value_heads=2, feed_forward=48)
VOCABULARY, STEPS = 60, 14
HOW = {"max_new_tokens": STEPS, "progress": False}  # of generating


def fill(model: torch.nn.Module, seed: int, size: float = 0.5) -> torch.nn.Module:
    """Uniform weights in ±size, norms around 1. The bits of NumPy's PCG64 do not depend on the processor."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            weights = torch.from_numpy(rng.uniform(-size, size, parameter.shape))
            parameter.copy_(1 + 0.2 * weights if "norm" in name else weights)
    return model.eval()


def language_model(
    family: str, seed: int = 0, vocabulary: int = VOCABULARY, size: float = 0.5
) -> PreTrainedModel:
    return fill(models.new_language_model(family, SIZE, vocabulary, seed=0).double(), seed, size)


def value_model(family: str, seed: int = 1, vocabulary: int = VOCABULARY) -> ValueModel:
    return fill(
        ValueModel.from_backbone(language_model(family, vocabulary=vocabulary)).double(), seed
    )


def reward_model(family: str, seed: int = 2, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    return fill(
        models.new_reward_model(language_model(family, vocabulary=vocabulary), family).double(),
        seed,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer([f"w{i}" for i in range(6, VOCABULARY)])


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, special ones left out, of different lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(6, VOCABULARY) for _ in range(rng.randint(1, 12))] for _ in range(count)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """float64 in ±2."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(-2, 2, shape))


def described(generations: Sequence[Generation]) -> dict:
    return {
        "tokens": [g.token_ids for g in generations],
        "steered": ["".join("01"[opened] for opened in g.steered.tolist()) for g in generations],
        "unsteered tokens": [g.base_token for g in generations],
        "entropy": [g.entropy for g in generations],
        "kl": [g.kl for g in generations],
        "finished": [bool(g.finished) for g in generations],
        "cost": [astuple(g.cost) for g in generations],
        "reward": [g.reward for g in generations],
        "signals": [
            {repr(signal): values for signal, values in g.signals.items()} for g in generations
        ],
    }
