"""The models of a Hub profile: where they are, in which template each reads, and what is asked of them.

A base model reads "Human:\\n…\\nAssistant:\\n", a post-trained one its chat template (without thinking), value and reward models theirs.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from huggingface_hub import constants, snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.spec.cells import OBJECTIVES, Condition
from benchmarks.spec.methods import EVALUATION_REWARD, REWARD, ROLLOUT, method_of_scorer
from benchmarks.spec.profile import Hardware, HubProfile, Source, digest
from benchmarks.subjects.base import Subject
from benchmarks.subjects.hub.prompts import Chat, Split, load_prompts, plain_text, split_prompts
from benchmarks.subjects.scoring import trajectory_rewards
from sia import Generation, RewardScorer, ValueModel
from sia._inputs import eos_token_ids

GIB = 2**30
NOT_NEEDED = [
    "original/*",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
]  # the same weights in other formats


def choose_device(device: str = "", dtype: str = "", gpus: int | None = None) -> tuple[str, str]:
    """What there is, where nothing is said: a GPU in bfloat16, else the processor in float32. gpus: how many a cluster has; None asks this
    machine.

    Errors: ValueError for a device that is not there or an unknown dtype.
    """
    there = torch.cuda.is_available() if gpus is None else gpus > 0
    device = device or ("cuda" if there else "cpu")
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if device not in ("cpu", "cuda") or (device == "cuda" and not there):
        raise ValueError(f"device must be cpu, or cuda where there is a GPU, got {device!r}")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return device, dtype


def detect_hardware(
    profile: HubProfile,
    device: str = "",
    dtype: str = "",
    batch_size: int = 0,
    gpus: int | None = None,
) -> Hardware:
    """Device and dtype as `choose_device` does, and so large batches: 0, the profile's, or what should fit.

    Errors: as of `choose_device`.
    """
    device, dtype = choose_device(device, dtype, gpus)
    if not batch_size:
        # two caches of some 150 KiB per token (8 billion parameters with 8 key-value heads), beside the models themselves
        room = 2 * GIB
        if device == "cuda":  # of a cluster's GPUs, what the smallest usual ones have
            room = (
                torch.cuda.get_device_properties(0).total_memory / 4 if gpus is None else 10 * GIB
            )
        per_response = (
            2 * 150 * 1024 * (profile.prompts.longest // 4 + profile.decoding.max_new_tokens)
        )
        batch_size = int(np.clip(room // per_response, 1, profile.decoding.batch_size))
    return Hardware(device, dtype, batch_size)


def fetch(source: Source) -> Source:
    """The source with its revision resolved to the commit, and its files here; local folders stay as they are.

    Errors: FileNotFoundError, in one sentence, naming the id and where it would be read from.
    """
    if Path(source.id).is_dir():
        if not (Path(source.id) / source.subfolder).is_dir():
            raise FileNotFoundError(
                f"no model in {Path(source.id) / source.subfolder}: there is no such folder"
            )
        return source
    where = f"{source.id}{'/' + source.subfolder if source.subfolder else ''} (revision {source.revision})"
    if source.id.count("/") != 1 or source.id.startswith((".", "/")):
        raise FileNotFoundError(
            f"no model in {source.id}: there is no such folder, and a Hub id has the form owner/name"
        )
    try:
        patterns = [f"{source.subfolder}/*"] if source.subfolder else None
        folder = Path(
            snapshot_download(
                source.id,
                revision=source.revision,
                allow_patterns=patterns,
                ignore_patterns=NOT_NEEDED,
            )
        )
    except Exception as error:  # the Hub's client lets many kinds through: no network, a proxy, no such model, no access to a gated one
        cause = (str(error).strip().splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{where} is missing: it is not in the cache {constants.HF_HUB_CACHE} and cannot be downloaded from the Hub "
            f"({type(error).__name__}: {cause})"
        ) from error
    if not (folder / source.subfolder).is_dir():
        raise FileNotFoundError(
            f"{where} is missing: {source.id} has no such subfolder at this revision"
        )
    return replace(source, revision=folder.name)


def pin(profile: HubProfile, kinds: Iterable[str]) -> HubProfile:
    """The profile with these models at hand, their revisions resolved to commits (see `fetch`)."""
    fetched = {}
    for kind in dict.fromkeys(kinds):
        source = fetch(profile.models[kind])
        if source.backbone:
            name, _, revision = source.backbone.partition("@")
            backbone = fetch(Source(name, revision or "main"))
            source = replace(
                source, backbone=name if Path(name).is_dir() else f"{name}@{backbone.revision}"
            )
        fetched[kind] = source
    return replace(profile, models=profile.models | fetched)


def place(source: Source) -> tuple[str, dict[str, str]]:
    """Id and options for from_pretrained."""
    options = {} if Path(source.id).is_dir() else {"revision": source.revision}
    return source.id, options | ({"subfolder": source.subfolder} if source.subfolder else {})


@lru_cache(maxsize=16)
def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """Of a value model in the published layout, its backbone's."""
    if source.backbone:
        name, _, revision = source.backbone.partition("@")
        return AutoTokenizer.from_pretrained(name, **({"revision": revision} if revision else {}))
    name, options = place(source)
    return AutoTokenizer.from_pretrained(name, **options)


