"""Sparse Inference-time Alignment: steer a language model with a value model, only where it is unsure.

from sia import EntropyGate, Steering, ValueModel, steered_generate

steering = Steering(ValueModel.from_pretrained(path), gate=EntropyGate(threshold=1.0), beta=1.0)
model.generate(**inputs, custom_generate=steered_generate, steering=steering, do_sample=True)
"""

from sia.batch import generate
from sia.calibration import calibrate
from sia.gates import (
    AttentionGate,
    AttentionRiseGate,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Gate,
    Never,
    PositionGate,
    RandomGate,
)
from sia.generation import Generation
from sia.integrations.transformers import steered_generate
from sia.scorers import AutoregressiveScorer, RewardScorer, RolloutScorer, ValueModel
from sia.search import best_of_n, chunk_beam_search
from sia.signals import Attention, Entropy
from sia.steering import Steering

__all__ = [
    "Attention",
    "AttentionGate",
    "AttentionRiseGate",
    "AutoregressiveScorer",
    "Entropy",
    "EntropyGate",
    "EntropyRiseGate",
    "EveryToken",
    "Gate",
    "Generation",
    "Never",
    "PositionGate",
    "RandomGate",
    "RewardScorer",
    "RolloutScorer",
    "Steering",
    "ValueModel",
    "best_of_n",
    "calibrate",
    "chunk_beam_search",
    "generate",
    "steered_generate",
]
__version__ = "0.1.0"
