"""Values of candidate tokens: the `Scorer` interface and its implementations."""

from sia.scorers.autoregressive import AutoregressiveScorer
from sia.scorers.base import Scorer, Session, SumScorer
from sia.scorers.implicit import ImplicitRewardScorer
from sia.scorers.process import ProcessRewardScorer, StepTokenScorer
from sia.scorers.q_head import QHead
from sia.scorers.reward import RewardScorer, closing_tokens
from sia.scorers.rollout import RolloutScorer
from sia.scorers.value_model import ValueModel
from sia.scorers.vocabulary_value_model import VocabularyValueModel

__all__ = [
    "AutoregressiveScorer",
    "ImplicitRewardScorer",
    "ProcessRewardScorer",
    "QHead",
    "RewardScorer",
    "RolloutScorer",
    "Scorer",
    "Session",
    "StepTokenScorer",
    "SumScorer",
    "ValueModel",
    "VocabularyValueModel",
    "closing_tokens",
]
