"""Sparse Inference-time Alignment: steer a language model with a value model, only where it is unsure.

from sia import EntropyGate, Steering, ValueModel, steered_generate

steering = Steering(ValueModel.from_pretrained(path), gate=EntropyGate(threshold=1.0), beta=1.0)
model.generate(**inputs, custom_generate=steered_generate, steering=steering, do_sample=True)
"""

from sia.decoding import generate, steered_generate
from sia.gates import EntropyGate, EveryToken, Never, RandomGate, calibrate
from sia.steering import Steering
from sia.trace import Generation
from sia.values import ValueModel

__all__ = [
    "EntropyGate",
    "EveryToken",
    "Generation",
    "Never",
    "RandomGate",
    "Steering",
    "ValueModel",
    "calibrate",
    "generate",
    "steered_generate",
]
__version__ = "0.1.0"
