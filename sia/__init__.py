"""Sparse Inference-time Alignment: steer a language model only where it is uncertain.

from sia import EntropyGate, SteeredGenerate, Steering, ValueModel

steering = Steering(ValueModel.from_pretrained(path), gate=EntropyGate(threshold=1.0))
model.generate(**inputs, custom_generate=SteeredGenerate(steering), do_sample=True)
"""

from sia.batch import generate
from sia.calibration import calibrate
from sia.cost import Cost
from sia.fitting import (
    HeadFit,
    JunctionFit,
    fit_junction_gate,
    fit_q_head,
    fit_vocabulary_value_model,
)
from sia.gates import (
    GATES,
    AttentionGate,
    AttentionRiseGate,
    DivergenceGate,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Gate,
    JunctionGate,
    Never,
    PositionGate,
    RandomGate,
    Step,
    ThresholdGate,
)
from sia.generation import Generation
from sia.integrations.transformers import SteeredGenerate, SteeredOutput, steered_generate
from sia.likelihood import Likelihood, log_likelihoods
from sia.scorers import (
    AutoregressiveScorer,
    ImplicitRewardScorer,
    ProcessRewardScorer,
    QHead,
    RewardScorer,
    RolloutScorer,
    Scorer,
    Session,
    StepTokenScorer,
    SumScorer,
    ValueModel,
    VocabularyValueModel,
    closing_tokens,
)
from sia.search import best_of_n, chunk_beam_search
from sia.signals import Attention, Divergence, Entropy, PredictedDivergence, Signal
from sia.steering import Steering
from sia.training import distill

__all__ = [
    "GATES",
    "Attention",
    "AttentionGate",
    "AttentionRiseGate",
    "AutoregressiveScorer",
    "Cost",
    "Divergence",
    "DivergenceGate",
    "Entropy",
    "EntropyGate",
    "EntropyRiseGate",
    "EveryToken",
    "Gate",
    "Generation",
    "HeadFit",
    "ImplicitRewardScorer",
    "JunctionFit",
    "JunctionGate",
    "Likelihood",
    "Never",
    "PositionGate",
    "PredictedDivergence",
    "ProcessRewardScorer",
    "QHead",
    "RandomGate",
    "RewardScorer",
    "RolloutScorer",
    "Scorer",
    "Session",
    "Signal",
    "SteeredGenerate",
    "SteeredOutput",
    "Steering",
    "Step",
    "StepTokenScorer",
    "SumScorer",
    "ThresholdGate",
    "ValueModel",
    "VocabularyValueModel",
    "best_of_n",
    "calibrate",
    "chunk_beam_search",
    "closing_tokens",
    "distill",
    "fit_junction_gate",
    "fit_q_head",
    "fit_vocabulary_value_model",
    "generate",
    "log_likelihoods",
    "steered_generate",
]
__version__ = "0.2.0"
