"""Measuring one shard in a worker process: generate, judge, score, and count. Runs on torch; everything else here does not."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd

from benchmarks import parallel
from benchmarks.cells import Cell, Shard
from benchmarks.lab.build import EVALUATION_REWARD, REWARD, Replicate
from benchmarks.lab.judge import judge
from benchmarks.lab.tokenizer import encode_prompts
from benchmarks.lab.training import trajectory_rewards
from benchmarks.profile import Profile
from sia import EntropyGate, EveryToken, Generation, RandomGate, Steering, calibrate

replicate_of = lru_cache(maxsize=4)(Replicate)


@lru_cache(maxsize=16)
def language_model(replicate: Replicate, kind: str, family: str):
    return replicate.language_model(kind, family)


@lru_cache(maxsize=8)
def reward_model(replicate: Replicate, kind: str):
    return replicate.reward_model(kind)


@lru_cache(maxsize=16)
def value_model(replicate: Replicate, kind: str, family: str):
    return replicate.value_model(kind, family)


def steering_of(cell: Cell, replicate: Replicate) -> Steering | None:
    if cell.gate == "never":
        return None  # responds unsteered, with as many candidates
    gates = {
        "entropy": lambda: EntropyGate(threshold=cell.threshold),
        "random": lambda: RandomGate(ratio=cell.target_ratio),
        "every": EveryToken,
    }
    scorer = value_model(replicate, cell.value_model, cell.family)
    return Steering(scorer, gates[cell.gate](), cell.beta, replicate.profile.decoding.candidates)


def measure(profile: Profile, shard: Shard) -> pd.DataFrame:
    """One row per prompt, in the order of the split; `attrs` holds the thresholds that these generations calibrate to.

    A response that ran out of length is judged and scored as it stands.
    """
    cell, replicate = shard.cell, replicate_of(profile, shard.cell.replicate)
    prompts = replicate.prompts[cell.split]
    ids = encode_prompts(replicate.tokenizer, prompts)
    model, steering = language_model(replicate, cell.model, cell.family), steering_of(cell, replicate)
    # the first of several responses meets the same noise as a single one
    seeds = [shard.seed + number * profile.evaluation.samples for number in range(cell.best_of)]
    tries = [replicate.respond(model, ids, seed, steering) for seed in seeds]
    kept = choose_best(tries, ids, reward_model(replicate, REWARD)) if cell.best_of > 1 else tries[0]
    verdicts = [judge(replicate.world.grammar, p.item, r.text, r.finished) for p, r in zip(prompts, kept, strict=True)]
    sequences = [[*p, *r.token_ids] for p, r in zip(ids, kept, strict=True)]
    rewards = replicate.rewards(EVALUATION_REWARD, reward_model(replicate, EVALUATION_REWARD), sequences)
    frame = pd.DataFrame({
        "objective": [prompt.item.objective for prompt in prompts],
        "prompt": np.arange(len(prompts), dtype=np.int16),
        "seed": np.int8(shard.seed),
        "judge": np.array([verdict.score for verdict in verdicts], dtype=np.float32),
        "fluency_errors": [verdict.fluency_errors for verdict in verdicts],
        "reward": rewards.round(3).astype(np.float32),
        "tokens": np.array([len(r.token_ids) for r in kept], dtype=np.int16),
        "steered": np.array([r.steered.sum() for r in kept], dtype=np.int16),
        "shifted": np.array([r.shifted.sum() for r in kept], dtype=np.int16),
        "kl": np.array([r.kl.sum() for r in kept], dtype=np.float32).round(3),
        "finished": [r.finished for r in kept],
        "model_tokens": np.array([sum(t[i].cost.model_tokens for t in tries) for i in range(len(ids))], dtype=np.int32),
        "value_tokens": np.array([sum(t[i].cost.value_tokens for t in tries) for i in range(len(ids))], dtype=np.int32),
    })  # fmt: skip
    if cell.split == "validation":
        targets = [target for target in profile.figure2.targets if target < 1]
        frame.attrs["thresholds"] = {str(t): calibrate(EntropyGate, tries[0], t).threshold for t in targets}
    parallel.report(round(shard.work * len(prompts)))
    return frame


def choose_best(tries: list[list[Generation]], prompts: list[list[int]], model) -> list[Generation]:
    """For each prompt the response that the reward model likes best; the earliest on ties."""
    rewards = [trajectory_rewards(model, [[*p, *r.token_ids] for p, r in zip(prompts, responses, strict=True)]) for responses in tries]
    return [tries[best][i] for i, best in enumerate(np.argmax(rewards, axis=0))]
