"""Recipes of the lab's models: from a replicate's corpus and samples to a trained model."""

import random
from dataclasses import replace

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from benchmarks.runtime import workers
from benchmarks.spec.methods import REWARD
from benchmarks.spec.model_kinds import ModelKind
from benchmarks.subjects.lab.models import new_language_model, new_reward_model
from benchmarks.subjects.lab.replicate import Replicate, with_eos
from benchmarks.subjects.lab.tokenizer import encode_prompts, encode_responses
from benchmarks.subjects.lab.training import (
    Optimisation,
    train_autoregressive_reward,
    train_language_model,
    train_reward_model,
)
from benchmarks.subjects.scoring import trajectory_rewards
from sia import ValueModel
from sia.training import distill

# about what a core learns from, for the progress bar alone
ROWS_PER_SECOND, TOKENS_PER_ROW = 110, 140
SLOWNESS = {"small": 0.4, "": 1.0, "large": 1.7}


def train_base(replicate: Replicate, kind: ModelKind, family: str) -> PreTrainedModel:
    """Train a base model on the corpus; in another world, let the usual base learn its corpus."""
    profile, settings = replicate.profile, replicate.profile.training
    documents = settings.world_documents if kind.world else settings.documents
    prompts, texts = zip(*replicate.corpus(documents, family, kind.world), strict=True)
    seed = replicate.seed(str(kind), family)
    if kind.world:
        model, rate = replicate.language_model("base", family), settings.learning_rate
    else:
        size = profile.sizes[kind.size]
        model = new_language_model(family, size, len(replicate.tokenizer), seed)
        rate = settings.base_learning_rate
    train_language_model(
        model,
        encode_prompts(replicate.tokenizer, prompts),
        encode_responses(replicate.tokenizer, texts),
        _optimisation(replicate, kind, seed, epochs=1, learning_rate=rate),
        response_only=False,
    )
    return model


def sample_base(replicate: Replicate, kind: ModelKind, family: str) -> pd.DataFrame:
    """Sample two responses of the base model to each training prompt.

    The base of another world answers only the first prompts of each objective.

    Returns:
        One row per response: family, prompt, sample, token_ids (ended), judge.
    """
    prompts, settings = replicate.prompts["training"], replicate.profile.training
    batch_size, each = replicate.batch_size, settings.sampled_prompts // 3
    count = settings.world_prompts // 3 if kind.world else each
    selected = [i for i in range(len(prompts)) if i % each < count]
    model = replicate.language_model(str(kind.base), family)
    ids = encode_prompts(replicate.tokenizer, prompts)
    frames = []
    for sample in range(2):
        seed = replicate.seed("samples", family) + sample
        for start in range(0, len(selected), batch_size):
            chunk = selected[start : start + batch_size]
            responses = replicate.respond(model, [ids[i] for i in chunk], seed)
            columns = {
                "family": family,
                "prompt": chunk,
                "sample": sample,
                "token_ids": [with_eos(response) for response in responses],
                "judge": replicate.judge([prompts[i] for i in chunk], responses),
            }
            frames.append(pd.DataFrame(columns))
            workers.report(len(chunk) / ROWS_PER_SECOND)
    return pd.concat(frames, ignore_index=True)


def train_reward(replicate: Replicate, kind: ModelKind, family: str) -> PreTrainedModel:
    """Train a reward model on noisy preferences.

    The reward model starts from the first family's base and learns from the even prompts; the one
    for evaluation from the last family's, and the odd prompts.
    """
    families = replicate.profile.families
    start, parity = (families[0], 0) if str(kind) == REWARD else (families[-1], 1)
    chosen, rejected, _ = preferences(replicate, str(kind), parity)
    model = new_reward_model(replicate.language_model("base", start), start)
    seed = replicate.seed(str(kind))
    train_reward_model(model, chosen, rejected, _pair_optimisation(replicate, kind, seed))
    return model


def train_autoregressive(replicate: Replicate, kind: ModelKind, family: str) -> PreTrainedModel:
    """Train the base model on the reward model's preferences: GenARM's reward model."""
    chosen, rejected, starts = preferences(replicate, REWARD, 0)
    model = replicate.language_model("base", family)
    scale = replicate.profile.training.autoregressive_scale
    optimisation = _pair_optimisation(replicate, kind, replicate.seed(str(kind), family))
    train_autoregressive_reward(model, chosen, rejected, starts, scale, optimisation)
    return model