def fingerprint(source: Source) -> list:
    """What tells one state of a model from another: the commit or, of local files, their names, sizes and times."""
    places = [
        Path(name) / part
        for name, part in ((source.id, source.subfolder), (source.backbone, ""))
        if name
    ]
    files = [
        file
        for place in places
        if place.exists()
        for file in [place, *sorted(place.rglob("*"))]
        if file.is_file()
    ]
    return [
        asdict(source),
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    ]


# What chat templates that write today's date are given instead: a prompt must not change from day to day.
DATE = "26 Jul 2024"


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, chats: Iterable, answered: bool = False, **options
) -> list[list[int]]:
    """Token ids of chats in a tokenizer's own template, open for an answer or answered. options: of the template."""
    options |= {"tokenize": False, "add_generation_prompt": not answered, "date_string": DATE}
    return tokenizer(
        [tokenizer.apply_chat_template(list(chat), **options) for chat in chats],
        add_special_tokens=False,
    ).input_ids


def kinds_of(cell: Condition) -> list[str]:
    """Return the models that a cell needs."""
    method = method_of_scorer(cell.scorer)
    kinds = ["base", str(cell.model), EVALUATION_REWARD]
    kinds += [REWARD] if cell.search else []
    if cell.scorer is not None:
        kinds += method.needs if method else [str(cell.scorer)]
    return list(dict.fromkeys(kinds))


