"""Training the models of a replicate, everything kept under .cache/.

Order: tokenizer and prompts → base models → two base responses per prompt → reward models from noisy preferences between
them → instruct and value models. Nothing is trained twice: the folder's name is a digest of all that decides its content.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from transformers import PreTrainedModel

from benchmarks.runtime import workers
from benchmarks.runtime.files import link, seal, write_atomically, write_cell
from benchmarks.spec.methods import AUTOREGRESSIVE, EVALUATION_REWARD, REWARD
from benchmarks.spec.model_kinds import LOSSES, SIZES, ModelKind
from benchmarks.spec.profile import Profile
from benchmarks.subjects.lab import models
from benchmarks.subjects.lab.replicate import (
    SCALE_FILE,
    SHARED,
    Replicate,
    ended,
)
from benchmarks.subjects.lab.tokenizer import encode_prompts, encode_responses
from sia import ValueModel
from sia.training import distill

ROWS_PER_SECOND, TOKENS_PER_ROW = (
    400,
    50,
)  # about what a core learns from; for the progress bar alone
SLOWNESS = {"small": 0.4, "": 1.0, "large": 2.5}


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
        settings, kind = self.replicate.profile.training, ModelKind.parse(self.kind)
        samples = 2 * (settings.world_prompts if kind.world else settings.sampled_prompts)
        pairs = 2 * samples * len(self.replicate.profile.families) // 4 * settings.reward_epochs
        favourites = samples * settings.favourites * settings.instruct_epochs
        rows = {
            "base": settings.world_documents if kind.world else settings.documents,
            "samples": samples,
            REWARD: pairs,
            EVALUATION_REWARD: pairs,
            str(AUTOREGRESSIVE): pairs,
            "instruct": favourites,
            "instruct-reward": favourites,
            "value": samples * (settings.early if kind.undertrained else settings.value_epochs),
        }
        return rows[kind.name] / ROWS_PER_SECOND * SLOWNESS[kind.size]


def stages(profile: Profile) -> list[list[tuple[str, str]]]:
    """(kind, family) of everything that is trained or sampled; each stage needs only what is in earlier ones."""
    families, first = profile.families, profile.families[0]
    worlds = [world.name for world in profile.worlds]

    def each(*kinds: str) -> list[tuple[str, str]]:
        return [(kind, family) for kind in kinds for family in families]

    losses = [f"value-{loss}" for loss in LOSSES]
    further = [
        *(f"value-token-{size}" for size in reversed(SIZES)),
        *(f"{value}-early" for value in losses),
    ]
    return [
        [("base-large", first), *each("base"), ("base-small", first)],
        [*each("samples"), *((f"base@{world}", first) for world in worlds)],
        [
            (REWARD, SHARED),
            (EVALUATION_REWARD, SHARED),
            *each(str(AUTOREGRESSIVE), "instruct"),
            *((f"samples@{w}", first) for w in worlds),
        ],
        [
            *((kind, first) for kind in further),
            *each(*losses, "instruct-reward"),
            *((f"{v}@{w}", first) for w in worlds for v in losses),
        ],
    ]


def missing(replicates: Sequence[Replicate]) -> list[list[Task]]:
    """By stage, what has not been made yet."""
    tasks = [
        [Task(r, kind, family) for kind, family in stage for r in replicates]
        for stage in stages(replicates[0].profile)
    ]
    return [[task for task in stage if not task.done] for stage in tasks]


def build(replicates: Sequence[Replicate], workers: workers.Workers) -> None:
    """Trains whatever is missing. At the end `replicateN` links to the folder of the replicate."""
    for replicate in replicates:
        replicate.folder.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(missing(replicates), start=1):
        workers.run(
            make, stage, description=f"lab models {number}/{len(stages(replicates[0].profile))}"
        )
    for replicate in replicates:
        link(replicate.folder.with_name(f"replicate{replicate.index}"), replicate.folder)


def make(task: Task) -> None:
    """Trains or samples one thing and writes it."""
    replicate, kind, family = task.replicate, task.kind, task.family
    path, name = replicate.path(kind, family), ModelKind.parse(kind).name
    if name == "samples":
        write_cell(path, sample_base(replicate, kind, family))
        return
    makers = {
        "base": make_base,
        REWARD: make_reward,
        EVALUATION_REWARD: make_reward,
        str(AUTOREGRESSIVE): make_autoregressive,
    }
    makers |= {"instruct": make_instruct, "instruct-reward": make_instruct, "value": make_value}
    made = makers[name](replicate, kind, family)

    def write(folder: Path) -> None:
        made.save_pretrained(folder)
        replicate.tokenizer.save_pretrained(folder)
        if kind in (REWARD, EVALUATION_REWARD):
            rewards = models.trajectory_rewards(
                made, _sequences(replicate, replicate.samples(replicate.profile.families))
            )
            (folder / SCALE_FILE).write_text(
                json.dumps({"mean": rewards.mean(), "sd": rewards.std()})
            )
        seal(folder)

    try:
        write_atomically(path, write)
    except SafetensorError as error:  # of a full disk, which is an OSError everywhere else
        raise OSError(f"{path} could not be written: {error}") from None


def make_base(replicate: Replicate, kind: str, family: str) -> PreTrainedModel:
    """From random weights; in another world from the base model of the usual one, which goes on to learn."""
    settings, profile, parts = replicate.profile.training, replicate.profile, ModelKind.parse(kind)
    documents = settings.world_documents if parts.world else settings.documents
    prompts, texts = zip(*replicate.corpus(documents, family, parts.world), strict=True)
    seed = replicate.seed(kind, family)
    if parts.world:
        model = replicate.language_model("base", family)
    else:
        size = {"small": profile.small, "": profile.model, "large": profile.large}[parts.size]
        model = models.new_language_model(family, size, len(replicate.tokenizer), seed)
    models.train_language_model(
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
    batch_size, each, world = (
        replicate.profile.decoding.batch_size,
        settings.sampled_prompts // 3,
        ModelKind.parse(kind).world,
    )
    asked = [i for i in range(len(prompts)) if not world or i % each < settings.world_prompts // 3]
    model, ids = (
        replicate.language_model(ModelKind.parse(kind).base, family),
        encode_prompts(replicate.tokenizer, prompts),
    )
    frames = []
    for sample in range(2):
        for start in range(0, len(asked), batch_size):
            chunk = asked[start : start + batch_size]
            responses = replicate.respond(
                model, [ids[i] for i in chunk], replicate.seed("samples", family) + sample
            )
            scores = replicate.judge([prompts[i] for i in chunk], responses)
            tokens = [ended(response) for response in responses]
            frames.append(
                pd.DataFrame(
                    {
                        "family": family,
                        "prompt": chunk,
                        "sample": sample,
                        "token_ids": tokens,
                        "judge": scores,
                    }
                )
            )
            workers.report(len(chunk) / ROWS_PER_SECOND)
    return pd.concat(frames, ignore_index=True)


def learning(kind: str) -> Callable[[int], None]:
    """Reports so many tokens of training as seconds."""
    seconds = SLOWNESS[ModelKind.parse(kind).size] / (ROWS_PER_SECOND * TOKENS_PER_ROW)
    return lambda tokens: workers.report(tokens * seconds)


def preferences(
    replicate: Replicate, kind: str, parity: int
) -> tuple[list[list[int]], list[list[int]], list[int]]:
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
    model = models.new_reward_model(replicate.language_model("base", family), family)
    models.train_reward_model(
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
    models.train_autoregressive_reward(
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
        samples["score"] = models.trajectory_rewards(
            replicate.reward_model(REWARD), _sequences(replicate, samples)
        )
    else:
        samples["score"] = samples["judge"]
    samples["objective"] = [prompts[i].item.objective for i in samples["prompt"]]
    threshold = samples.groupby("objective")["score"].transform(
        lambda scores: scores.quantile(1 - settings.favourites)
    )
    best = samples[samples["score"] >= threshold]
    model = replicate.language_model("base", family)
    models.train_language_model(
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
    settings, parts = replicate.profile.training, ModelKind.parse(kind)
    samples = replicate.samples([family], f"samples@{parts.world}" if parts.world else "samples")
    if parts.undertrained:
        samples = samples.sample(
            frac=settings.early, random_state=replicate.seed(kind, family)
        ).reset_index(drop=True)
    rewards = settings.reward_scale * replicate.rewards(
        REWARD, replicate.reward_model(REWARD), _sequences(replicate, samples)
    )
    prompts = encode_prompts(replicate.tokenizer, replicate.prompts["training"])
    return distill(
        ValueModel.from_backbone(replicate.language_model(parts.base, family)),
        [prompts[i] for i in samples["prompt"]],
        samples["token_ids"].tolist(),
        rewards.tolist(),
        loss=parts.loss,
        epochs=1 if parts.undertrained else settings.value_epochs,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        seed=replicate.seed(kind, family),
        progress=learning(kind),
    )


def _sequences(replicate: Replicate, samples: pd.DataFrame) -> list[list[int]]:
    """Prompt and response of each sample."""
    prompts = encode_prompts(replicate.tokenizer, replicate.prompts["training"])
    return [
        [*prompts[i], *ids] for i, ids in zip(samples["prompt"], samples["token_ids"], strict=True)
    ]
