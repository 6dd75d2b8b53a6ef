"""Measuring one shard in a worker process: generate, judge, score, and count. Runs on torch; everything else here does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, reduce
from operator import add

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from benchmarks import parallel
from benchmarks.cells import ARGS, AUTOREGRESSIVE, CALIBRATED, OBJECTIVES, ROLLOUT, Cell, Shard
from benchmarks.lab.judge import FLUENCY, cut, judge
from benchmarks.lab.replicate import EVALUATION_REWARD, REWARD, Replicate, ended
from benchmarks.lab.tokenizer import encode_prompts
from benchmarks.lab.training import sequence_log_likelihoods, trajectory_rewards
from benchmarks.profile import Profile
from sia import (
    AttentionGate,
    AttentionRiseGate,
    AutoregressiveScorer,
    EntropyGate,
    EntropyRiseGate,
    EveryToken,
    Gate,
    Generation,
    Never,
    PositionGate,
    RandomGate,
    RewardScorer,
    RolloutScorer,
    Steering,
    calibrate,
    chunk_beam_search,
)
from sia.attention import Attention
from sia.cost import Architecture, Cost, Meter
from sia.scoring import Scorer

THRESHOLD_GATES = {"entropy": EntropyGate, "entropy-rise": EntropyRiseGate, "attention": AttentionGate, "attention-rise": AttentionRiseGate}

replicate_of = lru_cache(maxsize=4)(Replicate)


@lru_cache(maxsize=24)
def language_model(replicate: Replicate, kind: str, family: str):
    return replicate.language_model(kind, family)


@lru_cache(maxsize=8)
def reward_model(replicate: Replicate, kind: str):
    return replicate.reward_model(kind)


@lru_cache(maxsize=24)
def scorer_of(replicate: Replicate, kind: str, family: str) -> Scorer:
    """What values candidates: a value model, or one of the other scorers."""
    if kind == AUTOREGRESSIVE:
        return AutoregressiveScorer(language_model(replicate, kind, family))
    if kind not in (ARGS, ROLLOUT):
        return replicate.value_model(kind, family)
    reward = RewardScorer(reward_model(replicate, REWARD))
    if kind == ARGS:
        return reward
    sweep, candidates = replicate.profile.sweep, replicate.profile.decoding.candidates
    return RolloutScorer(language_model(replicate, "base", family), reward, sweep.rollout_tokens, candidates=candidates)


def gate_of(cell: Cell, objective: str) -> Gate:
    if cell.gate in CALIBRATED:
        threshold = cell.thresholds[OBJECTIVES.index(objective)] if cell.threshold is None else cell.threshold
        if cell.gate == "position":
            return PositionGate(int(threshold))
        return ~EntropyGate(threshold) if cell.gate == "inverted-entropy" else THRESHOLD_GATES[cell.gate](threshold)
    return {"never": Never, "every": EveryToken, "random": lambda: RandomGate(cell.target_ratio)}[cell.gate]()


def steering_of(cell: Cell, objective: str, replicate: Replicate) -> Steering:
    candidates = replicate.profile.decoding.candidates
    if cell.gate == "never":
        return Steering(None, Never(), candidates=candidates)  # responds unsteered, with as many candidates
    scorer, beta = scorer_of(replicate, cell.value_model, cell.family), cell.beta
    if cell.value_model in (ARGS, ROLLOUT):  # rewards on the scale that values are distilled from
        beta *= replicate.profile.training.reward_scale / replicate.scale(REWARD)["sd"]
    return Steering(scorer, gate_of(cell, objective), beta, candidates, cell.floor)


def asked(replicate: Replicate, shard: Shard) -> tuple[list, list[int], list[int]]:
    """The prompts of a shard, each as often as it is sampled, their numbers within the objective, and the seeds of the samples."""
    cell, evaluation = shard.cell, replicate.profile.evaluation
    prompts = [p for p in replicate.prompts[cell.split] if p.item.objective == shard.objective]
    samples = evaluation.validation_samples if cell.split == "validation" else evaluation.samples
    prompts = prompts[: cell.prompts or None]
    return prompts * samples, list(range(len(prompts))) * samples, [seed for seed in range(samples) for _ in prompts]


def measure(profile: Profile, shard: Shard) -> pd.DataFrame:
    """One row per prompt and sample (and per N of best-of-N); `attrs` holds the thresholds that these generations calibrate to.

    A response that ran out of length is judged as it stands and, for the reward models, ended.
    """
    cell, replicate = shard.cell, replicate_of(profile, shard.cell.replicate)
    prompts, numbers, seeds = asked(replicate, shard)
    ids = encode_prompts(replicate.tokenizer, prompts)
    tries, best_of = respond(replicate, shard, ids, seeds), 1
    frames = []
    while best_of <= len(tries):
        kept = choose_best(tries[:best_of], ids, reward_model(replicate, REWARD)) if best_of > 1 else tries[0]
        frame = pd.DataFrame(
            {"objective": shard.objective, "prompt": np.int16(numbers), "seed": np.int8(seeds), "best_of": np.int8(best_of)}
        )
        frames.append(frame.assign(**metrics(replicate, cell, prompts, ids, numbers, kept, tries[:best_of])))
        best_of *= 2
    rows = pd.concat(frames, ignore_index=True)
    if cell.split == "validation" and (cell.gate == "never" or cell.calibrated):
        gates = CALIBRATED if cell.gate == "never" else [cell.gate]
        targets = profile.sweep.ratios if cell.gate == "never" else [cell.target_ratio]
        rows.attrs["thresholds"] = {gate: {str(target): threshold(gate, tries[0], target) for target in targets} for gate in gates}
    parallel.report(cell.work * len(prompts) / parallel.RESPONSES_PER_SECOND)
    return rows


def respond(replicate: Replicate, shard: Shard, ids: list[list[int]], seeds: list[int]) -> list[list[Generation]]:
    """The responses from which the best is chosen: one, or as many as best-of-N tries; beam search has chosen already."""
    cell, sweep, decoding = shard.cell, replicate.profile.sweep, replicate.profile.decoding
    model, steering = language_model(replicate, cell.model, cell.family), steering_of(cell, shard.objective, replicate)
    if cell.search == "beams":
        generations: list[Generation] = []
        for seed in dict.fromkeys(seeds):
            generations += chunk_beam_search(
                model, replicate.tokenizer, [p for p, s in zip(ids, seeds, strict=True) if s == seed],
                RewardScorer(reward_model(replicate, REWARD)), sweep.beam_width, cell.responses // sweep.beam_width, sweep.chunk,
                steering, decoding.max_new_tokens, decoding.temperature, seed, decoding.batch_size, progress=False,
            )  # fmt: skip
        return [generations]
    # the first of several responses meets the same noise as a single one
    observe = [Attention()] if cell.split == "validation" and cell.gate == "never" else []
    samples = replicate.profile.evaluation.samples
    return [replicate.respond(model, ids, [s + k * samples for s in seeds], steering, observe) for k in range(cell.responses)]


def metrics(
    replicate: Replicate, cell: Cell, prompts: list, ids: list, numbers: list[int], kept: list[Generation], tries: list[list[Generation]]
) -> dict:
    """The columns of the rows: what was said is worth, how far it is from the base, and what it took.

    content: the judge's score but for fluency. kl: of steered steps, over the candidates; of a model that is not the base, the
    log-likelihood ratio of the prompt's first response. surprise: −ln π of that response under the base, nats. training_reward: what the
    reward model that values learn from gives it; reward: the evaluation reward model, every response.
    distinct: share of bigrams that are not said before in the samples of the same prompt. Cost columns count all that was tried and, in
    best-of-N, the reward model's reading of it; forwards: passes of the language model.
    """
    verdicts = [judge(replicate.world.grammar, p.item, r.text, r.finished) for p, r in zip(prompts, kept, strict=True)]
    whole = [[*p, *ended(r)] for p, r in zip(ids, kept, strict=True)]
    base = language_model(replicate, cell.model if cell.model.startswith("base") else "base", cell.family)
    first = range(max(numbers) + 1)  # the first sample of each prompt
    said = [[*ids[i], *kept[i].token_ids] for i in first]
    starts = [len(ids[i]) for i in first]
    likelihoods = sequence_log_likelihoods(base, said, starts)[numbers]
    drift = np.float32([r.kl.sum() for r in kept])
    if not cell.model.startswith("base"):
        own = sequence_log_likelihoods(language_model(replicate, cell.model, cell.family), said, starts)[numbers]
        drift = np.float32(own - likelihoods)
    trained_on = replicate.rewards(REWARD, reward_model(replicate, REWARD), [whole[i] for i in first])[numbers]
    costs = [reduce(add, many) for many in zip(*(shared_costs(replicate, cell, ids, tries)), strict=True)]
    return {
        "judge": np.float32([verdict.score for verdict in verdicts]),
        "content": np.float32([cut(sum(p for reason, p in v.points.items() if reason not in FLUENCY)) for v in verdicts]).round(2),
        "fluency_errors": [verdict.fluency_errors for verdict in verdicts],
        "reward": np.float32(replicate.rewards(EVALUATION_REWARD, reward_model(replicate, EVALUATION_REWARD), whole)).round(2),
        "training_reward": np.float32(trained_on).round(2),
        "kl": drift.round(2),
        "surprise": np.float32(-likelihoods).round(1),
        "distinct": np.float32(distinct_bigrams(numbers, [r.token_ids for r in kept])).round(3),
        "tokens": np.int16([len(r.token_ids) for r in kept]),
        "steered": np.int16([r.steered.sum() for r in kept]),
        "shifted": np.int16([r.shifted.sum() for r in kept]),
        "finished": [r.finished for r in kept],
        "forwards": np.int16([cost.model_forwards for cost in costs]),
        "value_forwards": np.int16([cost.value_forwards for cost in costs]),
        "junctions": np.int16([cost.junctions for cost in costs]),
        "model_tokens": np.int32([cost.model_tokens for cost in costs]),
        "value_tokens": np.int32([cost.value_tokens for cost in costs]),
        "megaflops": np.float32([(cost.model_flops + cost.value_flops) / 1e6 for cost in costs]).round(0),
    }


def shared_costs(replicate: Replicate, cell: Cell, ids: list[list[int]], tries: list[list[Generation]]) -> Iterator[list[Cost]]:
    """What each try took, as if all tries of a prompt shared its prefill in every model, as `sia.best_of_n` lets them; of several
    tries, with the reward model's reading."""
    if len(tries) == 1:
        yield [response.cost for response in tries[0]]
        return
    model, reward = language_model(replicate, cell.model, cell.family), reward_model(replicate, REWARD)
    models = {"model": (model.base_model, model.get_output_embeddings().weight), "reward": (reward.base_model, reward.score.weight)}
    if cell.gate != "never":
        scorer = scorer_of(replicate, cell.value_model, cell.family)
        models["value"] = (scorer.backbone, scorer.head.weight)
    # the value and reward models share a prompt but for its last token, which each response computes
    shared = {"model": ids, "reward": [p[:-1] for p in ids], "value": [p[:-1] for p in ids]}
    prompts = {name: reading(*parts, shared[name], read=name == "model") for name, parts in models.items()}
    begun = np.zeros(len(ids), dtype=bool)  # prompts that the value model has read
    for number, responses in enumerate(tries):
        read = reading(*models["reward"], [[*p, *ended(r)] for p, r in zip(ids, responses, strict=True)])
        costs = []
        for i, response in enumerate(responses):
            cost = response.cost + Cost(value_forwards=1, value_tokens=read[i][0], value_flops=read[i][1])
            again = {"model": number > 0, "reward": number > 0, "value": cost.junctions > 0 and begun[i]}
            for name in (name for name in models if again[name]):
                tokens, flops = prompts[name][i]
                saved = {"model_forwards": -1, "model_tokens": -tokens, "model_flops": -flops}
                cost += Cost(**saved) if name == "model" else Cost(value_tokens=-tokens, value_flops=-flops)
            begun[i] |= cost.junctions > 0
            costs.append(cost)
        yield costs


