"""The models of one replicate of the lab: a world seed with its own training, everything kept under .cache/.

Order: tokenizer and prompts → base models → two base responses per prompt → reward models from noisy preferences between
them → instruct and value models. Nothing is trained twice: the folder's name is a digest of all that decides its content.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from benchmarks import parallel
from benchmarks.cells import OBJECTIVES, VALUE_LOSSES
from benchmarks.digests import MODELS, code_digest
from benchmarks.lab import training
from benchmarks.lab.judge import judge
from benchmarks.lab.tokenizer import EOS, build_tokenizer, encode_prompts, encode_responses
from benchmarks.lab.world import Prompt, World, WorldConfig
from benchmarks.profile import Profile, digest
from benchmarks.store import CACHE, link, read_frame, write_atomically, write_frame
from sia import Generation, Never, Steering, ValueModel, generate
from sia.distill import distill

REWARD, EVALUATION_REWARD = "reward", "evaluation-reward"
SCALE_FILE = "scale.json"
SHARED = "shared"  # in the place of a family: one model serves all


@dataclass(frozen=True)
class Replicate:
    """One replicate: `index` is the seed of its world and of all its training."""

    profile: Profile
    index: int

    @cached_property
    def digest(self) -> str:
        """Of all that decides the models; the sizes of the held-out splits are part of it, for training avoids their prompts."""
        profile = self.profile
        splits = (profile.evaluation.prompts_per_objective, profile.evaluation.validation_prompts_per_objective)
        decisive = (profile.families, asdict(profile.model), asdict(profile.training), asdict(profile.decoding), splits)
        return digest(self.index, *decisive, code_digest(MODELS))

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
            splits[split] = [p for objective in OBJECTIVES for p in self.world.prompts(rng, count, objective, taken)]
            taken |= {prompt.text for prompt in splits[split]}
        return splits

    def corpus(self, count: int, family: str) -> Iterator[tuple[Prompt, str]]:
        """Documents of the base corpus; none has a prompt of the test, validation or heldout split."""
        avoid = {prompt.text for split in ("test", "validation", "heldout") for prompt in self.prompts[split]}
        rng = random.Random(f"corpus {self.index} {family}")
        while count:
            prompt = self.world.prompt(rng)
            if prompt.text not in avoid:
                count -= 1
                yield prompt, self.world.response(prompt.item, rng)

    def respond(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], seed: int, steering: Steering | None = None
    ) -> list[Generation]:
        """A response to each prompt by the profile's decoding settings; unsteered by default."""
        decoding = self.profile.decoding
        return generate(
            model,
            self.tokenizer,
            prompts,
            steering or Steering(None, Never(), candidates=decoding.candidates),
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            seed=seed,
            batch_size=decoding.batch_size,
            progress=False,
        )

    def judge(self, prompts: Sequence[Prompt], responses: Sequence[Generation]) -> np.ndarray:
        verdicts = [judge(self.world.grammar, p.item, r.text, r.finished) for p, r in zip(prompts, responses, strict=True)]
        return np.array([verdict.score for verdict in verdicts])

    def language_model(self, kind: str, family: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.path(kind, family), local_files_only=True).eval()

    def reward_model(self, kind: str) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(self.path(kind, SHARED), local_files_only=True).eval()

    def value_model(self, kind: str, family: str) -> ValueModel:
        return ValueModel.from_pretrained(self.path(kind, family))

    def rewards(self, kind: str, model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """By this reward model, in standard deviations of the base models' training responses from their mean."""
        scale = self.scale(kind)
        return (training.trajectory_rewards(model, sequences) - scale["mean"]) / scale["sd"]

    def scale(self, kind: str) -> dict[str, float]:
        """Mean and sd of the raw rewards of the base models' training responses, all families together."""
        return json.loads((self.path(kind, SHARED) / SCALE_FILE).read_text())

    def samples(self, families: Sequence[str]) -> pd.DataFrame:
        """The base responses of these families: family, prompt, sample, token_ids (ended), judge."""
        return pd.concat([read_frame(self.path("samples", family)) for family in families], ignore_index=True)


@dataclass(frozen=True)
class Task:
    replicate: Replicate
    kind: str
    family: str

    @property
    def done(self) -> bool:
        return self.replicate.path(self.kind, self.family).exists()

    @property
    def work(self) -> int:
        """About how many tokens it reads or writes, for the progress bar."""
        settings = self.replicate.profile.training
        samples = 2 * settings.sampled_prompts
        families = len(self.replicate.profile.families)
        rows = {
            "base": settings.documents,
            "samples": samples,
            REWARD: samples * families // 2 * settings.reward_epochs,
            EVALUATION_REWARD: samples * families // 2 * settings.reward_epochs,
            "instruct": samples * settings.favourites * settings.instruct_epochs,
            "instruct-reward": samples * settings.favourites * settings.instruct_epochs,
        }
        return int(50 * rows.get(self.kind, samples * settings.value_epochs))


def build(replicates: Sequence[Replicate], workers: parallel.Workers) -> None:
    """Trains whatever is missing, and shows how far it is. At the end `replicateN` links to the folder of the replicate."""
    families = replicates[0].profile.families
    stages = [
        [("base", family) for family in families],
        [("samples", family) for family in families],
        [(REWARD, SHARED), (EVALUATION_REWARD, SHARED), *(("instruct", family) for family in families)],
        [(kind, family) for kind in (*VALUE_LOSSES, "instruct-reward") for family in families],
    ]
    tasks = [[Task(r, kind, family) for kind, family in stage for r in replicates] for stage in stages]
    missing = [[task for task in stage if not task.done] for stage in tasks]
    for replicate in replicates:
        replicate.folder.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(missing, start=1):
        names = ", ".join(dict.fromkeys(task.kind for task in stage))
        description = f"lab models {number}/{len(stages)}: {names}"
        workers.run(make, stage, description=description, total=sum(task.work for task in stage), unit="token")
    for replicate in replicates:
        link(replicate.folder.with_name(f"replicate{replicate.index}"), replicate.folder)


def make(task: Task) -> None:
    """Trains or samples one thing and writes it."""
    replicate, family = task.replicate, task.family
    path = replicate.path(task.kind, family)
    if task.kind == "samples":
        write_frame(path, sample_base(replicate, family))
        return
    makers = {"base": make_base, REWARD: make_reward, EVALUATION_REWARD: make_reward}
    makers |= {"instruct": make_instruct, "instruct-reward": make_instruct} | dict.fromkeys(VALUE_LOSSES, make_value)
    made = makers[task.kind](replicate, task.kind, family)

    def write(folder: Path) -> None:
        made.save_pretrained(folder)
        replicate.tokenizer.save_pretrained(folder)
        if task.kind in (REWARD, EVALUATION_REWARD):
            rewards = training.trajectory_rewards(made, _sequences(replicate, replicate.samples(replicate.profile.families)))
            (folder / SCALE_FILE).write_text(json.dumps({"mean": rewards.mean(), "sd": rewards.std()}))

    write_atomically(path, write)


def make_base(replicate: Replicate, kind: str, family: str) -> PreTrainedModel:
    settings = replicate.profile.training
    prompts, texts = zip(*replicate.corpus(settings.documents, family), strict=True)
    seed = replicate.seed(kind, family)
    model = training.new_language_model(family, replicate.profile.model, len(replicate.tokenizer), seed)
    training.train_language_model(
        model,
        encode_prompts(replicate.tokenizer, prompts),
        encode_responses(replicate.tokenizer, texts),
        epochs=1,
        learning_rate=settings.base_learning_rate,
        batch_size=settings.batch_size,
        seed=seed,
        response_only=False,
        progress=parallel.report,
    )
    return model


def sample_base(replicate: Replicate, family: str) -> pd.DataFrame:
    """Two responses of the base model to each training prompt."""
    prompts, batch_size = replicate.prompts["training"], replicate.profile.decoding.batch_size
    model, ids = replicate.language_model("base", family), encode_prompts(replicate.tokenizer, prompts)
    frames = []
    for sample in range(2):
        for start in range(0, len(ids), batch_size):
            chunk = range(start, min(start + batch_size, len(ids)))
            responses = replicate.respond(model, [ids[i] for i in chunk], replicate.seed("samples", family) + sample)
            scores = replicate.judge([prompts[i] for i in chunk], responses)
            tokens = [ended(response) for response in responses]
            frames.append(pd.DataFrame({"family": family, "prompt": chunk, "sample": sample, "token_ids": tokens, "judge": scores}))
            parallel.report(50 * len(chunk))
    return pd.concat(frames, ignore_index=True)


def make_reward(replicate: Replicate, kind: str, family: str) -> PreTrainedModel:
    """From noisy preferences: P(a ≻ b) = σ(judge of a − judge of b). The reward model starts from the first family's base
    and learns from the even prompts; the one for evaluation from the last family's, and the odd prompts."""
    profile, settings = replicate.profile, replicate.profile.training
    family, parity = (profile.families[0], 0) if kind == REWARD else (profile.families[-1], 1)
    samples = replicate.samples(profile.families)
    samples = samples[samples["prompt"] % 2 == parity].reset_index(drop=True)
    sequences = _sequences(replicate, samples)
    rng = random.Random(f"preferences {kind} {replicate.index}")
    chosen, rejected = [], []
    for _, (first, second) in samples.groupby(["family", "prompt"]).groups.items():
        margin = samples["judge"][first] - samples["judge"][second]
        prefers_first = rng.random() < 1 / (1 + np.exp(-margin))
        chosen.append(sequences[first if prefers_first else second])
        rejected.append(sequences[second if prefers_first else first])
    model = training.new_reward_model(replicate.language_model("base", family), family)
    training.train_reward_model(
        model,
        chosen,
        rejected,
        epochs=settings.reward_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size // 2,
        seed=replicate.seed(kind),
        progress=parallel.report,
    )
    return model


def make_instruct(replicate: Replicate, kind: str, family: str) -> PreTrainedModel:
    """The base model trained on the best of its own responses to each objective's prompts, by the judge or by the reward model."""
    settings, prompts = replicate.profile.training, replicate.prompts["training"]
    samples = replicate.samples([family])
    if kind == "instruct-reward":
        samples["score"] = training.trajectory_rewards(replicate.reward_model(REWARD), _sequences(replicate, samples))
    else:
        samples["score"] = samples["judge"]
    samples["objective"] = [prompts[i].item.objective for i in samples["prompt"]]
    threshold = samples.groupby("objective")["score"].transform(lambda scores: scores.quantile(1 - settings.favourites))
    best = samples[samples["score"] >= threshold]
    model = replicate.language_model("base", family)
    training.train_language_model(
        model,
        encode_prompts(replicate.tokenizer, [prompts[i] for i in best["prompt"]]),
        best["token_ids"].tolist(),
        epochs=settings.instruct_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=replicate.seed(kind, family),
        response_only=True,
        progress=parallel.report,
    )
    return model


def make_value(replicate: Replicate, kind: str, family: str) -> ValueModel:
    """A value model on the base's own backbone, from the reward model's scores of its responses, scaled to `reward_scale`."""
    settings, samples = replicate.profile.training, replicate.samples([family])
    rewards = settings.reward_scale * replicate.rewards(REWARD, replicate.reward_model(REWARD), _sequences(replicate, samples))
    prompts = encode_prompts(replicate.tokenizer, replicate.prompts["training"])
    return distill(
        ValueModel.from_backbone(replicate.language_model("base", family)),
        [prompts[i] for i in samples["prompt"]],
        samples["token_ids"].tolist(),
        rewards.tolist(),
        loss=VALUE_LOSSES[kind],
        epochs=settings.value_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=replicate.seed(kind, family),
        progress=parallel.report,
    )


def ended(response: Generation) -> list[int]:
    """Its tokens; one that ran out of length gets an end, so that every trajectory to learn from has one."""
    return [*response.token_ids.tolist(), *([] if response.finished else [EOS])]


def _sequences(replicate: Replicate, samples: pd.DataFrame) -> list[list[int]]:
    """Prompt and response of each sample."""
    prompts = encode_prompts(replicate.tokenizer, replicate.prompts["training"])
    return [[*prompts[i], *ids] for i, ids in zip(samples["prompt"], samples["token_ids"], strict=True)]
