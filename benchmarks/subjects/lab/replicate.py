"""One replicate of the lab: its world, tokenizer and prompts, where its models lie, and what is asked of them.

Kinds of models: base, instruct, instruct-reward, reward, evaluation-reward, autoregressive-reward, value-LOSS (LOSS: mean, token); of
the first family also base-SIZE, value-token-SIZE (small, large), value-LOSS-early, and base@WORLD, value-LOSS@WORLD: the base model
goes on to learn the corpus of another world, and value models learn from its samples by the same rewards.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.runtime.files import CACHE, check_seal, read_cell
from benchmarks.runtime.fingerprints import MODELS, code_digest
from benchmarks.spec.cells import OBJECTIVES, Condition
from benchmarks.spec.methods import ARGS, AUTOREGRESSIVE, EVALUATION_REWARD, REWARD, ROLLOUT
from benchmarks.spec.model_kinds import LOSSES
from benchmarks.spec.profile import LabProfile, OtherWorld, digest
from benchmarks.subjects.base import Subject
from benchmarks.subjects.lab import models
from benchmarks.subjects.lab.judge import FLUENCY, cut, judge
from benchmarks.subjects.lab.linear import by_onednn
from benchmarks.subjects.lab.tokenizer import EOS, build_tokenizer, encode_prompts
from benchmarks.subjects.lab.world import Prompt, World, WorldConfig
from sia import AutoregressiveScorer, Generation, RewardScorer, RolloutScorer, ValueModel
from sia.scorers.base import Scorer

SCALE_FILE = "scale.json"
SHARED = "shared"  # in the place of a family: one model serves all


@dataclass(frozen=True)
class Replicate(Subject):
    """One replicate: `index` is the seed of its world and of all its training."""

    models_kept = 48  # they are small
    traced_losses = LOSSES

    profile: LabProfile
    index: int

    @classmethod
    def open(cls, profile: LabProfile, replicate: int) -> Replicate:
        return cls(profile, replicate)

    @cached_property
    def digest(self) -> str:
        """Of all that decides the models; the sizes of the held-out splits are part of it, for training avoids their prompts."""
        profile = self.profile
        splits = (
            profile.evaluation.prompts_per_objective,
            profile.evaluation.validation_prompts_per_objective,
        )
        settings = (
            profile.model,
            profile.small,
            profile.large,
            profile.training,
            profile.decoding,
            *profile.worlds,
        )
        return digest(
            self.index,
            profile.families,
            [asdict(setting) for setting in settings],
            splits,
            code_digest(MODELS),
        )

    def digest_of(self, cell: Condition) -> str:
        """Of what decides the models of a cell."""
        return self.digest

    @property
    def folder(self) -> Path:
        return CACHE / self.profile.name / "models" / f"replicate{self.index}-{self.digest}"

    def path(self, kind: str, family: str) -> Path:
        return self.folder / f"{family}-{kind}"

    def seed(self, *what: str) -> int:
        """A training seed for this purpose."""
        return zlib.crc32(f"{self.index} {' '.join(what)}".encode())

    @cached_property
    def world(self) -> World:
        return World(WorldConfig(seed=self.index))

    @cached_property
    def tokenizer(self):
        return build_tokenizer(self.world.words)

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """Prompts by split: test, validation, heldout (for the quality of the models) and training; no text in two."""
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
                p
                for objective in OBJECTIVES
                for p in self.world.prompts(rng, count, objective, taken)
            ]
            taken |= {prompt.text for prompt in splits[split]}
        return splits

    def other_world(self, name: str) -> World:
        """The same items and words, said in other ways: `name` of the profile's worlds; empty: the usual one."""
        if not name:
            return self.world
        other: OtherWorld = next(world for world in self.profile.worlds if world.name == name)
        return World(
            WorldConfig(
                seed=self.index, decoys=other.decoys, habits=other.habits, drift=other.drift
            )
        )

    def corpus(self, count: int, family: str, world: str = "") -> Iterator[tuple[Prompt, str]]:
        """Documents of the base corpus; none has a prompt of the test, validation or heldout split."""
        avoid = {
            prompt.text
            for split in ("test", "validation", "heldout")
            for prompt in self.prompts[split]
        }
        rng, writer = (
            random.Random(f"corpus {self.index} {family} {world}".strip()),
            self.other_world(world),
        )
        while count:
            prompt = self.world.prompt(rng)
            if prompt.text not in avoid:
                count -= 1
                yield prompt, writer.response(prompt.item, rng)

    def prompts_of(self, split: str, objective: str) -> list[Prompt]:
        return [prompt for prompt in self.prompts[split] if prompt.item.objective == objective]

    def encode(self, prompts: Sequence[Prompt], kind: str) -> list[list[int]]:
        """Token ids of prompts for a kind of model: all read the same template."""
        new = {prompt.text: prompt for prompt in prompts if prompt.text not in self._encoded}
        self._encoded.update(
            zip(new, encode_prompts(self.tokenizer, list(new.values())) if new else [], strict=True)
        )
        return [self._encoded[prompt.text] for prompt in prompts]

    @cached_property
    def _encoded(self) -> dict[str, list[int]]:
        return {}  # by text: every cell asks the same prompts

    def words(self, tokens: Sequence[int]) -> list[str]:
        return self.tokenizer.convert_ids_to_tokens(list(tokens))

    def conversations(
        self, prompts: Sequence[Prompt], responses: Sequence[Generation], kind: str
    ) -> list[list[int]]:
        """Token ids of prompts with their responses, as a reward model of this kind reads them: ended."""
        return [[*p, *ended(r)] for p, r in zip(self.encode(prompts, kind), responses, strict=True)]

    def scorer(
        self, kind: str, family: str, language_model: Callable, reward_model: Callable
    ) -> Scorer:
        """What values candidates: a value model, or one of the other scorers, these over models at hand."""
        if kind == str(AUTOREGRESSIVE):
            return AutoregressiveScorer(language_model(kind, family))
        if kind not in (str(ARGS), str(ROLLOUT)):
            return self.value_model(kind, family)
        reward = RewardScorer(reward_model(REWARD))
        if kind == str(ARGS):
            return reward
        sweep, candidates = self.profile.sweep, self.profile.decoding.candidates
        return RolloutScorer(
            language_model("base", family), reward, sweep.rollout_tokens, candidates=candidates
        )

    @property
    def batch_size(self) -> int:
        return self.profile.decoding.batch_size

    @property
    def reward_strength(self) -> float:
        """What β is multiplied with where rewards stand for values: puts them on the scale that values are distilled from."""
        return self.profile.training.reward_scale / self.scale(REWARD)["sd"]

    def scores(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Generation],
        first: Sequence[int],
        numbers: Sequence[int],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> dict[str, np.ndarray | list]:
        """What responses are worth. content: the judge's score but for fluency. reward: by the evaluation reward model; training_reward: by
        the one that values learn from, of the first sample of each prompt. first: their places; numbers: of each response's prompt."""
        verdicts = [
            judge(self.world.grammar, p.item, r.text, r.finished)
            for p, r in zip(prompts, responses, strict=True)
        ]
        whole = self.conversations(prompts, responses, EVALUATION_REWARD)
        trained_on = self.rewards(REWARD, reward_model(REWARD), [whole[i] for i in first])[numbers]
        return {
            "judge": np.float32([verdict.score for verdict in verdicts]),
            "content": np.float32(
                [
                    cut(sum(p for reason, p in v.points.items() if reason not in FLUENCY))
                    for v in verdicts
                ]
            ).round(2),
            "fluency_errors": [verdict.fluency_errors for verdict in verdicts],
            "reward": np.float32(
                self.rewards(EVALUATION_REWARD, reward_model(EVALUATION_REWARD), whole)
            ).round(2),
            "training_reward": np.float32(trained_on).round(2),
        }

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Generation],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> np.ndarray:
        """What the profile's score says of responses: the judge's."""
        return np.float32(self.judge(prompts, responses))

    def judge(self, prompts: Sequence[Prompt], responses: Sequence[Generation]) -> np.ndarray:
        verdicts = [
            judge(self.world.grammar, p.item, r.text, r.finished)
            for p, r in zip(prompts, responses, strict=True)
        ]
        return np.array([verdict.score for verdict in verdicts])

    def language_model(self, kind: str, family: str) -> PreTrainedModel:
        return by_onednn(
            AutoModelForCausalLM.from_pretrained(
                check_seal(self.path(kind, family)), local_files_only=True
            ).eval()
        )

    def reward_model(self, kind: str) -> PreTrainedModel:
        model = AutoModelForSequenceClassification.from_pretrained(
            check_seal(self.path(kind, SHARED)), local_files_only=True
        )
        return by_onednn(model.eval())

    def value_model(self, kind: str, family: str) -> ValueModel:
        return by_onednn(ValueModel.from_pretrained(check_seal(self.path(kind, family))))

    def rewards(
        self, kind: str, model: PreTrainedModel, sequences: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """By this reward model, in standard deviations of the base models' training responses from their mean."""
        scale = self.scale(kind)
        return (models.trajectory_rewards(model, sequences) - scale["mean"]) / scale["sd"]

    def scale(self, kind: str) -> dict[str, float]:
        """Mean and sd of the raw rewards of the base models' training responses, all families together."""
        return json.loads((self.path(kind, SHARED) / SCALE_FILE).read_text())

    def samples(self, families: Sequence[str], kind: str = "samples") -> pd.DataFrame:
        """The base responses of these families: family, prompt, sample, token_ids (ended), judge."""
        return pd.concat(
            [read_cell(self.path(kind, family)) for family in families], ignore_index=True
        )


def ended(response: Generation) -> list[int]:
    """Its tokens; one that ran out of length gets an end, so that every trajectory to learn from has one."""
    return [*response.token_ids.tolist(), *([] if response.finished else [EOS])]