@dataclass(frozen=True)
class HubModels(Subject):
    """What is measured under a Hub profile; `profile.hardware` says on what."""

    profile: HubProfile

    @classmethod
    def open(cls, profile: HubProfile, replicate: int) -> Self:
        return cls(profile)

    @classmethod
    def prepare(
        cls, profile: HubProfile, cells: Iterable[Condition], requested: Hardware, gpus: int | None
    ) -> tuple[HubProfile, dict]:
        """Fetch the models that `cells` need and settle the hardware; print both in a line."""
        hardware = detect_hardware(profile, **asdict(requested), gpus=gpus)
        kinds = dict.fromkeys(kind for cell in cells for kind in kinds_of(cell))
        settled = pin(replace(profile, hardware=hardware), kinds)
        name, device = profile.name, f"{hardware.device}, {hardware.dtype}"
        print(f"{name}: {len(kinds)} models at hand; {device}, batches of {hardware.batch_size}")
        splits = cls(settled).splits.items()
        skipped = {objective: split.skipped for objective, split in splits}
        counts = [f"{count} of {objective}" for objective, count in skipped.items() if count]
        if counts:
            longest = f"more than {profile.prompts.longest} tokens"
            print(f"{name}: prompts skipped because they have {longest}: {', '.join(counts)}")
        models = {kind: asdict(settled.models[kind]) for kind in kinds}
        return settled, {"models": models, "prompts_skipped": skipped, **asdict(hardware)}

    @property
    def models_kept(self) -> int:
        """How many a worker keeps at hand: on a GPU as many of the largest as fill two thirds of it, but two at least."""
        if self.profile.hardware.device == "cpu":
            return 8
        largest = max(source.billions for source in self.profile.models.values())
        bytes_each = 2e9 * largest or GIB
        return max(2, int(torch.cuda.get_device_properties(0).total_memory * 2 / 3 / bytes_each))

    def digest_of(self, cell: Condition) -> str:
        """Of all that decides what the models of a cell say, and to which prompts."""
        profile, hardware = self.profile, self.profile.hardware
        splits = (
            profile.evaluation.prompts_per_objective,
            profile.evaluation.validation_prompts_per_objective,
        )
        models = [self._fingerprints[kind] for kind in kinds_of(cell)]
        settings = [
            asdict(profile.prompts),
            self._prompt_files,
            asdict(profile.decoding),
            asdict(hardware),
        ]
        return digest(models, settings, splits)

    @cached_property
    def _fingerprints(self) -> dict[str, list]:
        return {kind: fingerprint(source) for kind, source in self.profile.models.items()}

    @cached_property
    def _prompt_files(self) -> list:
        settings = self.profile.prompts
        paths = [
            source.partition("=")[2]
            for source in (settings.harmlessness, settings.helpfulness, settings.honesty)
        ]
        return [fingerprint(Source(path)) for path in paths if path]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.profile.models["base"])

    @property
    def batch_size(self) -> int:
        return self.profile.hardware.batch_size

    @cached_property
    def splits(self) -> dict[str, Split]:
        """By objective. Too long is what has more than `prompts.longest` tokens for the base model."""
        settings, evaluation = self.profile.prompts, self.profile.evaluation
        sources = dict(
            zip(
                OBJECTIVES,
                (settings.harmlessness, settings.helpfulness, settings.honesty),
                strict=True,
            )
        )
        found = {}
        for objective, source in sources.items():
            chats = load_prompts(source)
            lengths = map(len, self.encode(chats, "base"))
            counts = (evaluation.prompts_per_objective, evaluation.validation_prompts_per_objective)
            found[objective] = split_prompts(
                source, chats, (length > settings.longest for length in lengths), *counts
            )
        return found

    def prompts_of(self, split: str, objective: str) -> list[Chat]:
        of = self.splits[objective]
        return {"test": of.test, "validation": of.validation}[split]

    def encode(self, chats: Sequence[Chat], kind: str) -> list[list[int]]:
        """Token ids of prompts for a kind of model, in its own template. Rollouts are read, and made, in the reward model's."""
        if kind.startswith("base"):
            return self.tokenizer([plain_text(chat) for chat in chats]).input_ids
        tokenizer = tokenizer_of(self.profile.models[REWARD if kind == str(ROLLOUT) else kind])
        return chat_ids(
            tokenizer, chats, **({"enable_thinking": False} if kind.startswith("instruct") else {})
        )

    def conversations(
        self, chats: Sequence[Chat], responses: Sequence[Generation], kind: str
    ) -> list[list[int]]:
        """Token ids of prompts with their responses in a reward model's own template; the tokenizers may differ."""
        whole = (
            [*chat, {"role": "assistant", "content": r.text}]
            for chat, r in zip(chats, responses, strict=True)
        )
        return chat_ids(tokenizer_of(self.profile.models[kind]), whole, answered=True)

    def _options(self) -> dict[str, object]:
        return {"dtype": self.profile.hardware.dtype, "device_map": self.profile.hardware.device}

    def language_model(self, kind: str, family: str) -> PreTrainedModel:
        name, options = place(self.profile.models[kind])
        return AutoModelForCausalLM.from_pretrained(name, **options, **self._options()).eval()

    def reward_model(self, kind: str) -> PreTrainedModel:
        name, options = place(self.profile.models[kind])
        return RewardScorer.from_pretrained(
            name, tokenizer_of(self.profile.models[kind]).eos_token_id, **options, **self._options()
        ).model

    def reward_scorer(
        self, language_model: PreTrainedModel, reward_model: PreTrainedModel
    ) -> RewardScorer:
        """Return the scorer by a reward model, whose tokens end as the language model's do."""
        tokenizer = tokenizer_of(self.profile.models[REWARD])
        ends = eos_token_ids(language_model.generation_config, self.tokenizer.eos_token_id)
        return RewardScorer(reward_model, tokenizer.eos_token_id, stop_tokens=ends)

    def value_model(self, kind: str, family: str) -> ValueModel:
        """Load a value model."""
        source = self.profile.models[kind]
        name, options = place(source)
        backbone, _, revision = source.backbone.partition("@")
        if revision:
            backbone = snapshot_download(backbone, revision=revision)
        return ValueModel.from_pretrained(name, backbone or None, **options, **self._options())

    @property
    def reward_strength(self) -> float:
        """Where rewards stand for values, β is as it is."""
        return 1.0

    def scores(
        self,
        prompts: Sequence[Chat],
        responses: Sequence[Generation],
        first: Sequence[int],
        numbers: Sequence[int],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> dict[str, np.ndarray]:
        """reward: the score."""
        return {"reward": self.score(prompts, responses, reward_model)}

    def score(
        self,
        prompts: Sequence[Chat],
        responses: Sequence[Generation],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> np.ndarray:
        """Raw rewards of the evaluation reward model."""
        whole = self.conversations(prompts, responses, EVALUATION_REWARD)
        return trajectory_rewards(reward_model(EVALUATION_REWARD), whole).astype(np.float32)
