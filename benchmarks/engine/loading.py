"""Models and scorers of a subject, kept at hand in a worker process."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache, partial

from transformers import PreTrainedModel

from benchmarks.spec.model_kinds import ModelKind
from benchmarks.spec.profile import Profile
from benchmarks.subjects import subject_class
from benchmarks.subjects.base import Subject
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


def scorer_of(subject: Subject, kind: ModelKind, family: str) -> Scorer:
    """Return what scores candidates: a value model, or the scorer of a baseline."""

    def load_scorer(kind: str, family: str) -> Scorer:
        models = partial(language_model, subject), partial(reward_model, subject)
        return subject.scorer(kind, family, *models)

    return load_cached(subject, load_scorer, str(kind), family)
