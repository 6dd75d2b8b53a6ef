"""Models and scorers of a subject, kept at hand in a worker process."""

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import cast

from transformers import PreTrainedModel

from benchmarks.spec.methods import ARGS, AUTOREGRESSIVE, REWARD, ROLLOUT
from benchmarks.spec.model_kinds import BASE, FITTED, ModelKind
from benchmarks.spec.profile import Profile
from benchmarks.subjects import subject_class
from benchmarks.subjects.base import Fitted, Subject
from sia import AutoregressiveScorer, RewardScorer, RolloutScorer
from sia.scorers.base import Scorer


@lru_cache(maxsize=4)
def subject_of(profile: Profile, index: int) -> Subject:
    """Return what is measured: a replicate of the lab, or the models of a Hub profile."""
    return subject_class(profile).open(profile, index)


_cache: OrderedDict[tuple, object] = OrderedDict()  # the most recently used last


def load_cached(subject: Subject, load: Callable, *which: str):
    """Return `load(*which)`, kept for the next call; a subject says how many of its models fit."""
    key = (subject, load.__name__, which)
    if key not in _cache:
        while len(_cache) >= subject.models_kept:
            _cache.popitem(last=False)
        _cache[key] = load(*which)
    _cache.move_to_end(key)
    return _cache[key]


def language_model(subject: Subject, kind: ModelKind | str, family: str) -> PreTrainedModel:
    """Return a language model of the subject."""
    return load_cached(subject, subject.language_model, str(kind), family)


def reward_model(subject: Subject, kind: str) -> PreTrainedModel:
    """Return a reward model of the subject."""
    return load_cached(subject, subject.reward_model, kind)


def fitted(subject: Subject, kind: ModelKind, family: str) -> Fitted:
    """Return what is fitted to the base model and a value model: a gate or a head."""
    return load_cached(subject, subject.fitted, str(kind), family)


def scorer_of(subject: Subject, kind: ModelKind, family: str) -> Scorer:
    """Return what scores candidates: a value model, a head, or the scorer of a baseline."""

    def load_scorer(label: str, family: str) -> Scorer:
        build = SCORERS.get(kind)
        return build(subject, family) if build else subject.value_model(label, family)

    if kind.name in FITTED:
        return cast(Scorer, fitted(subject, kind, family))
    return load_cached(subject, load_scorer, str(kind), family)


def _reward_scorer(subject: Subject, family: str) -> RewardScorer:
    model = language_model(subject, BASE, family)
    return subject.reward_scorer(model, reward_model(subject, REWARD))


def _rollout_scorer(subject: Subject, family: str) -> RolloutScorer:
    model, reward = language_model(subject, BASE, family), _reward_scorer(subject, family)
    tokens, candidates = subject.profile.sweep.rollout_tokens, subject.profile.decoding.candidates
    return RolloutScorer(model, reward, tokens, candidates=candidates)


def _autoregressive_scorer(subject: Subject, family: str) -> AutoregressiveScorer:
    return AutoregressiveScorer(language_model(subject, AUTOREGRESSIVE, family))


# scorers of baselines (`benchmarks.spec.methods`); all others are value models
SCORERS: dict[ModelKind, Callable[[Subject, str], Scorer]] = {
    ARGS: _reward_scorer,
    ROLLOUT: _rollout_scorer,
    AUTOREGRESSIVE: _autoregressive_scorer,
}
