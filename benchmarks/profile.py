"""Profiles: everything that decides the numbers of a run, read from profiles/NAME.toml into frozen dataclasses."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

PROFILES = Path(__file__).with_name("profiles")


@dataclass(frozen=True)
class ModelSize:
    """Of every lab model, whatever its family."""

    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    feed_forward: int


@dataclass(frozen=True)
class Training:
    """documents: of the base corpus, one pass. sampled_prompts: per family, two base responses each; half of the prompts
    serve the reward model, half the evaluation reward model, all of them the value models. reward_scale: standard
    deviation of the rewards at distillation. favourites: share of the samples that instruct models are trained on."""

    documents: int
    batch_size: int
    base_learning_rate: float
    learning_rate: float
    sampled_prompts: int
    reward_epochs: int
    value_epochs: int
    reward_scale: float
    favourites: float
    instruct_epochs: int
    heldout_prompts: int

    def __post_init__(self) -> None:
        _require(0 < self.favourites <= 1, "training.favourites must be a share above 0, at most 1", self.favourites)
        for name, number in asdict(self).items():
            _require(number > 0, f"training.{name} must be above 0", number)


@dataclass(frozen=True)
class Decoding:
    max_new_tokens: int
    temperature: float
    candidates: int
    batch_size: int


@dataclass(frozen=True)
class Evaluation:
    prompts_per_objective: int
    samples: int
    validation_prompts_per_objective: int
    best_of: int

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            _require(count >= 1, f"evaluation.{name} must be at least 1", count)


@dataclass(frozen=True)
class Figure2:
    """What figure 2 sweeps. targets: shares of tokens to steer, 1.0 (dense) among them. claimed: those that stand for the
    paper's 20% to 80%. betas: tried on validation prompts."""

    targets: tuple[float, ...]
    claimed: tuple[float, ...]
    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        _require(
            1.0 in self.targets and all(0 < t <= 1 for t in self.targets), "figure2.targets must be ratios up to and with 1.0", self.targets
        )
        known = bool(self.claimed) and set(self.claimed) <= set(self.targets) - {1.0}
        _require(known, "figure2.claimed must be some of the targets below 1.0", self.claimed)
        _require(bool(self.betas) and min(self.betas) > 0, "figure2.betas must be numbers above 0", self.betas)


@dataclass(frozen=True)
class Statistics:
    resamples: int
    level: float
    seed: int

    def __post_init__(self) -> None:
        _require(0 < self.level < 1, "statistics.level must lie between 0 and 1", self.level)
        _require(self.resamples >= 1, "statistics.resamples must be at least 1", self.resamples)


@dataclass(frozen=True)
class Profile:
    name: str
    replicates: int
    families: tuple[str, ...]
    model: ModelSize
    training: Training
    decoding: Decoding
    evaluation: Evaluation
    figure2: Figure2
    statistics: Statistics


def load_profile(name: str) -> Profile:
    """Errors: ValueError for an unknown profile (with the list), and for a missing or unknown setting."""
    known = sorted(path.stem for path in PROFILES.glob("*.toml"))
    if name not in known:
        raise ValueError(f"unknown profile {name!r}, expected one of: {', '.join(known)}")
    values = tomllib.loads((PROFILES / f"{name}.toml").read_text(encoding="utf-8"))
    tables = {
        "model": ModelSize,
        "training": Training,
        "decoding": Decoding,
        "evaluation": Evaluation,
        "figure2": Figure2,
        "statistics": Statistics,
    }
    for key, table in tables.items():
        values[key] = _read(table, values.get(key, {}), f"{name}.toml [{key}]")
    return _read(Profile, values | {"name": name}, f"{name}.toml")


def _read(table: type, values: dict, where: str):
    names = {field.name for field in fields(table)}
    wrong = [f"missing {key}" for key in sorted(names - set(values))] + [f"unknown {key}" for key in sorted(set(values) - names)]
    if wrong:
        raise ValueError(f"profile {where}: {', '.join(wrong)}")
    return table(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _require(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}, got {got}")


def digest(*parts: object) -> str:
    """16 hexadecimal digits of the SHA-256 of `parts` as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def profile_digest(profile: Profile) -> str:
    return digest(asdict(profile))
