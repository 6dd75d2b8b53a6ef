"""Measuring one shard: respond, score, count. Subjects are of the lab or of the Hub."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from benchmarks.engine.costs import total_costs
from benchmarks.engine.gates import (
    calibrated_gates,
    calibrated_setting,
    gate_of,
    is_calibrated,
    predictor_of,
)
from benchmarks.engine.loading import language_model, reward_model, scorer_of
from benchmarks.runtime import workers
from benchmarks.spec.cells import DIVERGENCE_GATES, Cell, Shard
from benchmarks.spec.methods import ARGS, REWARD, method_of_scorer
from benchmarks.spec.model_kinds import BASE
from benchmarks.subjects.base import Subject
from benchmarks.subjects.scoring import (
    require_finite,
    sequence_log_likelihoods,
    trajectory_rewards,
)
from sia import Generation, Steering, chunk_beam_search
from sia.signals import Attention, Divergence, PredictedDivergence, Signal

VIEW_PROMPTS = 4  # of each objective, whose first responses are kept for views
KEPT = {  # of such a response, beside `finished`
    "token_ids": np.int64,
    "entropy": np.float32,
    "steered": np.bool_,
    "base_token": np.int64,
    "kl": np.float32,
}


def steering_of(cell: Cell, objective: str, subject: Subject) -> Steering | None:
    """Return the steering of a cell for an objective, None for plain decoding."""
    if cell.scorer is None:
        return None
    beta, method = cell.beta, method_of_scorer(cell.scorer)
    if method is not None and method.raw_rewards:
        beta *= subject.reward_strength
    scorer = scorer_of(subject, cell.scorer, cell.family)
    return Steering(
        scorer,
        gate_of(subject, cell, objective),
        beta,
        candidates=subject.profile.decoding.candidates,
    )


def expand_prompts(subject: Subject, shard: Shard) -> tuple[list, list[int], list[int]]:
    """Return the prompts of a shard, each repeated for its samples.

    Returns:
        Prompts; their indices within the objective; seeds of the samples.
    """
    cell, evaluation = shard.cell, subject.profile.evaluation
    samples = evaluation.validation_samples if cell.split == "validation" else evaluation.samples
    prompts = subject.prompts_of(cell.split, shard.objective)[: cell.prompts or None]
    indices = list(shard.prompts or range(len(prompts)))
    seeds = [seed for seed in range(samples) for _ in indices]
    return [prompts[i] for i in indices] * samples, indices * samples, seeds


def measure_shard(subject: Subject, shard: Shard) -> pd.DataFrame:
    """Return one row per prompt and sample, and per N of best-of-N.

    Of validation prompts only what calibration needs: the profile's score, tokens and steered
    tokens, and in `attrs` the thresholds that these responses give. Of test prompts `attrs` have
    the first response to each of the first VIEW_PROMPTS, by the prompt's index. A response that
    ran out of length is scored as it stands and, for reward models, ended.
    """
    cell = shard.cell
    prompts, indices, seeds = expand_prompts(subject, shard)
    samples = respond(subject, shard, prompts, seeds, observed_signals(subject, cell))
    frames, best_of = [], 1
    while best_of <= len(samples):
        among = samples[:best_of]
        chosen = choose_best(subject, among, prompts) if best_of > 1 else samples[0]
        places = {"prompt": np.int16(indices), "seed": np.int8(seeds), "best_of": np.int8(best_of)}
        frame = pd.DataFrame({"objective": shard.objective} | places)
        if cell.split == "validation":
            score = subject.score(prompts, chosen, partial(reward_model, subject))
            columns = {subject.profile.score: score, **lengths(chosen)}
        else:
            columns = metrics(subject, cell, prompts, indices, seeds, chosen, among)
        frames.append(frame.assign(**columns))
        best_of *= 2
    rows = pd.concat(frames, ignore_index=True)
    if cell.split == "validation":
        rows.attrs["thresholds"] = calibrated_settings(subject, cell, samples[0])
    else:
        rows.attrs["responses"] = {
            str(index): response_record(response)
            for index, seed, response in zip(indices, seeds, samples[0], strict=True)
            if seed == 0 and index < VIEW_PROMPTS
        }
    workers.report(cell.work * len(prompts) / workers.RESPONSES_PER_SECOND)
    return rows


def response_record(response: Generation) -> dict:
    """Return what views show of a response, as JSON types."""
    record = {name: getattr(response, name).tolist() for name in KEPT}
    return record | {"finished": bool(response.finished)}


def recorded_response(record: Mapping) -> Generation:
    """Return a response from its `response_record`."""
    arrays = {name: np.asarray(record[name], dtype) for name, dtype in KEPT.items()}
    return Generation(text=None, **arrays, finished=record["finished"])


def calibrated_settings(
    subject: Subject, cell: Cell, responses: list[Generation]
) -> dict[str, dict[str, float]]:
    """Return settings by gate and target ratio: the cell's own, or of unsteered ones all."""
    gates = DIVERGENCE_GATES if cell.scorer else calibrated_gates()
    targets = subject.profile.sweep.ratios
    if cell.gate != "never":
        gates, targets = [cell.gate] * is_calibrated(cell.gate), (cell.target_ratio,)
    predictor = predictor_of(subject, cell)
    return {
        gate: {
            str(target): calibrated_setting(gate, responses, target, predictor)
            for target in targets
        }
        for gate in gates
    }


