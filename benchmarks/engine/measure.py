"""Measuring one shard in a worker process: generate, score, and count. What is measured is a subject, of the lab or of the Hub."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial, reduce
from operator import add

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from benchmarks.engine.gates import GATES
from benchmarks.runtime import workers
from benchmarks.spec.cells import ARGS, CALIBRATED, OBJECTIVES, ROLLOUT, Cell, Shard
from benchmarks.spec.profile import Profile
from benchmarks.subjects import subject_class
from benchmarks.subjects.base import Subject
from benchmarks.subjects.lab.models import sequence_log_likelihoods, trajectory_rewards
from benchmarks.subjects.lab.replicate import REWARD
from sia import (
    Gate,
    Generation,
    Never,
    Steering,
    calibrate,
    chunk_beam_search,
)
from sia.cost import Architecture, Cost, Meter
from sia.scorers.base import Scorer
from sia.signals import Attention


@lru_cache(maxsize=4)
def subject_of(profile: Profile, index: int) -> Subject:
    """Return what is measured: a replicate of the lab, or the models of a Hub profile."""
    return subject_class(profile).open(profile, index)


_kept: OrderedDict[tuple, object] = (
    OrderedDict()
)  # models and scorers at hand, those used last at the end


def kept(subject: Subject, load: Callable, *which: str):
    """load(*which), kept for the next time; a subject says how many of its models fit."""
    key = (subject, load.__name__, which)
    if key not in _kept:
        while len(_kept) >= subject.models_kept:
            _kept.popitem(last=False)
        _kept[key] = load(*which)
    _kept.move_to_end(key)
    return _kept[key]


def language_model(subject: Subject, kind: str, family: str) -> PreTrainedModel:
    return kept(subject, subject.language_model, kind, family)


def reward_model(subject: Subject, kind: str) -> PreTrainedModel:
    return kept(subject, subject.reward_model, kind)


def scorer_of(subject: Subject, kind: str, family: str) -> Scorer:
    def load(kind: str, family: str) -> Scorer:
        return subject.scorer(
            kind, family, partial(language_model, subject), partial(reward_model, subject)
        )

    return kept(subject, load, kind, family)


def gate_of(cell: Cell, objective: str) -> Gate:
    if cell.gate in CALIBRATED:
        threshold = (
            cell.thresholds[OBJECTIVES.index(objective)]
            if cell.threshold is None
            else cell.threshold
        )
        return GATES[cell.gate].from_setting(threshold)
    return GATES[cell.gate].from_setting(cell.target_ratio)


def steering_of(cell: Cell, objective: str, subject: Subject) -> Steering:
    candidates = subject.profile.decoding.candidates
    if cell.gate == "never":
        return Steering(
            None, Never(), candidates=candidates
        )  # responds unsteered, with as many candidates
    scorer, beta = scorer_of(subject, cell.value_model, cell.family), cell.beta
    if cell.value_model in (ARGS, ROLLOUT):
        beta *= subject.reward_strength
    return Steering(scorer, gate_of(cell, objective), beta, candidates, cell.floor)


def asked(subject: Subject, shard: Shard) -> tuple[list, list[int], list[int]]:
    """The prompts of a shard, each as often as it is sampled, their numbers within the objective, and the seeds of the samples."""
    cell, evaluation = shard.cell, subject.profile.evaluation
    samples = evaluation.validation_samples if cell.split == "validation" else evaluation.samples
    prompts = subject.prompts_of(cell.split, shard.objective)[: cell.prompts or None]
    numbers = list(shard.prompts or range(len(prompts)))
    return (
        [prompts[i] for i in numbers] * samples,
        numbers * samples,
        [seed for seed in range(samples) for _ in numbers],
    )


def measure(subject: Subject, shard: Shard) -> pd.DataFrame:
    """One row per prompt and sample (and per N of best-of-N). Of validation prompts only what settles thresholds and strengths: the
    profile's score, tokens and steered tokens, and in `attrs` the thresholds that these generations calibrate to.

    A response that ran out of length is scored as it stands and, for reward models, ended.
    """
    cell, profile = shard.cell, subject.profile
    prompts, numbers, seeds = asked(subject, shard)
    tries, best_of = respond(subject, shard, prompts, seeds), 1
    frames = []
    while best_of <= len(tries):
        chosen = choose_best(subject, tries[:best_of], prompts) if best_of > 1 else tries[0]
        frame = pd.DataFrame(
            {
                "objective": shard.objective,
                "prompt": np.int16(numbers),
                "seed": np.int8(seeds),
                "best_of": np.int8(best_of),
            }
        )
        if cell.split == "validation":
            score = subject.score(prompts, chosen, partial(reward_model, subject))
            frames.append(frame.assign(**{profile.score: score}, **lengths(chosen)))
        else:
            frames.append(
                frame.assign(
                    **metrics(subject, cell, prompts, numbers, seeds, chosen, tries[:best_of])
                )
            )
        best_of *= 2
    rows = pd.concat(frames, ignore_index=True)
    if cell.split == "validation" and (cell.gate == "never" or cell.calibrated):
        gates = CALIBRATED if cell.gate == "never" else [cell.gate]
        targets = profile.sweep.ratios if cell.gate == "never" else [cell.target_ratio]
        rows.attrs["thresholds"] = {
            gate: {str(target): threshold(gate, tries[0], target) for target in targets}
            for gate in gates
        }
    workers.report(cell.work * len(prompts) / workers.RESPONSES_PER_SECOND)
    return rows


def respond(
    subject: Subject, shard: Shard, prompts: list, seeds: list[int]
) -> list[list[Generation]]:
    """The responses from which the best is chosen: one, or as many as best-of-N tries; beam search has chosen already."""
    cell, sweep, decoding = shard.cell, subject.profile.sweep, subject.profile.decoding
    model, steering = (
        language_model(subject, cell.model, cell.family),
        steering_of(cell, shard.objective, subject),
    )
    ids = subject.encode(prompts, cell.model)
    value_ids = subject.encode(prompts, cell.value_model) if cell.gate != "never" else ids
    if cell.search == "beams":
        generations: list[Generation] = []
        reward_ids = subject.encode(prompts, REWARD)
        for seed in dict.fromkeys(seeds):
            these = [i for i, s in enumerate(seeds) if s == seed]
            generations += chunk_beam_search(
                model, subject.tokenizer, [ids[i] for i in these], scorer_of(subject, ARGS, cell.family), sweep.beam_width,
                cell.responses // sweep.beam_width, sweep.chunk, steering, decoding.max_new_tokens, decoding.temperature, seed,
                subject.batch_size, reward_prompts=[reward_ids[i] for i in these], progress=False,
            )  # fmt: skip
        return [generations]
    # the first of several responses meets the same noise as a single one
    observe = [Attention()] if cell.split == "validation" and cell.gate == "never" else []
    samples = subject.profile.evaluation.samples
    return [
        subject.respond(model, ids, [s + k * samples for s in seeds], steering, observe, value_ids)
        for k in range(cell.responses)
    ]


def metrics(
    subject: Subject,
    cell: Cell,
    prompts: list,
    numbers: list[int],
    seeds: list[int],
    chosen: list[Generation],
    tries: list,
) -> dict:
    """The columns of the rows: what was said is worth (`scores` of the subject), how far it is from the base, and what it took.

    kl: of steered steps, over the candidates; of a model that is not the base, the log-likelihood ratio of the prompt's first response.
    surprise: −ln π of that response under the base, nats.
    distinct: share of bigrams that are not said before in the samples of the same prompt. Cost columns count all that was tried and, in
    best-of-N, the reward model's reading of it; forwards: passes of the language model.
    """
    first = [i for i, seed in enumerate(seeds) if seed == 0]  # the first sample of each prompt
    place = {numbers[i]: j for j, i in enumerate(first)}
    of_prompt = [place[number] for number in numbers]
    base_kind = cell.model if cell.model.startswith("base") else "base"
    said = [chosen[i].token_ids.tolist() for i in first]
    base = language_model(subject, base_kind, cell.family)
    likelihoods = likelihoods_of(
        base, subject.encode([prompts[i] for i in first], base_kind), said
    )[of_prompt]
    drift = np.float32([r.kl.sum() for r in chosen])
    if base_kind != cell.model:
        model = language_model(subject, cell.model, cell.family)
        drift = np.float32(
            likelihoods_of(model, subject.encode([prompts[i] for i in first], cell.model), said)[
                of_prompt
            ]
            - likelihoods
        )
    costs = [
        reduce(add, many)
        for many in zip(*(shared_costs(subject, cell, prompts, tries)), strict=True)
    ]
    return {
        **subject.scores(prompts, chosen, first, of_prompt, partial(reward_model, subject)),
        "kl": drift.round(2),
        "surprise": np.float32(-likelihoods).round(1),
        "distinct": np.float32(distinct_bigrams(numbers, [r.token_ids for r in chosen])).round(3),
        **lengths(chosen),
        "shifted": np.int16([r.shifted.sum() for r in chosen]),
        "finished": [r.finished for r in chosen],
        "forwards": np.int16([cost.model_forwards for cost in costs]),
        "value_forwards": np.int16([cost.value_forwards for cost in costs]),
        "junctions": np.int16([cost.junctions for cost in costs]),
        "model_tokens": np.int32([cost.model_tokens for cost in costs]),
        "value_tokens": np.int32([cost.value_tokens for cost in costs]),
        "megaflops": np.float32(
            [(cost.model_flops + cost.value_flops) / 1e6 for cost in costs]
        ).round(0),
    }


def lengths(responses: Sequence[Generation]) -> dict[str, np.ndarray]:
    """How many tokens they have, and how many of them were steered."""
    return {
        "tokens": np.int16([len(r.token_ids) for r in responses]),
        "steered": np.int16([r.steered.sum() for r in responses]),
    }


def likelihoods_of(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]
) -> np.ndarray:
    """ln π of each response, `(responses,)`."""
    whole = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    return sequence_log_likelihoods(model, whole, [len(prompt) for prompt in prompts])


def shared_costs(
    subject: Subject, cell: Cell, prompts: list, tries: list[list[Generation]]
) -> Iterator[list[Cost]]:
    """What each try took, as if all tries of a prompt shared its prefill in every model, as `sia.best_of_n` lets them; of several
    tries, with the reward model's reading."""
    if len(tries) == 1:
        yield [response.cost for response in tries[0]]
        return
    model, reward = language_model(subject, cell.model, cell.family), reward_model(subject, REWARD)
    models = {
        "model": (model.base_model, model.get_output_embeddings().weight),
        "reward": (reward.base_model, reward.score.weight),
    }
    if cell.gate != "never":
        scorer = scorer_of(subject, cell.value_model, cell.family)
        models["value"] = (scorer.backbone, scorer.head.weight)
    # the value and reward models share a prompt but for its last token, which each response computes
    kinds = {"model": cell.model, "reward": REWARD, "value": cell.value_model}
    ids = {name: subject.encode(prompts, kinds[name]) for name in models}
    shared = {
        name: many if name == "model" else [p[:-1] for p in many] for name, many in ids.items()
    }
    begin = {
        name: reading(*parts, shared[name], read=name == "model") for name, parts in models.items()
    }
    begun = np.zeros(len(prompts), dtype=bool)  # prompts that the value model has read
    for number, responses in enumerate(tries):
        read = reading(*models["reward"], subject.conversations(prompts, responses, REWARD))
        costs = []
        for i, response in enumerate(responses):
            cost = response.cost + Cost(
                value_forwards=1, value_tokens=read[i][0], value_flops=read[i][1]
            )
            again = {
                "model": number > 0,
                "reward": number > 0,
                "value": cost.junctions > 0 and begun[i],
            }
            for name in (name for name in models if again[name]):
                tokens, flops = begin[name][i]
                saved = {"model_forwards": -1, "model_tokens": -tokens, "model_flops": -flops}
                cost += (
                    Cost(**saved)
                    if name == "model"
                    else Cost(value_tokens=-tokens, value_flops=-flops)
                )
            begun[i] |= cost.junctions > 0
            costs.append(cost)
        yield costs


