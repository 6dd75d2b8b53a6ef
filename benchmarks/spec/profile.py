"""Profiles: everything that decides the numbers of a run, read from profiles/NAME.toml into frozen dataclasses.

A `LabProfile` trains its own models in its own world; a `HubProfile` names models and prompt sets of the Hub, or local ones.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

JUDGE_METRICS = ("judge", "content", "fluency_errors")  # scores of the lab's judge
PROFILES = Path(__file__).with_name("profiles")


@dataclass(frozen=True)
class ModelSize:
    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    feed_forward: int


@dataclass(frozen=True)
class Training:
    """documents: of the base corpus, one pass. sampled_prompts: per family, two base responses each; half of the prompts
    serve the reward model, half the evaluation reward model, all of them the value models. reward_scale: standard
    deviation of the rewards at distillation. favourites: share of the samples that instruct models are trained on.
    autoregressive_scale: of the log-likelihoods in the preference loss of autoregressive reward models.
    early: share of the samples that under-trained value models see, once. world_documents: of another world's corpus, that the base
    goes on to learn; world_prompts: to which its responses are sampled for its value models."""

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
    autoregressive_scale: float
    early: float
    world_documents: int
    world_prompts: int
    heldout_prompts: int

    def __post_init__(self) -> None:
        _require(
            0 < self.favourites <= 1,
            "training.favourites must be a share above 0, at most 1",
            self.favourites,
        )
        _require(
            0 < self.early <= 1, "training.early must be a share above 0, at most 1", self.early
        )
        for name, number in asdict(self).items():
            _require(number > 0, f"training.{name} must be above 0", number)


@dataclass(frozen=True)
class OtherWorld:
    """How a world differs whose corpus the base model goes on to learn. Fields: see `WorldConfig` of the lab."""

    name: str
    decoys: float
    habits: tuple[float, ...]
    drift: float


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
    validation_samples: int

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            _require(count >= 1, f"evaluation.{name} must be at least 1", count)


@dataclass(frozen=True)
class Sweep:
    """What the figures sweep. ratios: shares of tokens to steer, dense apart. claimed: those that stand for the paper's 20% to
    80%; few: those that are combined with searches and other models. betas: of the whole grid; tuning: those among which the best is
    chosen on validation prompts (none: nothing is tuned, every method has β = 1).
    thresholds: τ in nats. floors: base probabilities that candidates need on steered steps.
    responses: the most that best-of-N chooses from, a power of 2; beams: responses that chunk beam search keeps at once (CBS-8: 8),
    `beam_width` of them after each `chunk` tokens. rollout_tokens, rollout_prompts: of Transfer Q*. probes: states of each
    objective whose candidates are rolled out `probe_rollouts` times, to know what they are worth."""

    ratios: tuple[float, ...]
    claimed: tuple[float, ...]
    few: tuple[float, ...]
    betas: tuple[float, ...]
    tuning: tuple[float, ...]
    thresholds: tuple[float, ...]
    floor: float
    responses: int
    beams: int
    beam_width: int
    chunk: int
    rollout_tokens: int
    rollout_prompts: int
    probes: int
    probe_rollouts: int

    def __post_init__(self) -> None:
        _require(
            bool(self.ratios) and all(0 < r < 1 for r in self.ratios),
            "sweep.ratios must lie between 0 and 1",
            self.ratios,
        )
        for name in ("claimed", "few"):
            some = getattr(self, name)
            _require(
                bool(some) and set(some) <= set(self.ratios),
                f"sweep.{name} must be some of sweep.ratios",
                some,
            )
        _require(
            min(self.betas, default=0) > 0 and 1.0 in self.betas,
            "sweep.betas must be numbers above 0, 1.0 among them",
            self.betas,
        )
        _require(
            set(self.tuning) <= set(self.betas),
            "sweep.tuning must be some of sweep.betas",
            self.tuning,
        )
        _require(
            1.0 in self.thresholds and min(self.thresholds) >= 0,
            "sweep.thresholds must be nats, 1.0 among them",
            self.thresholds,
        )
        _require(0 < self.floor < 1, "sweep.floor must lie between 0 and 1", self.floor)
        _require(
            self.responses >= self.beams and self.responses.bit_count() == 1,
            "sweep.responses must be a power of 2, at least sweep.beams",
            self.responses,
        )
        _require(
            self.beams % self.beam_width == 0,
            "sweep.beams must be a multiple of sweep.beam_width",
            self.beams,
        )


@dataclass(frozen=True)
class Statistics:
    resamples: int
    level: float
    seed: int

    def __post_init__(self) -> None:
        _require(0 < self.level < 1, "statistics.level must lie between 0 and 1", self.level)
        _require(self.resamples >= 1, "statistics.resamples must be at least 1", self.resamples)


@dataclass(frozen=True)
class Profile(ABC):
    """What every figure needs to know, whatever is measured.

    Attributes:
        replicates: Worlds with their own training; 1 where the models are given.
        families: Of models, as figures name them.
        subject: Folder of `benchmarks.subjects` that holds what is measured.
        trains_models: True if a run trains its own models.
        score: Metric that figures show first and that selects β.
        reward_label: Label of the reward on an axis.
        worker: Device that one response is timed on.
        words: True if every token is a word.
        token_dtype: Integer type that holds every token id.
    """

    name: str
    replicates: int
    families: tuple[str, ...]
    decoding: Decoding
    evaluation: Evaluation
    sweep: Sweep
    statistics: Statistics
    subject: ClassVar[str]
    trains_models: ClassVar[bool]
    score: ClassVar[str]
    reward_label: ClassVar[str]
    worker: ClassVar[str]
    words: ClassVar[bool]
    token_dtype: ClassVar[str]

    @property
    @abstractmethod
    def description(self) -> str:
        """Sentences that tell readers of the report what was measured."""

    @property
    @abstractmethod
    def losses(self) -> tuple[str, ...]:
        """Losses of the value models, "token" or "mean"; figures with one loss show the first."""

    @abstractmethod
    def has(self, kind: str) -> bool:
        """Return True if there is a model of this kind (instruct, reward, base-small, …)."""

    @abstractmethod
    def size(self, kind: str) -> float:
        """Return the size of the model of this kind, to compare it with others."""

    @property
    def prompts_per_shard(self) -> int | None:
        """Prompts that a worker takes at once; None: all of an objective."""
        return None

    @property
    def on_gpu(self) -> bool:
        """True if the models run on a GPU."""
        return False

    def available_metrics(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return those of the metrics `names` that rows have; the score stands for "judge"."""
        return tuple(names)

    def decisive_settings(self) -> dict:
        """Return the settings that decide the numbers, as JSON types."""
        return asdict(self)

    def lacks(self, figure: str) -> str:
        """Why a figure cannot be measured under this profile; empty if it can."""
        return ""