def observed_signals(subject: Subject, cell: Cell) -> list[Signal]:
    """Return the signals that responses keep: of unsteered validation prompts, those of gates."""
    if cell.split != "validation" or cell.gate != "never":
        return []
    predictor = predictor_of(subject, cell)
    return [Attention()] if predictor is None else [Divergence(), PredictedDivergence(predictor)]


def respond(
    subject: Subject,
    shard: Shard,
    prompts: list,
    seeds: list[int],
    observe: Sequence[Signal] = (),
) -> list[list[Generation]]:
    """Return samples of each prompt: `cell.responses` of best-of-N, else one.

    Args:
        subject: Models and prompts.
        shard: The cell.
        prompts: Prompts, each repeated for its samples.
        seeds: Seeds of the samples.
        observe: Signals that the responses keep, unless they are searched by beams.
    """
    cell, sweep, decoding = shard.cell, subject.profile.sweep, subject.profile.decoding
    model = language_model(subject, cell.model, cell.family)
    steering = steering_of(cell, shard.objective, subject)
    ids = subject.encode(prompts, str(cell.model))
    value_ids = subject.encode(prompts, str(cell.scorer)) if cell.scorer else ids
    if cell.search == "beams":
        reward = scorer_of(subject, ARGS, cell.family)
        reward_ids = subject.encode(prompts, REWARD)
        responses: list[Generation] = []
        for seed in dict.fromkeys(seeds):
            rows = [i for i, row_seed in enumerate(seeds) if row_seed == seed]
            responses += chunk_beam_search(
                model,
                subject.tokenizer,
                [ids[i] for i in rows],
                reward,
                width=sweep.beam_width,
                expansions=cell.responses // sweep.beam_width,
                chunk=sweep.chunk,
                steering=steering,
                candidates=None if steering else decoding.candidates,
                max_new_tokens=decoding.max_new_tokens,
                temperature=decoding.temperature,
                seed=seed,
                batch_size=subject.batch_size,
                reward_prompts=[reward_ids[i] for i in rows],
                progress=False,
            )
        return [responses]
    # the first of several responses meets the same noise as a single one
    stride = subject.profile.evaluation.samples
    return [
        subject.respond(model, ids, [s + k * stride for s in seeds], steering, observe, value_ids)
        for k in range(cell.responses)
    ]


def choose_best(
    subject: Subject, samples: list[list[Generation]], prompts: list
) -> list[Generation]:
    """Return for each prompt the response with the highest reward; the earliest on ties."""
    model = reward_model(subject, REWARD)
    conversations = [subject.conversations(prompts, responses, REWARD) for responses in samples]
    rewards = [trajectory_rewards(model, each) for each in conversations]
    for of_sample, responses in zip(rewards, samples, strict=True):
        require_finite(of_sample, (repr(response.text) for response in responses))
    return [samples[best][i] for i, best in enumerate(np.argmax(rewards, axis=0))]