def train_instruct(replicate: Replicate, kind: ModelKind, family: str) -> PreTrainedModel:
    """Train the base model on its own best responses, by the judge or by the reward model."""
    settings, prompts = replicate.profile.training, replicate.prompts["training"]
    samples = replicate.samples([family])
    samples["score"] = samples["judge"]
    if str(kind) == "instruct-reward":
        samples["score"] = trajectory_rewards(
            replicate.reward_model(REWARD), sample_sequences(replicate, samples)
        )
    samples["objective"] = [prompts[i].item.objective for i in samples["prompt"]]
    scores = samples.groupby("objective")["score"]
    threshold = scores.transform(lambda scores: scores.quantile(1 - settings.best_fraction))
    best = samples[samples["score"] >= threshold]
    model = replicate.language_model("base", family)
    train_language_model(
        model,
        encode_prompts(replicate.tokenizer, [prompts[i] for i in best["prompt"]]),
        best["token_ids"].tolist(),
        _optimisation(
            replicate, kind, replicate.seed(str(kind), family), epochs=settings.instruct_epochs
        ),
        response_only=True,
    )
    return model


def train_value(replicate: Replicate, kind: ModelKind, family: str) -> ValueModel:
    """Distil the reward model's scores of base responses into a value model on that base.

    Rewards are scaled to `reward_scale`.
    """
    settings, seed = replicate.profile.training, replicate.seed(str(kind), family)
    samples = replicate.samples([family], f"samples@{kind.world}" if kind.world else "samples")
    rewards = settings.reward_scale * replicate.rewards(
        REWARD, replicate.reward_model(REWARD), sample_sequences(replicate, samples)
    )
    prompts = encode_prompts(replicate.tokenizer, replicate.prompts["training"])
    return distill(
        ValueModel.from_backbone(replicate.language_model(str(kind.base), family)),
        [prompts[i] for i in samples["prompt"]],
        samples["token_ids"].tolist(),
        rewards.tolist(),
        loss=kind.loss,
        **vars(_optimisation(replicate, kind, seed, epochs=settings.value_epochs)),
    )


def sample_sequences(replicate: Replicate, samples: pd.DataFrame) -> list[list[int]]:
    """Return the token ids of each sample's prompt and response."""
    prompts = encode_prompts(replicate.tokenizer, replicate.prompts["training"])
    pairs = zip(samples["prompt"], samples["token_ids"], strict=True)
    return [[*prompts[i], *ids] for i, ids in pairs]


def preferences(
    replicate: Replicate, kind: str, parity: int
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Draw preferences between the two responses to each prompt of a parity, of all families.

    P(a ≻ b) = σ(judge of a − judge of b).

    Returns:
        Chosen and rejected sequences, prompts included, and the lengths of the prompts.
    """
    samples = replicate.samples(replicate.profile.families)
    samples = samples[samples["prompt"] % 2 == parity].reset_index(drop=True)
    sequences = sample_sequences(replicate, samples)
    rng = random.Random(f"preferences {kind} {replicate.index}")
    chosen, rejected, starts = [], [], []
    for first, second in samples.groupby(["family", "prompt"]).groups.values():
        margin = samples["judge"][first] - samples["judge"][second]
        prefers_first = rng.random() < 1 / (1 + np.exp(-margin))
        chosen.append(sequences[first if prefers_first else second])
        rejected.append(sequences[second if prefers_first else first])
        starts.append(len(sequences[first]) - len(samples["token_ids"][first]))
    return chosen, rejected, starts


def _optimisation(
    replicate: Replicate, kind: ModelKind, seed: int, epochs: int, learning_rate: float = 0.0
) -> Optimisation:
    settings = replicate.profile.training
    seconds = SLOWNESS[kind.size] / (ROWS_PER_SECOND * TOKENS_PER_ROW)
    return Optimisation(
        epochs,
        learning_rate or settings.learning_rate,
        settings.batch_size,
        seed,
        lambda tokens: workers.report(tokens * seconds),
    )


def _pair_optimisation(replicate: Replicate, kind: ModelKind, seed: int) -> Optimisation:
    """Return the settings for pairs, of which a batch has half as many."""
    settings = replicate.profile.training
    optimisation = _optimisation(replicate, kind, seed, settings.reward_epochs)
    return replace(optimisation, batch_size=settings.batch_size // 2)
