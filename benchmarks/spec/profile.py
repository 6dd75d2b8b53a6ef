"""Profiles: everything that decides the numbers of a run, read from profiles/NAME.toml.

A `LabProfile` trains its own models in its own world; a `HubProfile` names models and prompt sets
of the Hub, or local ones. Both are frozen dataclasses, whose types and ranges hold once read.
"""

import hashlib
import json
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from os.path import expanduser
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import override

from benchmarks.spec.methods import EVALUATION_REWARD, METHODS, REWARD
from benchmarks.spec.model_kinds import (
    BASE,
    FITTED,
    LOSSES,
    SIZES,
    ModelKind,
    teacher_of,
    value_kind,
)

PROFILES = Path(__file__).with_name("profiles")
LIMITED = "-limit"  # in the name of a trial, before the number of prompts
# where a model that is an adapter, or a published value model, names its backbone
NAMING_FILES = ("model_config.json", "adapter_config.json", "lora_weights/adapter_config.json")
BACKBONE_KEYS = (
    "base_model_name_or_path", "base_model_name", "base_model", "model_name_or_path", "model_name",
)  # fmt: skip
JUDGE_METRICS = ("judge", "fluency_errors")  # scores of the lab's judge

Count = Annotated[int, Field(ge=1)]
# what rows count in one byte, and in two
SmallCount = Annotated[int, Field(ge=1, le=127)]
MediumCount = Annotated[int, Field(ge=1, le=32767)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Strength = Annotated[float, Field(gt=0)]  # β: infinity stands for values alone
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
LAB_MODELS = (  # names of the models that the lab trains
    BASE.name, "value", "instruct", "instruct-reward", REWARD, EVALUATION_REWARD,
    "autoregressive-reward", *FITTED,
)  # fmt: skip
# models that a profile of the Hub may name: of every size, and what the methods need
HUB_MODELS = (
    *(str(ModelKind("base", size=size)) for size in ("", *SIZES)),
    *(str(value_kind(loss, size)) for loss, size in product(LOSSES, ("", *SIZES))),
    *(str(ModelKind(name, loss)) for name, loss in product(FITTED, LOSSES)),
    *dict.fromkeys(kind for method in METHODS for kind in method.needs),
    EVALUATION_REWARD,
)


@dataclass(frozen=True)
class ModelSize:
    """Shape of a lab model."""

    hidden_size: Count
    layers: Count
    heads: Count
    key_value_heads: Count
    feed_forward: Count


@dataclass(frozen=True)
class Training:
    """Training of the lab's models.

    Attributes:
        documents: Documents of the base corpus, read once.
        sampled_prompts: Prompts that each family's base answers twice. Half of them serve the
            reward model, half the evaluation reward model, all of them the value models.
        reward_scale: Standard deviation of the rewards that value models learn from.
        best_fraction: Share of the samples, the best ones, that instruct models are trained on.
        autoregressive_scale: Factor of the log-likelihoods in the preference loss of
            autoregressive reward models.
        world_documents: Documents of another world's corpus that the base goes on to learn.
        world_prompts: Prompts that it answers there for its value models.
        heldout_prompts: Prompts for the quality of the models.
    """

    documents: Count
    batch_size: Count
    base_learning_rate: Positive
    learning_rate: Positive
    sampled_prompts: Count
    reward_epochs: Count
    value_epochs: Count
    reward_scale: Positive
    best_fraction: Share
    instruct_epochs: Count
    autoregressive_scale: Positive
    world_documents: Count
    world_prompts: Count
    heldout_prompts: Count


@dataclass(frozen=True)
class OtherWorld:
    """World whose corpus the base model goes on to learn; see `WorldConfig` of the lab."""

    name: str
    decoys: NonNegative
    habits: Annotated[tuple[Probability, ...], Field(min_length=1)]
    drift: Probability


@dataclass(frozen=True)
class Language:
    """Language of the lab's world.

    Attributes:
        lexicon: Name of the file of `benchmarks/subjects/lab/lexicons` with words and sentences.
        pieces: Size of the vocabulary of subword tokens; 0: every word is a token.
        stumbles: Number of words at the start of a sentence in which errors can occur; 0 for the
            whole sentence. After them a model can be sure of what follows.
        sentences: Possible lengths of planned responses in sentences, drawn uniformly.
    """

    lexicon: Literal["words", "subwords"]
    pieces: Annotated[int, Field(ge=0)]
    stumbles: Annotated[int, Field(ge=0)]
    sentences: Annotated[tuple[Count, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Acceptance:
    """Lowest and highest accepted value of metrics of the base models, by metric."""

    sure_steps: tuple[float, float]
    uncertain_steps: tuple[float, float]
    entropy_p80: tuple[float, float]


@dataclass(frozen=True)
class Decoding:
    """Sampling of responses; `candidates` are the K most probable tokens of a step."""

    max_new_tokens: MediumCount
    temperature: NonNegative
    candidates: SmallCount
    batch_size: Count


@dataclass(frozen=True)
class Evaluation:
    """Prompts of each objective and responses sampled for each prompt, by split."""

    prompts_per_objective: MediumCount
    samples: SmallCount
    validation_prompts_per_objective: MediumCount
    validation_samples: SmallCount


@dataclass(frozen=True)
class SweepSettings:
    """Values that the figures sweep.

    Attributes:
        ratios: Shares of tokens to steer, besides all of them.
        main_ratios: Members of `ratios` that stand for the paper's 20% to 80%.
        reduced_ratios: Members of `ratios` that are combined with searches and other models.
        betas: β of the whole grid.
        tuning: Members of `betas` among which validation prompts choose; none: β is 1 everywhere.
        thresholds: τ of the entropy gate, in nats.
        responses: Most responses that best-of-N chooses from, a power of 2.
        beams: Responses that chunk beam search keeps at once.
        beam_width: Responses that it goes on with after each chunk.
        chunk: Tokens of a chunk.
        rollout_tokens: Tokens that Transfer Q* rolls out.
        rollout_prompts: Prompts of each objective that Transfer Q* answers.
        probes: States of each objective whose candidates are rolled out.
        probe_rollouts: Rollouts of each of these candidates.
    """

    ratios: tuple[Fraction, ...]
    main_ratios: tuple[float, ...]
    reduced_ratios: tuple[float, ...]
    betas: tuple[Strength, ...]
    tuning: tuple[float, ...]
    thresholds: tuple[NonNegative, ...]
    responses: SmallCount
    beams: Count
    beam_width: Count
    chunk: Count
    rollout_tokens: Count
    rollout_prompts: Count
    probes: Count
    probe_rollouts: Count

    def __post_init__(self) -> None:
        for name in ("main_ratios", "reduced_ratios"):
            some = getattr(self, name)
            contained = bool(some) and set(some) <= set(self.ratios)
            _require(contained, f"{name} must be some of ratios", some)
        for name in ("ratios", "betas", "thresholds"):
            some = getattr(self, name)
            _require(len(set(some)) == len(some), f"{name} must differ from one another", some)
        _require(1.0 in self.betas, "betas must contain 1.0", self.betas)
        _require(set(self.tuning) <= set(self.betas), "tuning must be some of betas", self.tuning)
        _require(1.0 in self.thresholds, "thresholds must contain 1.0", self.thresholds)
        power_of_2 = self.responses.bit_count() == 1 and self.responses >= self.beams
        _require(power_of_2, "responses must be a power of 2, at least beams", self.responses)
        _require(self.beams.bit_count() == 1, "beams must be a power of 2", self.beams)
        multiple = self.beams % self.beam_width == 0
        _require(multiple, "beams must be a multiple of beam_width", self.beams)


@dataclass(frozen=True)
class Statistics:
    """Bootstrap of the estimates: resamples, level of the intervals, seed."""

    resamples: Count
    level: Fraction
    seed: int


@dataclass(frozen=True)
class Profile(ABC):
    """Settings that every figure needs, whatever is measured.

    Attributes:
        replicates: Worlds with their own training; 1 where the models are given.
        families: Families of models, as figures name them.
        subject: Folder of `benchmarks.subjects` that holds what is measured.
        trains_models: True if a run trains its own models.
        score: Metric that figures show first and that selects β.
        reward_label: Label of the reward on an axis.
        worker: Device that one response is timed on.
        token_dtype: Integer type that holds every token id.
    """

    name: str
    replicates: Count
    families: Annotated[tuple[str, ...], Field(min_length=1)]
    decoding: Decoding
    evaluation: Evaluation
    sweep: SweepSettings
    statistics: Statistics
    subject: ClassVar[str]
    trains_models: ClassVar[bool]
    score: ClassVar[str]
    reward_label: ClassVar[str]
    worker: ClassVar[str]
    token_dtype: ClassVar[str]

    @property
    @abstractmethod
    def description(self) -> str:
        """Sentences that tell readers of the report what was measured."""

    @property
    def make_options(self) -> str:
        """Options of make that name this profile, or the trial of one with fewer prompts."""
        name, _, limit = self.name.partition(LIMITED)
        return f"PROFILE={name}" + (f" LIMIT={limit}" if limit else "")

    @property
    def words(self) -> bool:
        """True if every token is a word."""
        return False

    @property
    def accepted_ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of metrics of base models with which anything is steered."""
        return {}

    @property
    @abstractmethod
    def losses(self) -> tuple[str, ...]:
        """Losses of the value models, "token" or "mean"; figures with one loss show the first."""

    @abstractmethod
    def has(self, kind: ModelKind | str) -> bool:
        """Return True if there is a model of this kind (instruct, reward, base-small, …)."""

    @abstractmethod
    def size(self, kind: ModelKind) -> float:
        """Return the size of the model of this kind, to compare it with others."""

    @property
    def further_sizes(self) -> list[str]:
        """Sizes besides the usual one with a base model and, by the first loss, a value model."""
        kinds = {size: (f"base-{size}", value_kind(self.losses[0], size)) for size in SIZES}
        return [size for size, pair in kinds.items() if all(map(self.has, pair))]

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

    @property
    def local_inputs(self) -> dict[str, list[Path]]:
        """Files and folders that the profile names, by kind of model and by objective."""
        return {}

    def decisive_settings(self) -> dict:
        """Return the settings that decide the numbers, as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class LabProfile(Profile):
    """Profile of a lab that trains its own models.

    Attributes:
        language: Language of the world.
        model: Size of the usual models.
        training: How they are trained.
        worlds: Worlds that the base model goes on to learn.
        small: A smaller size, if there is one.
        large: A larger size, if there is one.
        acceptance: What the base models must be like before anything is steered.
    """

    families: Annotated[tuple[Literal["qwen3", "llama"], ...], Field(min_length=1)]
    language: Language
    model: ModelSize
    training: Training
    worlds: tuple[OtherWorld, ...]
    small: ModelSize | None = None
    large: ModelSize | None = None
    acceptance: Acceptance | None = None
    subject = "lab"
    trains_models = True
    score = "judge"
    reward_label = "evaluation reward (SD)"
    worker = "one core"
    token_dtype = "int16"
    description = (
        "The lab: a world that the project makes itself, models of some hundred thousand "
        "parameters trained from nothing, and a judge that scores responses from −5 to 5. Small "
        "models in a small world can show that a claim is not general, or when it holds; they "
        "cannot show what an 8-billion-parameter model does."
    )

    def __post_init__(self) -> None:
        different = len(set(self.families)) == len(self.families)
        _require(different, "families must differ from one another", self.families)

    @property
    @override
    def words(self) -> bool:
        return not self.language.pieces

    @property
    @override
    def accepted_ranges(self) -> dict[str, tuple[float, float]]:
        return vars(self.acceptance) if self.acceptance else {}

    @override
    def decisive_settings(self) -> dict:
        return asdict(replace(self, acceptance=None))

    @property
    @override
    def losses(self) -> tuple[str, ...]:
        return ("token", "mean")

    @property
    def sizes(self) -> dict[str, ModelSize]:
        """Shapes of the models by size, as a `ModelKind` names it."""
        sizes = {"small": self.small, "": self.model, "large": self.large}
        return {name: size for name, size in sizes.items() if size}

    @override
    def has(self, kind: ModelKind | str) -> bool:
        parsed = ModelKind.parse(str(kind))
        return parsed.name in LAB_MODELS and parsed.size in self.sizes

    @override
    def size(self, kind: ModelKind) -> float:
        return float(self.sizes[kind.size].hidden_size)


@dataclass(frozen=True)
class Source:
    """Location of a model.

    Attributes:
        id: Id on the Hub, or a local folder.
        revision: Branch, tag or commit.
        subfolder: Folder of the model inside.
        backbone: Id or folder of the backbone of a value model in the published layout, whose
            tokenizer and template it shares; empty where the source has its own.
        backbone_revision: Branch, tag or commit of the backbone.
        billions: Parameters; needed where sizes are compared, and for estimates unless the model
            lies in a local folder.
    """

    id: str
    revision: str = "main"
    subfolder: str = ""
    backbone: str = ""
    backbone_revision: str = "main"
    billions: NonNegative = 0.0

    def __post_init__(self) -> None:
        """Let ~ be the home folder; an empty id, which would be the folder here, is refused."""
        _require(bool(self.id.strip()), "a model must be a Hub id or a folder", repr(self.id))
        for name in ("id", "backbone"):
            object.__setattr__(self, name, expanduser(getattr(self, name)))

    @property
    def tokenizer_source(self) -> "Source":
        """Source of the tokenizer: the backbone, where one is named."""
        return Source(self.backbone, self.backbone_revision) if self.backbone else self

    def decisive_settings(self) -> dict[str, str]:
        """Return what decides which weights are read: all but `billions`."""
        return {name: value for name, value in asdict(self).items() if name != "billions"}

    @property
    def folders(self) -> list[Path]:
        """Local folders of the model and of its backbone; none if they are on the Hub.

        The backbone is the one that the profile names or, of an adapter, the files of the model.
        """
        model = Path(self.id, self.subfolder)
        paths = [model, *map(Path, filter(None, [self.backbone or _named_backbone(model)]))]
        return [path for path in paths if path.is_dir()]


def _named_backbone(folder: Path) -> str:
    """Return the backbone that the files of a model name; empty if they name none."""
    if (folder / "config.json").exists():  # a whole model
        return ""
    for file in (folder / name for name in NAMING_FILES):
        if file.is_file():
            try:
                settings = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):  # damaged: it is refused where it is loaded
                continue
            named = (settings.get(key) for key in BACKBONE_KEYS) if type(settings) is dict else ()
            if backbone := next(filter(None, named), ""):
                return str(backbone)
    return ""


@dataclass(frozen=True)
class PromptSets:
    """Prompt set of each objective: a name of `PROMPT_SETS`, or NAME=FILE for a local copy.

    Attributes:
        longest: Tokens; longer prompts are skipped, and counted.
        per_shard: Prompts that a worker takes at once.
    """

    harmlessness: str
    helpfulness: str
    honesty: str
    longest: Count
    per_shard: Count

    @property
    def sources(self) -> dict[str, str]:
        """Prompt set by objective, as the profile names it."""
        return {name: vars(self)[name] for name in ("harmlessness", "helpfulness", "honesty")}


@dataclass(frozen=True)
class Hardware:
    """Device and dtype of the models, and responses decoded together.

    What is empty or 0 is to be detected.
    """

    device: str
    dtype: str
    batch_size: int

    def __post_init__(self) -> None:
        devices, dtypes = ("", "cpu", "cuda"), ("", "float32", "bfloat16", "float16")
        device, dtype = repr(self.device), repr(self.dtype)
        _require(self.device in devices, "device must be cpu, or cuda where there is a GPU", device)
        _require(self.dtype in dtypes, "dtype must be float32, bfloat16 or float16", dtype)


@dataclass(frozen=True)
class HubProfile(Profile):
    """Profile of given models.

    Attributes:
        models: Models by kind. Searches and ARGS ask `reward`; base-SIZE and value-LOSS-SIZE are
            for weak-to-strong steering; junction-LOSS, q-head-LOSS and vocabulary-value-LOSS are
            fitted to the base model and value-LOSS, and may lie in one folder.
        hardware: Hardware of this run, no part of the profile.
    """

    models: dict[str, Source]
    prompts: PromptSets
    hardware: Hardware | None = None
    subject = "hub"
    trains_models = False
    score = "reward"
    reward_label = "evaluation reward"
    worker = "one worker"
    token_dtype = "int32"

    def __post_init__(self) -> None:
        kinds = sorted(self.models)
        unknown = [kind for kind in kinds if kind not in HUB_MODELS]
        _require(not unknown, f"models must be some of {', '.join(HUB_MODELS)}", unknown)
        for kind in (str(BASE), EVALUATION_REWARD):
            _require(kind in kinds, f"models.{kind} must be named", kinds)
        _require(bool(self.losses), "models.value-mean or models.value-token must be named", kinds)
        for label in kinds:
            teacher = teacher_of(label)
            known = not teacher or teacher in kinds
            _require(known, f"models.{teacher}, which {label} is fitted to, must be named", kinds)
        for size in ("", *self.further_sizes) if self.further_sizes else ():
            for kind in (ModelKind("base", size=size), value_kind(self.losses[0], size)):
                known = self.size(kind) > 0
                _require(known, f"models.{kind} must state its billions, to be compared", 0)
        one = len(self.families) == 1
        _require(one, "families must be one, the name of its models in figures", self.families)
        _require(self.replicates == 1, "replicates must be 1, models are given", self.replicates)
        most, answered = self.evaluation.prompts_per_objective, self.sweep.rollout_prompts
        what = f"rollout_prompts must be at most the {most} of prompts_per_objective"
        _require(answered <= most, what, answered)
        samples = self.decoding.temperature > 0 or REWARD not in kinds
        what = "temperature must be above 0, for searches with models.reward compare samples"
        _require(samples, what, self.decoding.temperature)

    def __hash__(self) -> int:
        """Return the hash of the name, since `models` has none."""
        return hash(self.name)

    @property
    @override
    def losses(self) -> tuple[str, ...]:
        return tuple(loss for loss in LOSSES if self.has(value_kind(loss)))

    @property
    @override
    def description(self) -> str:
        return f"Models and prompt sets of the Hub, as the profile {self.name} names them."

    @override
    def has(self, kind: ModelKind | str) -> bool:
        return str(kind) in self.models

    @override
    def size(self, kind: ModelKind) -> float:
        return self.models[str(kind)].billions

    @property
    @override
    def prompts_per_shard(self) -> int | None:
        return self.prompts.per_shard

    @property
    @override
    def on_gpu(self) -> bool:
        return self.hardware is not None and self.hardware.device == "cuda"

    @override
    def available_metrics(self, names: Sequence[str]) -> tuple[str, ...]:
        renamed = (self.score if name == "judge" else name for name in names)
        return tuple(dict.fromkeys(name for name in renamed if name not in JUDGE_METRICS))

    @property
    @override
    def local_inputs(self) -> dict[str, list[Path]]:
        inputs = {kind: source.folders for kind, source in self.models.items()}
        for objective, source in self.prompts.sources.items():
            path = source.partition("=")[2]
            inputs[objective] = [Path(expanduser(path))] if path else []
        return {name: paths for name, paths in inputs.items() if paths}

    @override
    def decisive_settings(self) -> dict:
        models = {kind: source.decisive_settings() for kind, source in self.models.items()}
        return asdict(replace(self, hardware=None)) | {"models": models}


def load_profile(name: str) -> Profile:
    """Read profiles/NAME.toml: a Hub profile if it has [models], else one of the lab.

    A profile that `extends` another one differs from it in the keys that it names.

    Raises:
        ValueError: For an unknown profile, with the list; for a file that is not TOML; for missing
            and unknown keys, and values of another type or range, with table and key.
    """
    values = _read_toml(name)
    kind = HubProfile if "models" in values else LabProfile
    if "hardware" in values:
        raise ValueError(
            f"profile {name}.toml: hardware is no part of a profile: pass DEVICE=, DTYPE= or "
            "BATCH_SIZE="
        )
    text = json.dumps(values | {"name": name}, default=str)
    try:
        return TypeAdapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for table, problem in dict.fromkeys(map(_complaint, error.errors())):
            problems.setdefault(f" [{table}]" if table else "", []).append(problem)
        sentence = ";".join(f"{table}: {', '.join(several)}" for table, several in problems.items())
        raise ValueError(f"profile {name}.toml{sentence}") from None


def _read_toml(name: str, extending: tuple[str, ...] = ()) -> dict:
    """Return the settings of a profile and of those that it extends.

    Args:
        name: Name of the profile.
        extending: Names of the profiles that extend it, one another.
    """
    known = sorted(path.stem for path in PROFILES.glob("*.toml"))
    if name not in known:
        raise ValueError(f"unknown profile {name!r}, expected one of: {', '.join(known)}")
    if name in extending:
        raise ValueError(f"profile {name}.toml extends itself, by {' and '.join(extending)}")
    try:
        values = tomllib.loads((PROFILES / f"{name}.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"profile {name}.toml is not valid TOML: {error}") from None
    if "extends" not in values:
        return values
    common = _read_toml(values.pop("extends"), (*extending, name))
    tables = {
        key: common[key] | value
        for key, value in values.items()
        if isinstance(value, dict) and isinstance(common.get(key), dict)
    }
    return common | values | tables


def _complaint(error: ErrorDetails) -> tuple[str, str]:
    """Return the table that one of pydantic's errors is about, and what is wrong there."""
    place = [key for key in error["loc"] if isinstance(key, str) and key != "[key]"]
    if error["type"] == "value_error":  # between several keys of a table
        return ".".join(place), str(error["ctx"]["error"])
    *table, key = place
    known = {"missing": f"missing {key}", "unexpected_keyword_argument": f"unknown {key}"}
    message = (
        error["msg"].replace("Input", key) if "Input" in error["msg"] else f"{key}: {error['msg']}"
    )
    problem = f"{message}, got {error['input']!r}"
    return ".".join(table), known.get(error["type"], problem)


def _require(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}, got {got}")


def digest(*parts: object) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of `parts` as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def profile_digest(profile: Profile) -> str:
    """Return the digest of the settings that decide a profile's rows, as [statistics] does not."""
    settings = profile.decisive_settings()
    del settings["statistics"]
    return digest(settings)
