"""One replicate of the lab: its world, tokenizer and prompts, and its models in the cache.

Kinds of models: base, instruct, instruct-reward, reward, evaluation-reward, autoregressive-reward,
value-LOSS (LOSS: mean, token), and fitted to the base and value-LOSS, in one folder heads-LOSS:
junction-LOSS, unseen-junction-LOSS, q-head-LOSS, vocabulary-value-LOSS. Of the first family also
base-SIZE, value-token-SIZE (small, large), and base@WORLD, value-token@WORLD: the base model goes
on to learn the corpus of another world, and a value model learns from its samples by the same
rewards.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from typing_extensions import override

from benchmarks.runtime.files import CACHE, check_seal, read_cell
from benchmarks.runtime.fingerprints import MODELS, code_digest
from benchmarks.spec.cells import OBJECTIVES, Condition
from benchmarks.spec.methods import EVALUATION_REWARD, REWARD
from benchmarks.spec.model_kinds import LOSSES, ModelKind
from benchmarks.spec.profile import LabProfile, OtherWorld, digest
from benchmarks.subjects.base import FITTED_CLASSES, Fitted, Subject
from benchmarks.subjects.lab.items import Prompt
from benchmarks.subjects.lab.judge import Verdict, judge
from benchmarks.subjects.lab.linear import use_onednn
from benchmarks.subjects.lab.tokenizer import (
    EOS,
    encode_prompts,
    subword_tokenizer,
    word_tokenizer,
)
from benchmarks.subjects.lab.world import World, WorldConfig
from benchmarks.subjects.scoring import trajectory_rewards
from sia import Generation, JunctionGate, RewardScorer, ValueModel

SCALE_FILE = "scale.json"
TOKENIZER_DOCUMENTS = 2000
SHARED = "shared"  # in the place of a family: one model serves all
UNSEEN = "unseen-junction"  # a gate that was not shown a share of the topics
UNSEEN_SHARE = 0.25


@dataclass(frozen=True)
class Replicate(Subject):
    """One replicate; `index` is the seed of its world and of all its training."""

    models_kept = 48  # they are small
    traced_losses = LOSSES

    profile: LabProfile
    index: int

    @classmethod
    @override
    def open(cls, profile: LabProfile, replicate: int) -> Self:
        return cls(profile, replicate)

    @cached_property
    def digest(self) -> str:
        """Digest of all that decides the models.

        The sizes of the other splits are part of it, since training avoids their prompts.
        """
        profile, evaluation = self.profile, self.profile.evaluation
        splits = evaluation.prompts_per_objective, evaluation.validation_prompts_per_objective
        sizes = profile.sizes.values()
        settings = profile.language, *sizes, profile.training, profile.decoding, *profile.worlds
        return digest(
            self.index,
            profile.families,
            [asdict(setting) for setting in settings],
            splits,
            code_digest(MODELS),
        )

    @override
    def digest_of(self, cell: Condition) -> str:
        return self.digest

    @property
    def folder(self) -> Path:
        """Folder of the models in the cache."""
        return CACHE / self.profile.name / "models" / f"replicate{self.index}-{self.digest}"

    def path(self, kind: str, family: str) -> Path:
        """Return the folder of a model, or the file of samples."""
        return self.folder / f"{family}-{kind}"

    def seed(self, *purpose: str) -> int:
        """Return a training seed for this purpose."""
        return zlib.crc32(f"{self.index} {' '.join(purpose)}".encode())

    @cached_property
    def world(self) -> World:
        """World of the base corpus and of all prompts."""
        language = self.profile.language
        settings = language.lexicon, language.stumbles, language.sentences
        return World(WorldConfig(self.index, *settings))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Tokenizer of words, or of pieces that it learns from prompts and responses."""
        pieces = self.profile.language.pieces
        if not pieces:
            return word_tokenizer(self.world.words)
        rng = random.Random(f"tokenizer {self.index}")
        prompts = [self.world.prompt(rng) for _ in range(TOKENIZER_DOCUMENTS)]
        texts = [(prompt.text, self.world.response(prompt.item, rng)) for prompt in prompts]
        return subword_tokenizer([*chain.from_iterable(texts), *self.world.words], pieces)

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """Prompts by split: test, validation, heldout (for the quality of models) and training.

        No text is in two of them.
        """
        evaluation, settings = self.profile.evaluation, self.profile.training
        counts = {
            "test": evaluation.prompts_per_objective,
            "validation": evaluation.validation_prompts_per_objective,
            "heldout": settings.heldout_prompts // 3,
            "training": settings.sampled_prompts // 3,
        }
        splits: dict[str, list[Prompt]] = {}
        taken: set[str] = set()
        for split, count in counts.items():
            rng = random.Random(f"{split} prompts {self.index}")
            splits[split] = [
                prompt
                for objective in OBJECTIVES
                for prompt in self.world.prompts(rng, count, objective, taken)
            ]
            taken |= {prompt.text for prompt in splits[split]}
        return splits

    @cached_property
    def unseen_topics(self) -> frozenset[str]:
        """A share of the topics of each kind, drawn from the replicate's seed."""
        rng, unseen = random.Random(f"unseen topics {self.index}"), set()
        for kind in sorted({item.kind for item in self.world.items}):
            topics = [item.topic for item in self.world.items if item.kind == kind]
            unseen |= set(rng.sample(topics, round(UNSEEN_SHARE * len(topics))))
        return frozenset(unseen)

    def other_world(self, name: str) -> World:
        """Return a world of the profile, with the same items and words; empty: the usual one."""
        if not name:
            return self.world
        other: OtherWorld = next(world for world in self.profile.worlds if world.name == name)
        varied = {"decoys": other.decoys, "habits": other.habits, "drift": other.drift}
        return World(replace(self.world.config, **varied))

    def corpus(self, count: int, family: str, world: str = "") -> Iterator[tuple[Prompt, str]]:
        """Yield documents of a base corpus, without prompts of the other splits than training."""
        avoid = {
            prompt.text
            for split in ("test", "validation", "heldout")
            for prompt in self.prompts[split]
        }
        rng = random.Random(f"corpus {self.index} {family} {world}".strip())
        writer = self.other_world(world)
        while count:
            prompt = self.world.prompt(rng)
            if prompt.text not in avoid:
                count -= 1
                yield prompt, writer.response(prompt.item, rng)

    @override
    def prompts_of(self, split: str, objective: str) -> list[Prompt]:
        return [prompt for prompt in self.prompts[split] if prompt.item.objective == objective]

    @override
    def encode(self, prompts: Sequence[Prompt], kind: str) -> list[list[int]]:
        new = {prompt.text: prompt for prompt in prompts if prompt.text not in self._encoded}
        self._encoded.update(
            zip(new, encode_prompts(self.tokenizer, list(new.values())) if new else [], strict=True)
        )
        return [self._encoded[prompt.text] for prompt in prompts]

    @cached_property
    def _encoded(self) -> dict[str, list[int]]:
        return {}  # by text: every cell asks the same prompts

    @override
    def conversations(
        self, prompts: Sequence[Prompt], responses: Sequence[Generation], kind: str
    ) -> list[list[int]]:
        pairs = zip(self.encode(prompts, kind), responses, strict=True)
        return [[*ids, *with_eos(response)] for ids, response in pairs]

    @override
    def reward_scorer(
        self, language_model: PreTrainedModel, reward_model: PreTrainedModel
    ) -> RewardScorer:
        return RewardScorer(reward_model)

    @property
    def batch_size(self) -> int:
        """Responses decoded together."""
        return self.profile.decoding.batch_size

    @property
    def reward_strength(self) -> float:
        """Factor that brings rewards to the scale that values are distilled from."""
        return self.profile.training.reward_scale / self.scale(REWARD)["sd"]

    @override
    def scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Generation],
        first: Sequence[int],
        numbers: Sequence[int],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> dict[str, np.ndarray | list]:
        """Return the metrics of responses (see `Subject.scores`).

        - judge: the judge's score.
        - fluency_errors: whether anything was ungrammatical, repeated or unfinished.
        - reward: of the evaluation reward model.
        - training_reward: of the reward model that values learn from, for the first response to
          each prompt.
        """
        verdicts = self._verdicts(prompts, responses)
        whole = self.conversations(prompts, responses, EVALUATION_REWARD)
        evaluation = self.rewards(EVALUATION_REWARD, reward_model(EVALUATION_REWARD), whole)
        trained_on = self.rewards(REWARD, reward_model(REWARD), [whole[i] for i in first])[numbers]
        return {
            "judge": np.float32([verdict.score for verdict in verdicts]),
            "fluency_errors": [verdict.fluency_errors for verdict in verdicts],
            "reward": np.float32(evaluation).round(2),
            "training_reward": np.float32(trained_on).round(2),
        }

    @override
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Generation],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> np.ndarray:
        return np.asarray(self.judge(prompts, responses), np.float32)

    def judge(self, prompts: Sequence[Prompt], responses: Sequence[Generation]) -> np.ndarray:
        """Return the judge's scores, float64 `(responses,)`."""
        return np.array([verdict.score for verdict in self._verdicts(prompts, responses)])

    def _verdicts(
        self, prompts: Sequence[Prompt], responses: Sequence[Generation]
    ) -> list[Verdict]:
        return [
            judge(self.world.grammar, prompt.item, response.text, response.finished)
            for prompt, response in zip(prompts, responses, strict=True)
        ]

    @override
    def language_model(self, kind: str, family: str) -> PreTrainedModel:
        folder = check_seal(self.path(kind, family))
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        return use_onednn(model.eval())

    @override
    def reward_model(self, kind: str) -> PreTrainedModel:
        folder = check_seal(self.path(kind, SHARED))
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        return use_onednn(model.eval())

    @override
    def value_model(self, kind: str, family: str) -> ValueModel:
        return use_onednn(ValueModel.from_pretrained(check_seal(self.path(kind, family))))

    @override
    def fitted(self, kind: str, family: str) -> Fitted:
        parsed = ModelKind.parse(kind)
        folder = check_seal(self.path(str(ModelKind("heads", parsed.loss)), family))
        if parsed.name == UNSEEN:
            return JunctionGate.from_pretrained(folder / UNSEEN)
        fitted = FITTED_CLASSES[parsed.name].from_pretrained(folder)
        for module in vars(fitted).values():
            if isinstance(module, nn.Module):
                use_onednn(module)
        return fitted

    def rewards(
        self, kind: str, model: PreTrainedModel, sequences: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Return the rewards of sequences by the reward model of a kind, float64 `(sequences,)`.

        They are in standard deviations of the base models' training responses from their mean.
        """
        scale = self.scale(kind)
        return (trajectory_rewards(model, sequences) - scale["mean"]) / scale["sd"]

    def scale(self, kind: str) -> dict[str, float]:
        """Return mean and sd of the raw rewards of all base models' training responses."""
        return json.loads((self.path(kind, SHARED) / SCALE_FILE).read_text())

    def samples(self, families: Sequence[str], kind: str = "samples") -> pd.DataFrame:
        """Return the base responses of these families, as `recipes.sample_base` made them."""
        frames = [read_cell(self.path(kind, family)) for family in families]
        return pd.concat(frames, ignore_index=True)


def with_eos(response: Generation) -> list[int]:
    """Return the tokens of a response, ended if it ran out of length: every trajectory must end."""
    return [*response.token_ids.tolist(), *([] if response.finished else [EOS])]
