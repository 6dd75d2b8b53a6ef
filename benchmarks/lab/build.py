"""The models of one replicate of the lab: a world seed with its own training, everything kept under .cache/.

Order: tokenizer and prompts → base models → two base responses per prompt → reward models from noisy preferences between
them → instruct and value models. Nothing is trained twice: the folder's name is a digest of all that decides its content.

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

from benchmarks import parallel
from benchmarks.cells import AUTOREGRESSIVE, OBJECTIVES
from benchmarks.digests import MODELS, code_digest
from benchmarks.lab import training
from benchmarks.lab.judge import judge
from benchmarks.lab.tokenizer import EOS, build_tokenizer, encode_prompts, encode_responses
from benchmarks.lab.world import Prompt, World, WorldConfig
from benchmarks.profile import OtherWorld, Profile, digest
from benchmarks.store import CACHE, link, read_frame, write_atomically, write_frame
from sia import Generation, Never, Steering, ValueModel, generate
from sia.distill import distill
from sia.gates import Signal

REWARD, EVALUATION_REWARD = "reward", "evaluation-reward"
SCALE_FILE = "scale.json"
SHARED = "shared"  # in the place of a family: one model serves all
LOSSES = ("mean", "token")
SIZES = ("small", "large")
ROWS_PER_SECOND, TOKENS_PER_ROW = 400, 50  # about what a core learns from; for the progress bar alone
SLOWNESS = {"small": 0.4, "": 1.0, "large": 2.5}


@dataclass(frozen=True)
class Kind:
    """A kind of language or value model, taken apart: `base-small` or `value-mean-early@few-decoys`. size: "" is the usual one."""

    name: str
    loss: str = ""
    size: str = ""
    early: bool = False
    world: str = ""

    @classmethod
    def of(cls, kind: str) -> Kind:
        name, _, world = kind.partition("@")
        if not name.startswith(("base-", "value-")):
            return cls(name, world=world)
        first, *rest = name.split("-")
        loss = rest.pop(0) if first == "value" else ""
        return cls(first, loss, next((part for part in rest if part in SIZES), ""), "early" in rest, world)

    @property
    def base(self) -> str:
        """The kind of the base model that it starts from."""
        return "base" + (f"-{self.size}" if self.size else "") + (f"@{self.world}" if self.world else "")


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
        settings = (profile.model, profile.small, profile.large, profile.training, profile.decoding, *profile.worlds)
        return digest(self.index, profile.families, [asdict(setting) for setting in settings], splits, code_digest(MODELS))

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

    def other_world(self, name: str) -> World:
        """The same items and words, said in other ways: `name` of the profile's worlds; empty: the usual one."""
        if not name:
            return self.world
        other: OtherWorld = next(world for world in self.profile.worlds if world.name == name)
        return World(WorldConfig(seed=self.index, decoys=other.decoys, habits=other.habits, drift=other.drift))

    def corpus(self, count: int, family: str, world: str = "") -> Iterator[tuple[Prompt, str]]:
        """Documents of the base corpus; none has a prompt of the test, validation or heldout split."""
        avoid = {prompt.text for split in ("test", "validation", "heldout") for prompt in self.prompts[split]}
        rng, writer = random.Random(f"corpus {self.index} {family} {world}".strip()), self.other_world(world)
        while count:
            prompt = self.world.prompt(rng)
            if prompt.text not in avoid:
                count -= 1
                yield prompt, writer.response(prompt.item, rng)

    def respond(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seed: int | Sequence[int],
        steering: Steering | None = None,
        observe: Sequence[Signal] = (),
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
            observe=observe,
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

    def samples(self, families: Sequence[str], kind: str = "samples") -> pd.DataFrame:
        """The base responses of these families: family, prompt, sample, token_ids (ended), judge."""
        return pd.concat([read_frame(self.path(kind, family)) for family in families], ignore_index=True)


@dataclass(frozen=True)
class Task:
    replicate: Replicate
    kind: str
    family: str

    @property
    def done(self) -> bool:
        return self.replicate.path(self.kind, self.family).exists()

    @property
    def work(self) -> float:
        """About how many seconds of one core it takes."""
        settings, kind = self.replicate.profile.training, Kind.of(self.kind)
        samples = 2 * (settings.world_prompts if kind.world else settings.sampled_prompts)
        pairs = 2 * samples * len(self.replicate.profile.families) // 4 * settings.reward_epochs
        favourites = samples * settings.favourites * settings.instruct_epochs
        rows = {
            "base": settings.world_documents if kind.world else settings.documents,
            "samples": samples,
            REWARD: pairs,
            EVALUATION_REWARD: pairs,
            AUTOREGRESSIVE: pairs,
            "instruct": favourites,
            "instruct-reward": favourites,
            "value": samples * (settings.early if kind.early else settings.value_epochs),
        }
        return rows[kind.name] / ROWS_PER_SECOND * SLOWNESS[kind.size]


def stages(profile: Profile) -> list[list[tuple[str, str]]]:
    """(kind, family) of everything that is trained or sampled; each stage needs only what is in earlier ones."""
    families, first = profile.families, profile.families[0]
    worlds = [world.name for world in profile.worlds]

    def each(*kinds: str) -> list[tuple[str, str]]:
        return [(kind, family) for kind in kinds for family in families]

    losses = [f"value-{loss}" for loss in LOSSES]
    further = [*(f"value-token-{size}" for size in reversed(SIZES)), *(f"{value}-early" for value in losses)]
    return [
        [("base-large", first), *each("base"), ("base-small", first)],
        [*each("samples"), *((f"base@{world}", first) for world in worlds)],
        [(REWARD, SHARED), (EVALUATION_REWARD, SHARED), *each(AUTOREGRESSIVE, "instruct"), *((f"samples@{w}", first) for w in worlds)],
        [*((kind, first) for kind in further), *each(*losses, "instruct-reward"), *((f"{v}@{w}", first) for w in worlds for v in losses)],
    ]


def missing(replicates: Sequence[Replicate]) -> list[list[Task]]:
    """By stage, what has not been made yet."""
    tasks = [[Task(r, kind, family) for kind, family in stage for r in replicates] for stage in stages(replicates[0].profile)]
    return [[task for task in stage if not task.done] for stage in tasks]


def build(replicates: Sequence[Replicate], workers: parallel.Workers) -> None:
    """Trains whatever is missing. At the end `replicateN` links to the folder of the replicate."""
    for replicate in replicates:
        replicate.folder.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(missing(replicates), start=1):
        workers.run(make, stage, description=f"lab models {number}/{len(stages(replicates[0].profile))}")
    for replicate in replicates:
        link(replicate.folder.with_name(f"replicate{replicate.index}"), replicate.folder)


def make(task: Task) -> None:
    """Trains or samples one thing and writes it."""
    replicate, kind, family = task.replicate, task.kind, task.family
    path, name = replicate.path(kind, family), Kind.of(kind).name
    if name == "samples":
        write_frame(path, sample_base(replicate, kind, family))
        return
    makers = {"base": make_base, REWARD: make_reward, EVALUATION_REWARD: make_reward, AUTOREGRESSIVE: make_autoregressive}
    makers |= {"instruct": make_instruct, "instruct-reward": make_instruct, "value": make_value}
    made = makers[name](replicate, kind, family)

    def write(folder: Path) -> None:
        made.save_pretrained(folder)
        replicate.tokenizer.save_pretrained(folder)
        if kind in (REWARD, EVALUATION_REWARD):
            rewards = training.trajectory_rewards(made, _sequences(replicate, replicate.samples(replicate.profile.families)))
            (folder / SCALE_FILE).write_text(json.dumps({"mean": rewards.mean(), "sd": rewards.std()}))

    write_atomically(path, write)


def make_base(replicate: Replicate, kind: str, family: str) -> PreTrainedModel:
    """From random weights; in another world from the base model of the usual one, which goes on to learn."""
    settings, profile, parts = replicate.profile.training, replicate.profile, Kind.of(kind)
    documents = settings.world_documents if parts.world else settings.documents
    prompts, texts = zip(*replicate.corpus(documents, family, parts.world), strict=True)
    seed = replicate.seed(kind, family)
    if parts.world:
        model = replicate.language_model("base", family)
    else:
        size = {"small": profile.small, "": profile.model, "large": profile.large}[parts.size]
        model = training.new_language_model(family, size, len(replicate.tokenizer), seed)
    training.train_language_model(
        model,
        encode_prompts(replicate.tokenizer, prompts),
        encode_responses(replicate.tokenizer, texts),
        epochs=1,
        learning_rate=settings.learning_rate if parts.world else settings.base_learning_rate,
        batch_size=settings.batch_size,
        seed=seed,
        response_only=False,
        progress=learning(kind),
    )
    return model


def sample_base(replicate: Replicate, kind: str, family: str) -> pd.DataFrame:
    """Two responses of the base model to each training prompt; of another world's, to some of each objective."""
    prompts, settings = replicate.prompts["training"], replicate.profile.training
    batch_size, each, world = replicate.profile.decoding.batch_size, settings.sampled_prompts // 3, Kind.of(kind).world
    asked = [i for i in range(len(prompts)) if not world or i % each < settings.world_prompts // 3]
    model, ids = replicate.language_model(Kind.of(kind).base, family), encode_prompts(replicate.tokenizer, prompts)
    frames = []
    for sample in range(2):
        for start in range(0, len(asked), batch_size):
            chunk = asked[start : start + batch_size]
            responses = replicate.respond(model, [ids[i] for i in chunk], replicate.seed("samples", family) + sample)
            scores = replicate.judge([prompts[i] for i in chunk], responses)
            tokens = [ended(response) for response in responses]
            frames.append(pd.DataFrame({"family": family, "prompt": chunk, "sample": sample, "token_ids": tokens, "judge": scores}))
            parallel.report(len(chunk) / ROWS_PER_SECOND)
    return pd.concat(frames, ignore_index=True)


def learning(kind: str) -> Callable[[int], None]:
    """Reports so many tokens of training as seconds."""
    seconds = SLOWNESS[Kind.of(kind).size] / (ROWS_PER_SECOND * TOKENS_PER_ROW)
    return lambda tokens: parallel.report(tokens * seconds)


def preferences(replicate: Replicate, kind: str, parity: int) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Chosen and rejected responses (with their prompts) to the prompts of this parity, all families, and their prompts' lengths:
    P(a ≻ b) = σ(judge of a − judge of b)."""
    samples = replicate.samples(replicate.profile.families)
    samples = samples[samples["prompt"] % 2 == parity].reset_index(drop=True)
    sequences = _sequences(replicate, samples)
    rng = random.Random(f"preferences {kind} {replicate.index}")
    chosen, rejected, starts = [], [], []
    for _, (first, second) in samples.groupby(["family", "prompt"]).groups.items():
        margin = samples["judge"][first] - samples["judge"][second]
        prefers_first = rng.random() < 1 / (1 + np.exp(-margin))
        chosen.append(sequences[first if prefers_first else second])
        rejected.append(sequences[second if prefers_first else first])
        starts.append(len(sequences[first]) - len(samples["token_ids"][first]))
    return chosen, rejected, starts


def make_reward(replicate: Replicate, kind: str, family: str) -> PreTrainedModel:
    """The reward model starts from the first family's base and learns from the even prompts; the one for evaluation from the last
    family's, and the odd prompts."""
    settings, families = replicate.profile.training, replicate.profile.families
    family, parity = (families[0], 0) if kind == REWARD else (families[-1], 1)
    chosen, rejected, _ = preferences(replicate, kind, parity)
    model = training.new_reward_model(replicate.language_model("base", family), family)
    training.train_reward_model(
        model,
        chosen,
        rejected,
        epochs=settings.reward_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size // 2,
        seed=replicate.seed(kind),
        progress=learning(kind),
    )
    return model


def make_autoregressive(replicate: Replicate, kind: str, family: str) -> PreTrainedModel:
    """The base model trained on the same preferences as the reward model: GenARM's autoregressive reward model."""
    settings = replicate.profile.training
    chosen, rejected, starts = preferences(replicate, REWARD, 0)
    model = replicate.language_model("base", family)
    training.train_autoregressive_reward(
        model,
        chosen,
        rejected,
        starts,
        scale=settings.autoregressive_scale,
        epochs=settings.reward_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size // 2,
        seed=replicate.seed(kind, family),
        progress=learning(kind),
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
        progress=learning(kind),
    )
    return model


def make_value(replicate: Replicate, kind: str, family: str) -> ValueModel:
    """A value model on a base's own backbone, from the reward model's scores of the usual base's responses (in another world: of that
    world's base), scaled to `reward_scale`. Early ones have seen few of them once."""
    settings, parts = replicate.profile.training, Kind.of(kind)
    samples = replicate.samples([family], f"samples@{parts.world}" if parts.world else "samples")
    if parts.early:
        samples = samples.sample(frac=settings.early, random_state=replicate.seed(kind, family)).reset_index(drop=True)
    rewards = settings.reward_scale * replicate.rewards(REWARD, replicate.reward_model(REWARD), _sequences(replicate, samples))
    prompts = encode_prompts(replicate.tokenizer, replicate.prompts["training"])
    return distill(
        ValueModel.from_backbone(replicate.language_model(parts.base, family)),
        [prompts[i] for i in samples["prompt"]],
        samples["token_ids"].tolist(),
        rewards.tolist(),
        loss=parts.loss,
        epochs=1 if parts.early else settings.value_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=replicate.seed(kind, family),
        progress=learning(kind),
    )


def ended(response: Generation) -> list[int]:
    """Its tokens; one that ran out of length gets an end, so that every trajectory to learn from has one."""
    return [*response.token_ids.tolist(), *([] if response.finished else [EOS])]


def _sequences(replicate: Replicate, samples: pd.DataFrame) -> list[list[int]]:
    """Prompt and response of each sample."""
    prompts = encode_prompts(replicate.tokenizer, replicate.prompts["training"])
    return [[*prompts[i], *ids] for i, ids in zip(samples["prompt"], samples["token_ids"], strict=True)]
