"""The lab's part of what must come out the same on any machine (`exact.py`): texts and their judgement, the rows of every kind of cell by
models that have learned nothing, how good these are, and what the sweep settles."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from benchmarks.checks.exact_models import language_model, reward_model, value_model
from benchmarks.engine import measure
from benchmarks.engine.gates import calibrated_gates
from benchmarks.engine.sweep import Sweep as Results
from benchmarks.engine.traces import candidate_table as view
from benchmarks.engine.traces import rollout_values as probe
from benchmarks.engine.traces import trace_tokens as trace
from benchmarks.spec.cells import OBJECTIVES, Cell, Shard
from benchmarks.spec.methods import ARGS, AUTOREGRESSIVE, ROLLOUT
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.judge import judge
from benchmarks.subjects.lab.quality import measure_replicate
from benchmarks.subjects.lab.replicate import SHARED, Replicate
from benchmarks.subjects.lab.tokenizer import EOS, encode_responses
from benchmarks.subjects.lab.world import Prompt, World, WorldConfig
from sia import Generation, ValueModel


def lab_texts() -> dict:
    """What the world writes, and what the judge says of it, whole, cut short, repeated and about something else."""
    found = {}
    for seed in (0, 1):
        world, rng = World(WorldConfig(seed=seed)), random.Random(seed)
        asked = [p for objective in OBJECTIVES for p in world.prompts(rng, 6, objective, set())]
        texts = [world.response(prompt.item, rng) for prompt in asked]
        for number, (prompt, text) in enumerate(zip(asked, texts, strict=True)):
            said = {
                "whole": text,
                "repeated": f"{text} {text}",
                "cut": text[: len(text) // 2],
                "other": texts[number - 1],
            }
            verdicts = {
                name: judge(world.grammar, prompt.item, words, name != "cut")
                for name, words in said.items()
            }
            points = {
                name: [verdict.points, verdict.score, verdict.fluency_errors]
                for name, verdict in verdicts.items()
            }
            found[f"world {seed}, {number}"] = {
                "prompt": prompt.text,
                "response": text,
                "judged": points,
            }
    return found


class Untrained(Replicate):
    """A replicate of the smoke profile, made small, whose models have exact weights and have learned nothing."""

    @classmethod
    def small(cls) -> Untrained:
        smoke = load_profile("smoke")
        return cls(
            replace(
                smoke,
                name="untrained",
                decoding=replace(
                    smoke.decoding, max_new_tokens=10, batch_size=7, temperature=0.8, candidates=9
                ),
                evaluation=replace(
                    smoke.evaluation, prompts_per_objective=3, validation_prompts_per_objective=3
                ),
                training=replace(smoke.training, heldout_prompts=6),
                sweep=replace(smoke.sweep, probes=2, rollout_prompts=1, rollout_tokens=2),
            ),
            0,
        )

    def written(self, prompt: Prompt, rng: random.Random, finished: bool = True) -> Generation:
        """A response that the world writes, whole or cut short."""
        ids = np.array(
            encode_responses(self.tokenizer, [self.world.response(prompt.item, rng)])[0][
                : None if finished else -6
            ]
        )
        words = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Generation(
            words,
            ids,
            *[np.zeros(len(ids), dtype=kind) for kind in ("f4", "?", "i8", "f4")],
            finished,
        )

    def encode(self, prompts: Sequence[Prompt], kind: str) -> list[list[int]]:
        """Each kind of model in a template of its own, as real ones are: a word before the prompt."""
        words = {
            "instruct": [10],
            "value-token": [11],
            "value-mean": [12, 12],
            ARGS: [13],
            AUTOREGRESSIVE: [14],
        }
        return [[*words.get(kind, []), *ids] for ids in super().encode(prompts, kind)]

    def seed_of(self, kind: str, family: str) -> int:
        return self.seed("exact", kind, family) % 1000

    def language_model(self, kind: str, family: str) -> PreTrainedModel:
        model = language_model(family, self.seed_of(kind, family), len(self.tokenizer), size=0.6)
        with torch.no_grad():
            model.get_output_embeddings().weight[EOS] *= 2  # so that some responses end early
        return model

    def reward_model(self, kind: str) -> PreTrainedModel:
        return reward_model(
            self.profile.families[0], self.seed_of(kind, SHARED), len(self.tokenizer)
        )

    def value_model(self, kind: str, family: str) -> ValueModel:
        return value_model(family, self.seed_of(kind, family), len(self.tokenizer))

    def scale(self, kind: str) -> dict[str, float]:
        return {"mean": 0.25, "sd": 1.5}


def lab_rows() -> dict:
    """The rows of cells of every kind, in every column that the sweep measures, with the thresholds found and traces and probes."""
    subject, found = Untrained.small(), {}
    token, mean = "value-token", "value-mean"
    thresholds = (2.15, 2.05, 2.2)  # so that each objective needs its own
    cells = {
        "base": Cell(0, "qwen3"),
        "instruct": Cell(0, "llama", model="instruct"),
        "best of 4": Cell(0, "qwen3", search="best-of", responses=4),
        "sia": Cell(0, "qwen3", value_model=mean, gate="entropy", target_ratio=0.5, thresholds=thresholds, beta=1.0),
        "sia, β = ∞": Cell(0, "llama", value_model=token, gate="entropy", target_ratio=0.5, thresholds=thresholds, beta=math.inf),
        "low entropy": Cell(0, "qwen3", value_model=token, gate="inverted-entropy", target_ratio=0.5, thresholds=thresholds, beta=1.0),
        "τ = 2": Cell(0, "qwen3", value_model=token, gate="entropy", threshold=2.0, beta=2.0),
        "dense, floor": Cell(0, "qwen3", value_model=token, gate="every", target_ratio=1.0, beta=2.0, floor=0.09),
        "random, best of 2": Cell(
            0, "qwen3", value_model=token, gate="random", target_ratio=0.3, beta=1.0, search="best-of", responses=2
        ),
        "beams": Cell(0, "qwen3", search="beams", responses=4),
        "args": Cell(0, "qwen3", value_model=ARGS, gate="every", target_ratio=1.0, beta=0.5),
        "genarm": Cell(0, "llama", value_model=AUTOREGRESSIVE, gate="every", target_ratio=1.0, beta=0.5),
        "transfer-q": Cell(0, "qwen3", value_model=ROLLOUT, gate="every", target_ratio=1.0, beta=0.5, prompts=1),
        "validation": Cell(0, "qwen3", split="validation"),
    }  # fmt: skip
    for name, cell in cells.items():
        for objective in OBJECTIVES[:2]:
            rows = measure.measure(subject, Shard(cell, objective))
            found[f"{name}, {objective}"] = columns(rows) | {
                "thresholds": rows.attrs.get("thresholds")
            }
    found["texts of the world"] = texts_scored(subject)
    shard = Shard(cells["sia"], OBJECTIVES[0])
    return found | {
        "trace": columns(trace(subject, shard)),
        "probe": columns(probe(subject, shard)),
        "view": columns(view(subject, shard)),
    }


def texts_scored(subject: Untrained) -> dict:
    """Every score of responses that the world wrote, whole and cut short."""
    rng = random.Random(0)
    asked = [prompt for prompt in subject.prompts["test"] for _ in range(2)]
    responses = [
        subject.written(prompt, rng, finished=number % 2 == 0)
        for number, prompt in enumerate(asked)
    ]
    first, of_prompt = list(range(0, len(asked), 2)), [number // 2 for number in range(len(asked))]
    return subject.scores(asked, responses, first, of_prompt, subject.reward_model)


def columns(rows: pd.DataFrame) -> dict:
    return {name: rows[name].tolist() for name in rows}


class Answering(Untrained):
    """Its models have losses, rewards and values of their own; what they say the world writes, so that the judge tells it apart."""

    def respond(self, model, prompts, seed, *arguments) -> list[Generation]:
        rng = random.Random(seed)
        return [self.written(prompt, rng) for prompt in self.prompts["heldout"]]


def models() -> dict:
    """How good models that have learned nothing are, by every measure of models.csv."""
    return {
        f"{one['family']}, {one['model']}, {one['metric']}": [one["estimate"], one["n"]]
        for one in measure_replicate(Answering.small())
    }


class Validated(Results):
    """Validation cells as if they had been measured: gates open less the higher their threshold, each objective's otherwise; the score
    is best at β = 2 on validation prompts, at the strongest on others and in harmlessness."""

    def _read(self, shard: Shard) -> pd.DataFrame:
        cell, place = shard.cell, OBJECTIVES.index(shard.objective)
        highest = (
            1.5 + 0.2 * place - (0.0 if cell.gate == "never" else 0.15 * cell.beta)
        )  # steering makes surer
        ratio = max(0.0, 1 - cell.thresholds[place] / highest) if cell.thresholds else 0.0
        liked = -abs(cell.beta - 2) if cell.split == "validation" and place else cell.beta
        frame = pd.DataFrame(
            {"judge": [float(liked)], "steered": [1000 * ratio], "tokens": [1000.0]}
        )
        asked = {
            str(target): highest * (1 - target) + 0.05 * place
            for target in self.profile.sweep.ratios
        }
        frame.attrs["thresholds"] = dict.fromkeys(
            calibrated_gates() if cell.gate == "never" else [cell.gate], asked
        )
        return frame


def settling() -> dict:
    """Thresholds that are kept, corrected and corrected again; the best β; and what is measured for that."""
    smoke = load_profile("smoke")
    results = Validated(
        replace(smoke, sweep=replace(smoke.sweep, betas=(1.0, 2.0, 4.0), tuning=(1.0, 2.0, 4.0))),
        None,
    )
    token = Cell(0, "qwen3", value_model="value-token", gate="entropy", target_ratio=0.5, beta=1.0)
    cells = {
        "β = 1": token,
        "β = 4, 20%": replace(token, beta=4.0, target_ratio=0.2),
        "best β": replace(token, tuned=True),
        "best β, dense": replace(token, gate="every", target_ratio=1.0, tuned=True),
        "first tokens": replace(token, gate="position"),
        "best of 4": replace(token, search="best-of", responses=4, tuned=True),
        "τ = 1": replace(token, threshold=1.0, target_ratio=0.0),
    }
    settled = {name: results.settled(cell) for name, cell in cells.items()}
    stages = [[str(cell) for cell in stage] for stage in results.stages(cells.values())]
    return {name: [cell.beta, *cell.thresholds] for name, cell in settled.items()} | {
        "validation cells": stages
    }
