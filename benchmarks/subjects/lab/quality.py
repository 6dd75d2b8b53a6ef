"""How good the lab's models are, on prompts that none of them was trained on: the table models.csv."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from benchmarks.runtime import workers
from benchmarks.spec.methods import AUTOREGRESSIVE, EVALUATION_REWARD, REWARD
from benchmarks.spec.model_kinds import ModelKind
from benchmarks.spec.profile import Profile
from benchmarks.subjects.lab import models
from benchmarks.subjects.lab.replicate import (
    SHARED,
    Replicate,
    ended,
)
from benchmarks.subjects.lab.tokenizer import encode_prompts, encode_responses
from benchmarks.subjects.lab.train import stages
from sia import ValueModel
from sia._inputs import pad_right
from sia.training import distillation_loss

FRACTIONS = (0.1, 0.5, 1.0)
WORK = 40  # seconds of one core, about; for the progress bar alone


def model_quality(
    profile: Profile, replicates: Sequence[int], workers: workers.Workers
) -> pd.DataFrame:
    """Columns replicate, family, model, metric, estimate, n. Nats for losses; correlations are Pearson's, with the judge."""
    tasks = [Replicate(profile, index) for index in replicates]
    found = workers.run(measure_replicate, tasks, description="quality of the models")
    records = [record for records in found for record in records]
    return (
        pd.DataFrame.from_records(records)
        .sort_values(["replicate", "family", "model", "metric"])
        .round({"estimate": 4})
    )


def measure_replicate(replicate: Replicate) -> list[dict]:
    prompts = replicate.prompts["heldout"]
    ids = encode_prompts(replicate.tokenizer, prompts)
    records: list[dict] = []

    def note(family: str, model: str, metric: str, estimate: float, n: int) -> None:
        common = {"replicate": replicate.index, "family": family, "model": model}
        records.append(common | {"metric": metric, "estimate": float(estimate), "n": n})

    made = [(kind, family) for stage in stages(replicate.profile) for kind, family in stage]
    responses: dict[
        tuple[str, str], tuple[list[list[int]], np.ndarray]
    ] = {}  # (kind, family) → two of each prompt, judge scores
    for kind, family in made:
        parts = ModelKind.parse(kind)
        if parts.name not in ("base", "instruct", "instruct-reward"):
            continue
        rng, writer = (
            random.Random(f"heldout responses {replicate.index}"),
            replicate.other_world(parts.world),
        )
        documents = encode_responses(
            replicate.tokenizer, [writer.response(prompt.item, rng) for prompt in prompts]
        )
        model = replicate.language_model(kind, family)
        tries = [replicate.respond(model, ids, seed=100 + sample) for sample in range(2)]
        judged = np.concatenate([replicate.judge(prompts, many) for many in tries])
        responses[kind, family] = [ended(response) for many in tries for response in many], judged
        note(family, kind, "parameters", sum(p.numel() for p in model.parameters()), 1)
        note(
            family, kind, "loss on the corpus", models.heldout_loss(model, ids, documents), len(ids)
        )
        note(family, kind, "judge score", judged.mean(), len(judged))
    bases = [responses["base", family] for family in replicate.profile.families]
    pairs = [
        ([*p, *a], [*p, *b])
        for tokens, _ in bases
        for p, a, b in zip(ids, tokens[: len(ids)], tokens[len(ids) :], strict=True)
    ]
    judged = np.concatenate([scores.reshape(2, -1) for _, scores in bases], axis=1)
    differ = judged[0] != judged[1]
    for kind in (REWARD, EVALUATION_REWARD):
        model = replicate.reward_model(kind)
        rewards = np.stack(
            [replicate.rewards(kind, model, [pair[side] for pair in pairs]) for side in range(2)]
        )
        agree = (rewards[0] > rewards[1]) == (judged[0] > judged[1])
        # expected loss over the noisy preferences that such models learn from
        preferred = 1 / (1 + np.exp(judged[1] - judged[0]))
        margin = (rewards[0] - rewards[1]) * replicate.scale(kind)["sd"]
        loss = preferred * np.logaddexp(0, -margin) + (1 - preferred) * np.logaddexp(0, margin)
        note(SHARED, kind, "pair accuracy", agree[differ].mean(), int(differ.sum()))
        note(
            SHARED,
            kind,
            "correlation",
            np.corrcoef(rewards.ravel(), judged.ravel())[0, 1],
            judged.size,
        )
        note(SHARED, kind, "loss on noisy preferences", loss.mean(), loss.size)
    for kind, family in made:
        parts = ModelKind.parse(kind)
        if kind == str(AUTOREGRESSIVE):
            model, starts = (
                replicate.language_model(kind, family),
                [len(p) for p in ids] * len(bases),
            )
            likelihoods = [
                models.sequence_log_likelihoods(model, [pair[side] for pair in pairs], starts)
                for side in range(2)
            ]
            agree = (likelihoods[0] > likelihoods[1]) == (judged[0] > judged[1])
            note(family, kind, "pair accuracy", agree[differ].mean(), int(differ.sum()))
        if parts.name != "value":
            continue
        tokens, scores = responses[f"base@{parts.world}" if parts.world else "base", family]
        sequences = [[*p, *r] for p, r in zip(ids + ids, tokens, strict=True)]
        rewards = replicate.profile.training.reward_scale * replicate.rewards(
            REWARD, replicate.reward_model(REWARD), sequences
        )
        values = token_values(replicate.value_model(kind, family), ids + ids, tokens)
        note(
            family,
            kind,
            f"loss ({parts.loss})",
            heldout_value_loss(values, rewards, parts.loss),
            len(values),
        )
        note(family, kind, "SD of the scaled rewards", rewards.std(), len(values))
        for fraction in FRACTIONS:
            at = np.array([v[math.ceil(fraction * len(v)) - 1] for v in values])
            note(
                family,
                kind,
                f"correlation at {fraction:.0%}",
                np.corrcoef(at, scores)[0, 1],
                len(at),
            )
            note(family, kind, f"SD of the values at {fraction:.0%}", at.std(), len(at))
    workers.report(WORK)
    return records


@torch.no_grad()
def token_values(
    value_model: ValueModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """The values of each response's tokens."""
    sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    found: list[np.ndarray] = [np.empty(0)] * len(sequences)
    for batch in models.batches_by_length(
        [len(sequence) for sequence in sequences], models.positions_at_once(value_model.device)
    ):
        input_ids, mask = pad_right([sequences[i] for i in batch])
        for i, values in zip(batch, value_model(input_ids, mask), strict=True):
            found[i] = values[len(prompts[i]) : len(sequences[i])].numpy()
    return found


def heldout_value_loss(values: Sequence[np.ndarray], rewards: np.ndarray, loss: str) -> float:
    padded, mask = pad_right([v.tolist() for v in values])
    return distillation_loss(padded, mask, torch.tensor(rewards, dtype=torch.float32), loss).item()
