"""How good the lab's models are, on prompts that none of them was trained on: the table models.csv."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from benchmarks import parallel
from benchmarks.lab import training
from benchmarks.lab.build import EVALUATION_REWARD, REWARD, SHARED, VALUE_LOSSES, Replicate
from benchmarks.lab.tokenizer import EOS, encode_prompts, encode_responses
from benchmarks.profile import Profile
from sia import ValueModel, generate
from sia.distill import distillation_loss, pad_right

FRACTIONS = (0.1, 0.5, 1.0)


def model_quality(profile: Profile, replicates: Sequence[int], workers: parallel.Workers) -> pd.DataFrame:
    """Columns replicate, family, model, metric, estimate, n. Nats for losses; correlations are Pearson's, with the judge."""
    tasks = [Replicate(profile, index) for index in replicates]
    found = workers.run(measure_replicate, tasks, description="quality of the models", total=len(tasks), unit="replicate")
    records = [record for records in found for record in records]
    return pd.DataFrame.from_records(records).sort_values(["replicate", "family", "model", "metric"]).round({"estimate": 4})


def measure_replicate(replicate: Replicate) -> list[dict]:
    prompts = replicate.prompts["heldout"]
    ids = encode_prompts(replicate.tokenizer, prompts)
    rng = random.Random(f"heldout responses {replicate.index}")
    documents = encode_responses(replicate.tokenizer, [replicate.world.response(prompt.item, rng) for prompt in prompts])
    records: list[dict] = []

    def note(family: str, model: str, metric: str, estimate: float, n: int) -> None:
        common = {"replicate": replicate.index, "family": family, "model": model}
        records.append(common | {"metric": metric, "estimate": float(estimate), "n": n})

    pairs, scores, samples = [], [], {}
    for family in replicate.profile.families:
        for kind in ("base", "instruct", "instruct-reward"):
            model = replicate.language_model(kind, family)
            note(family, kind, "parameters", sum(p.numel() for p in model.parameters()), 1)
            note(family, kind, "loss on the corpus", training.heldout_loss(model, ids, documents), len(ids))
        base = replicate.language_model("base", family)
        tries = [_responses(replicate, base, ids, seed=100 + sample) for sample in range(2)]
        judged = [replicate.judge(prompts, responses) for responses in tries]
        note(family, "base", "judge score", np.mean(judged), 2 * len(ids))
        tokens = [[list(r.token_ids) + ([] if r.finished else [EOS]) for r in responses] for responses in tries]
        samples[family] = (ids + ids, tokens[0] + tokens[1], np.concatenate(judged))
        pairs += [([*p, *a], [*p, *b]) for p, a, b in zip(ids, *tokens, strict=True)]
        scores.append(np.stack(judged))
    for kind in (REWARD, EVALUATION_REWARD):
        model, judged = replicate.reward_model(kind), np.concatenate(scores, axis=1)
        rewards = np.stack([replicate.rewards(kind, model, [pair[side] for pair in pairs]) for side in range(2)])
        differ = judged[0] != judged[1]
        agree = (rewards[0] > rewards[1]) == (judged[0] > judged[1])
        margin = np.where(judged[0] > judged[1], 1, -1) * (rewards[0] - rewards[1])
        note(SHARED, kind, "pair accuracy", agree[differ].mean(), int(differ.sum()))
        note(SHARED, kind, "correlation", np.corrcoef(rewards.ravel(), judged.ravel())[0, 1], judged.size)
        note(SHARED, kind, "mean margin of the better (SD)", margin[differ].mean(), int(differ.sum()))
    for family, (prompt_ids, responses, judged) in samples.items():
        rewards = replicate.rewards(REWARD, replicate.reward_model(REWARD), [[*p, *r] for p, r in zip(prompt_ids, responses, strict=True)])
        rewards = rewards * replicate.profile.training.reward_scale
        for kind, loss in VALUE_LOSSES.items():
            values = token_values(replicate.value_model(kind, family), prompt_ids, responses)
            note(family, kind, f"loss ({loss})", heldout_value_loss(values, rewards, loss), len(values))
            note(family, kind, "SD of the rewards distilled", rewards.std(), len(values))
            for fraction in FRACTIONS:
                at = np.array([v[math.ceil(fraction * len(v)) - 1] for v in values])
                note(family, kind, f"correlation at {fraction:.0%}", np.corrcoef(at, judged)[0, 1], len(at))
                note(family, kind, f"SD of the values at {fraction:.0%}", at.std(), len(at))
    parallel.report(1)
    return records


@torch.no_grad()
def token_values(value_model: ValueModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The values of each response's tokens."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        found.append(value_model(torch.tensor([[*prompt, *response]]))[0, len(prompt) :].numpy())
    return found


def heldout_value_loss(values: Sequence[np.ndarray], rewards: np.ndarray, loss: str) -> float:
    padded, mask = pad_right([v.tolist() for v in values])
    return distillation_loss(padded, mask, torch.tensor(rewards, dtype=torch.float32), loss).item()


def _responses(replicate: Replicate, model, ids: list[list[int]], seed: int) -> list:
    decoding = replicate.profile.decoding
    return generate(
        model, replicate.tokenizer, ids, max_new_tokens=decoding.max_new_tokens, seed=seed, batch_size=decoding.batch_size, progress=False
    )