def reading(backbone: PreTrainedModel, head: torch.Tensor, sequences: list[list[int]], read: bool = True) -> list[tuple[int, float]]:
    """Token positions and FLOPs of computing each of these once. read: also of the output at its end."""
    meter = Meter(Architecture.of(backbone, head), len(sequences), "cpu")
    rows, lengths = torch.arange(len(sequences)), torch.tensor([len(sequence) for sequence in sequences])
    meter.count(rows, torch.ones_like(rows), torch.zeros_like(rows), lengths, torch.full_like(rows, int(read)))
    _, tokens, flops = meter.totals()
    return list(zip(tokens.tolist(), flops.tolist(), strict=True))


def distinct_bigrams(numbers: Sequence[int], responses: Sequence[np.ndarray]) -> list[float]:
    """Of the bigrams of all samples of the same prompt, the share that are different ones; a value for each response."""
    said: dict[int, list[tuple[int, int]]] = {}
    for number, tokens in zip(numbers, responses, strict=True):
        said.setdefault(number, []).extend(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    return [len(set(said[number])) / max(1, len(said[number])) for number in numbers]


def threshold(gate: str, generations: list[Generation], ratio: float) -> float:
    """That opens this gate on about this share of the tokens of `generations`; of a position gate its number of tokens."""
    if gate == "position":
        lengths = np.array([len(g.token_ids) for g in generations])
        shares = np.array([np.minimum(tokens, lengths).sum() for tokens in range(lengths.max() + 1)]) / lengths.sum()
        return float(np.abs(shares - ratio).argmin())
    if gate == "inverted-entropy":
        return calibrate(EntropyGate, generations, 1 - ratio).threshold
    return calibrate(THRESHOLD_GATES[gate], generations, ratio).threshold


def choose_best(tries: list[list[Generation]], prompts: list[list[int]], model) -> list[Generation]:
    """For each prompt the response that the reward model likes best; the earliest on ties."""
    rewards = [trajectory_rewards(model, [[*p, *ended(r)] for p, r in zip(prompts, responses, strict=True)]) for responses in tries]
    return [tries[best][i] for i, best in enumerate(np.argmax(rewards, axis=0))]