@dataclass(frozen=True)
class LabProfile(Profile):
    """model: size of the usual models; small, large: further sizes. worlds: that the base model goes on to learn."""

    model: ModelSize
    small: ModelSize
    large: ModelSize
    training: Training
    worlds: tuple[OtherWorld, ...]
    subject = "lab"
    trains_models = True
    score = "judge"
    reward_label = "evaluation reward (SD)"
    worker = "one core"
    words = True
    token_dtype = "int16"
    description = (
        "The lab: a world that the project makes itself, models of some hundred thousand "
        "parameters trained from nothing, and a judge that scores responses from −5 to 5. Small "
        "models in a small world can show that a claim is not general, or when it holds; they "
        "cannot show what an 8-billion-parameter model does."
    )

    @property
    def losses(self) -> tuple[str, ...]:
        return ("token", "mean")

    def has(self, kind: str) -> bool:
        return True

    def size(self, kind: str) -> float:
        model = {"small": self.small, "large": self.large}.get(kind.rpartition("-")[2], self.model)
        return float(model.hidden_size)


@dataclass(frozen=True)
class Source:
    """Where a model is: `id`, of the Hub or a local folder, at a revision, in a subfolder. backbone: of a value model in the published
    layout (NAME, or NAME@REVISION), whose tokenizer and template it has too; elsewhere the
    source's own. billions: of parameters, where sizes are compared."""

    id: str
    revision: str = "main"
    subfolder: str = ""
    backbone: str = ""
    billions: float = 0.0


@dataclass(frozen=True)
class PromptSets:
    """Which prompts stand for each objective: a name of `benchmarks.subjects.hub.prompts.PROMPT_SETS`, or NAME=FILE for a local copy.
    longest: tokens; prompts beyond that are skipped, and counted. per_shard: prompts that a worker takes at once."""

    harmlessness: str
    helpfulness: str
    honesty: str
    longest: int
    per_shard: int

    def __post_init__(self) -> None:
        for name in ("longest", "per_shard"):
            _require(
                getattr(self, name) >= 1, f"prompts.{name} must be at least 1", getattr(self, name)
            )


@dataclass(frozen=True)
class Hardware:
    """On what a run measures. device: cpu or cuda. dtype: of the models. batch_size: responses decoded together."""

    device: str
    dtype: str
    batch_size: int


