"""Models with the same weights on every machine, and prompts for them."""

import random

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.spec.profile import ModelSize
from benchmarks.subjects.lab import models
from sia import ValueModel
from tests.helpers.tiny import VOCABULARY

SIZE = ModelSize(hidden_size=32, layers=2, heads=4, key_value_heads=2, feed_forward=48)
# float32 sums in another order, and numbers written with five digits
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def fill(model: torch.nn.Module, seed: int, size: float = 0.5) -> torch.nn.Module:
    """Set uniform weights in ±size, norms around 1, by NumPy's generator."""
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
    backbone = language_model(family, vocabulary=vocabulary)
    return fill(ValueModel.from_backbone(backbone).double(), seed)


def reward_model(family: str, seed: int = 2, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    model = models.new_reward_model(language_model(family, vocabulary=vocabulary), family)
    return fill(model.double(), seed)


def prompts(count: int) -> list[list[int]]:
    """Random token ids, special ones left out, of different lengths."""
    rng = random.Random(0)
    return [[rng.randrange(6, VOCABULARY) for _ in range(rng.randint(1, 12))] for _ in range(count)]
