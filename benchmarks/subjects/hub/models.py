r"""Models of the Hub as a subject of measurement: templates, scorers and scores.

A base model reads "Human:\n…\nAssistant:\n", a post-trained one its chat template (without
thinking), value and reward models theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typing_extensions import override

from benchmarks.spec.cells import OBJECTIVES, Condition
from benchmarks.spec.methods import EVALUATION_REWARD, REWARD, ROLLOUT, method_of_scorer
from benchmarks.spec.profile import Hardware, HubProfile, Source, digest
from benchmarks.subjects.base import Subject
from benchmarks.subjects.hub.hardware import GIB, detect_hardware
from benchmarks.subjects.hub.prompts import Chat, Split, load_prompts, plain_text, split_prompts
from benchmarks.subjects.hub.sources import (
    fingerprint,
    from_pretrained_arguments,
    pin,
    tokenizer_of,
)
from benchmarks.subjects.scoring import trajectory_rewards
from sia import Generation, RewardScorer, ValueModel
from sia._inputs import eos_token_ids

# for chat templates that write today's date: a prompt must not change from day to day
DATE = "26 Jul 2024"


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, chats: Iterable, answered: bool = False, **options
) -> list[list[int]]:
    """Return the token ids of chats in a tokenizer's own template.

    Args:
        tokenizer: Tokenizer with a chat template.
        chats: Chats that end in a user turn or, if `answered`, in an answer.
        answered: Whether the chats hold their answers; else they are open for one.
        **options: Variables of the template.
    """
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
    """Models of a Hub profile, on the hardware that `profile.hardware` names."""

    profile: HubProfile

    @classmethod
    @override
    def open(cls, profile: HubProfile, replicate: int) -> HubModels:
        return cls(profile)

    @classmethod
    @override
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
        """Number of models in memory: on a GPU as many of the largest as fill two thirds of it."""
        if self.profile.hardware.device == "cpu":
            return 8
        largest = max(source.billions for source in self.profile.models.values())
        bytes_each = 2e9 * largest or GIB
        return max(2, int(torch.cuda.get_device_properties(0).total_memory * 2 / 3 / bytes_each))

    @override
    def digest_of(self, cell: Condition) -> str:
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
        """Tokenizer of the base model."""
        return tokenizer_of(self.profile.models["base"])

    @property
    def batch_size(self) -> int:
        """Responses decoded together."""
        return self.profile.hardware.batch_size

    @cached_property
    def splits(self) -> dict[str, Split]:
        """Prompts by objective, without those beyond `prompts.longest` tokens of the base model."""
        settings, evaluation = self.profile.prompts, self.profile.evaluation
        sources = dict(
            zip(
                OBJECTIVES,
                (settings.harmlessness, settings.helpfulness, settings.honesty),
                strict=True,
            )
        )
        splits = {}
        for objective, source in sources.items():
            chats = load_prompts(source)
            lengths = map(len, self.encode(chats, "base"))
            counts = (evaluation.prompts_per_objective, evaluation.validation_prompts_per_objective)
            splits[objective] = split_prompts(
                source, chats, (length > settings.longest for length in lengths), *counts
            )
        return splits

    @override
    def prompts_of(self, split: str, objective: str) -> list[Chat]:
        prompts = self.splits[objective]
        return {"test": prompts.test, "validation": prompts.validation}[split]

    @override
    def encode(self, chats: Sequence[Chat], kind: str) -> list[list[int]]:
        if kind.startswith("base"):
            return self.tokenizer([plain_text(chat) for chat in chats]).input_ids
        # rollouts are read, and made, in the reward model's template
        tokenizer = tokenizer_of(self.profile.models[REWARD if kind == str(ROLLOUT) else kind])
        options = {"enable_thinking": False} if kind.startswith("instruct") else {}
        return chat_ids(tokenizer, chats, **options)

    @override
    def conversations(
        self, chats: Sequence[Chat], responses: Sequence[Generation], kind: str
    ) -> list[list[int]]:
        whole = (
            [*chat, {"role": "assistant", "content": r.text}]
            for chat, r in zip(chats, responses, strict=True)
        )
        return chat_ids(tokenizer_of(self.profile.models[kind]), whole, answered=True)

    def _options(self) -> dict[str, object]:
        return {"dtype": self.profile.hardware.dtype, "device_map": self.profile.hardware.device}

    @override
    def language_model(self, kind: str, family: str) -> PreTrainedModel:
        name, options = from_pretrained_arguments(self.profile.models[kind])
        return AutoModelForCausalLM.from_pretrained(name, **options, **self._options()).eval()

    @override
    def reward_model(self, kind: str) -> PreTrainedModel:
        name, options = from_pretrained_arguments(self.profile.models[kind])
        return RewardScorer.from_pretrained(
            name, tokenizer_of(self.profile.models[kind]).eos_token_id, **options, **self._options()
        ).model

    @override
    def reward_scorer(
        self, language_model: PreTrainedModel, reward_model: PreTrainedModel
    ) -> RewardScorer:
        # responses end as the language model ends them
        tokenizer = tokenizer_of(self.profile.models[REWARD])
        ends = eos_token_ids(language_model.generation_config, self.tokenizer.eos_token_id)
        return RewardScorer(reward_model, tokenizer.eos_token_id, ends)

    @override
    def value_model(self, kind: str, family: str) -> ValueModel:
        source = self.profile.models[kind]
        name, options = from_pretrained_arguments(source)
        backbone, _, revision = source.backbone.partition("@")
        if revision:
            backbone = snapshot_download(backbone, revision=revision)
        return ValueModel.from_pretrained(name, backbone or None, **options, **self._options())

    @property
    def reward_strength(self) -> float:
        """Factor of β where rewards take the place of values: none."""
        return 1.0

    @override
    def scores(
        self,
        prompts: Sequence[Chat],
        responses: Sequence[Generation],
        first: Sequence[int],
        numbers: Sequence[int],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> dict[str, np.ndarray]:
        return {"reward": self.score(prompts, responses, reward_model)}

    @override
    def score(
        self,
        prompts: Sequence[Chat],
        responses: Sequence[Generation],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> np.ndarray:
        whole = self.conversations(prompts, responses, EVALUATION_REWARD)
        return np.float32(trajectory_rewards(reward_model(EVALUATION_REWARD), whole))