def metrics(
    subject: Subject,
    cell: Cell,
    prompts: list,
    indices: list[int],
    seeds: list[int],
    chosen: list[Generation],
    samples: list[list[Generation]],
) -> dict:
    """Return columns for the quality of responses, their drift from the base, and their cost.

    - kl: of steered steps, over the candidates; of a model other than the base, the
      log-likelihood ratio of the prompt's first response (nats).
    - surprise: −ln π of that response under the base (nats).
    - distinct: share of bigrams that are new among the samples of the same prompt.
    - Costs cover all samples and, in best-of-N, their reading by the reward model; forwards:
      passes of the language model.
    """
    first = [i for i, seed in enumerate(seeds) if seed == 0]  # the first sample of each prompt
    place = {indices[i]: j for j, i in enumerate(first)}
    of_prompt = [place[index] for index in indices]
    first_prompts = [prompts[i] for i in first]
    first_ids = [chosen[i].token_ids.tolist() for i in first]

    def log_likelihoods(kind) -> np.ndarray:
        ids = subject.encode(first_prompts, str(kind))
        whole = [[*prompt, *response] for prompt, response in zip(ids, first_ids, strict=True)]
        model = language_model(subject, kind, cell.family)
        return sequence_log_likelihoods(model, whole, [len(prompt) for prompt in ids])

    base_kind = cell.model if cell.model.name == "base" else BASE
    base_logprob = log_likelihoods(base_kind)[of_prompt]
    drift = np.float32([r.kl.sum() for r in chosen])
    if base_kind != cell.model:
        drift = np.float32(log_likelihoods(cell.model)[of_prompt] - base_logprob)
    distinct = distinct_bigrams(indices, [r.token_ids for r in chosen])
    costs = total_costs(subject, cell, prompts, samples)
    flops = np.float32([(cost.model_flops + cost.value_flops) / 1e6 for cost in costs])
    return {
        **subject.scores(prompts, chosen, first, of_prompt, partial(reward_model, subject)),
        "kl": drift.round(2),
        "surprise": np.float32(-base_logprob).round(1),
        "distinct": np.float32(distinct).round(3),
        **lengths(chosen),
        "shifted": np.int16([r.shifted.sum() for r in chosen]),
        "finished": [r.finished for r in chosen],
        "forwards": counts([cost.model_forwards for cost in costs]),
        "value_forwards": counts([cost.value_forwards for cost in costs]),
        "junctions": counts([cost.junctions for cost in costs]),
        "model_tokens": np.int32([cost.model_tokens for cost in costs]),
        "value_tokens": np.int32([cost.value_tokens for cost in costs]),
        "megaflops": flops.round(0),
    }


def lengths(responses: Sequence[Generation]) -> dict[str, np.ndarray]:
    """Return the number of tokens of each response, and of steered ones."""
    return {
        "tokens": np.int16([len(r.token_ids) for r in responses]),
        "steered": np.int16([r.steered.sum() for r in responses]),
    }


def counts(numbers: Sequence[int]) -> np.ndarray:
    """Return numbers in two bytes each or, where they do not fit (searches), in four."""
    return np.array(numbers, dtype=np.int16 if max(numbers) < 2**15 else np.int32)


def distinct_bigrams(indices: Sequence[int], responses: Sequence[np.ndarray]) -> list[float]:
    """Return for each response the share of distinct bigrams in all samples of its prompt."""
    bigrams: dict[int, list[tuple[int, int]]] = {}
    for index, tokens in zip(indices, responses, strict=True):
        pairs = zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
        bigrams.setdefault(index, []).extend(pairs)
    shares = {index: len(set(all_)) / max(1, len(all_)) for index, all_ in bigrams.items()}
    return [shares[index] for index in indices]
