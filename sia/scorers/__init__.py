"""Values of candidate tokens: the `Scorer` interface and its implementations."""

from sia.scorers.autoregressive import AutoregressiveScorer
from sia.scorers.base import Scorer, Session
from sia.scorers.q_head import QHead
from sia.scorers.reward import RewardScorer
from sia.scorers.rollout import RolloutScorer
from sia.scorers.value_model import ValueModel
from sia.scorers.vocabulary_value_model import VocabularyValueModel

__all__ = [
    "AutoregressiveScorer",
    "QHead",
    "RewardScorer",
    "RolloutScorer",
    "Scorer",
    "Session",
    "ValueModel",
    "VocabularyValueModel",
]