@dataclass(frozen=True)
class HubProfile(Profile):
    """models: by kind: base, instruct, value-mean or value-token, reward (which searches and ARGS ask), evaluation-reward, and
    base-SIZE, value-LOSS-SIZE (small, large) for weak-to-strong. hardware: of this run, no part of the profile."""

    models: dict[str, Source]
    prompts: PromptSets
    hardware: Hardware | None = None
    subject = "hub"
    trains_models = False
    score = "reward"
    reward_label = "evaluation reward"
    worker = "one worker"
    words = False
    token_dtype = "int32"

    def __post_init__(self) -> None:
        for kind in ("base", "evaluation-reward"):
            _require(
                kind in self.models,
                f"profile {self.name} must name models.{kind}",
                sorted(self.models),
            )
        _require(
            bool(self.losses),
            f"profile {self.name} must name models.value-mean or models.value-token",
            sorted(self.models),
        )
        _require(
            len(self.families) == 1,
            f"families of {self.name} must be one, the name of its models in figures",
            self.families,
        )
        _require(
            self.replicates == 1,
            f"replicates of {self.name} must be 1: its models are given",
            self.replicates,
        )

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def losses(self) -> tuple[str, ...]:
        return tuple(loss for loss in ("mean", "token") if f"value-{loss}" in self.models)

    @property
    def description(self) -> str:
        return f"Models and prompt sets of the Hub, as the profile {self.name} names them."

    def has(self, kind: str) -> bool:
        return kind in self.models

    def size(self, kind: str) -> float:
        return self.models[kind].billions

    @property
    def prompts_per_shard(self) -> int | None:
        return self.prompts.per_shard

    @property
    def on_gpu(self) -> bool:
        return self.hardware is not None and self.hardware.device == "cuda"

    def available_metrics(self, names: Sequence[str]) -> tuple[str, ...]:
        renamed = (self.score if name == "judge" else name for name in names)
        return tuple(dict.fromkeys(name for name in renamed if name not in JUDGE_METRICS))

    def decisive_settings(self) -> dict:
        return asdict(replace(self, hardware=None))


TABLES = {
    LabProfile: {"model": ModelSize, "small": ModelSize, "large": ModelSize, "training": Training},
    HubProfile: {"prompts": PromptSets},
}
SHARED_TABLES = {
    "decoding": Decoding,
    "evaluation": Evaluation,
    "sweep": Sweep,
    "statistics": Statistics,
}


def load_profile(name: str) -> Profile:
    """A profile that names [models] is one of the Hub, any other one of the lab. One that is `like` another differs in what it names.

    Errors: ValueError for an unknown profile (with the list), and for a missing or unknown setting.
    """
    known = sorted(path.stem for path in PROFILES.glob("*.toml"))
    if name not in known:
        raise ValueError(f"unknown profile {name!r}, expected one of: {', '.join(known)}")
    values = _values(name)
    kind = HubProfile if "models" in values else LabProfile
    for key, table in (TABLES[kind] | SHARED_TABLES).items():
        values[key] = _read(table, values.get(key, {}), f"{name}.toml [{key}]")
    if kind is HubProfile:
        values["models"] = {
            key: _read(Source, source, f"{name}.toml [models.{key}]")
            for key, source in values["models"].items()
        }
    else:
        values["worlds"] = [
            _read(OtherWorld, world, f"{name}.toml [[worlds]]")
            for world in values.get("worlds", [])
        ]
    return _read(kind, values | {"name": name}, f"{name}.toml")


def _values(name: str) -> dict:
    values = tomllib.loads((PROFILES / f"{name}.toml").read_text(encoding="utf-8"))
    if "like" not in values:
        return values
    common = _values(values.pop("like"))
    return common | {
        key: common.get(key, {}) | value if isinstance(value, dict) else value
        for key, value in values.items()
    }


def _read(table: type, values: dict, where: str):
    names = {field.name for field in fields(table)}
    needed = {field.name for field in fields(table) if field.default is MISSING}
    wrong = [f"missing {key}" for key in sorted(needed - set(values))] + [
        f"unknown {key}" for key in sorted(set(values) - names)
    ]
    if wrong:
        raise ValueError(f"profile {where}: {', '.join(wrong)}")
    return table(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    )


def _require(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}, got {got}")


def digest(*parts: object) -> str:
    """16 hexadecimal digits of the SHA-256 of `parts` as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def profile_digest(profile: Profile) -> str:
    """Return the digest of the settings that decide a profile's numbers."""
    return digest(profile.decisive_settings())