def reading(
    backbone: PreTrainedModel, head: torch.Tensor, sequences: list[list[int]], read: bool = True
) -> list[tuple[int, float]]:
    """Token positions and FLOPs of computing each of these once. read: also of the output at its end."""
    meter = Meter(Architecture.of(backbone, head), len(sequences), "cpu")
    rows, lengths = (
        torch.arange(len(sequences)),
        torch.tensor([len(sequence) for sequence in sequences]),
    )
    meter.count(
        rows,
        torch.ones_like(rows),
        torch.zeros_like(rows),
        lengths,
        torch.full_like(rows, int(read)),
    )
    _, tokens, flops = meter.totals()
    return list(zip(tokens.tolist(), flops.tolist(), strict=True))


def distinct_bigrams(numbers: Sequence[int], responses: Sequence[np.ndarray]) -> list[float]:
    """Of the bigrams of all samples of the same prompt, the share that are different ones; a value for each response."""
    said: dict[int, list[tuple[int, int]]] = {}
    for number, tokens in zip(numbers, responses, strict=True):
        said.setdefault(number, []).extend(
            zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
        )
    return [len(set(said[number])) / max(1, len(said[number])) for number in numbers]


def threshold(gate: str, generations: list[Generation], ratio: float) -> float:
    """That opens this gate on about this share of the tokens of `generations`; of a position gate its number of tokens."""
    return calibrate(GATES[gate], generations, ratio).setting_value


def choose_best(subject: Subject, tries: list[list[Generation]], prompts: list) -> list[Generation]:
    """For each prompt the response that the reward model likes best; the earliest on ties."""
    model = reward_model(subject, REWARD)
    rewards = [
        trajectory_rewards(model, subject.conversations(prompts, responses, REWARD))
        for responses in tries
    ]
    return [tries[best][i] for i, best in enumerate(np.argmax(rewards, axis=0))]
