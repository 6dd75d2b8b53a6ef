"""Looking into cells: what happens token by token (traces), what candidates are really worth (probes), and what there was to choose from
(views)."""

from __future__ import annotations

import math
import random

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.engine.measure import (
    asked,
    language_model,
    respond,
    reward_model,
    scorer_of,
    steering_of,
)
from benchmarks.runtime import workers
from benchmarks.spec.cells import Shard
from benchmarks.subjects.base import Subject
from benchmarks.subjects.lab.replicate import LOSSES, REWARD, Replicate, ended
from sia import Generation
from sia._inputs import pad_right
from sia.scorers.base import Scorer
from sia.steering import drop_improbable, kl_divergence, tilt


def trace(subject: Subject, shard: Shard) -> pd.DataFrame:
    """One row per response token: what it is, how sure the base was, and what happened.

    Of the lab also divergence_LOSS: KL(π‖π*) in nats at this state over the candidates, π* by the value model of this loss and β = 1,
    whether steered or not; range_LOSS: largest minus smallest of these values. Of the first sample only, NaN elsewhere.
    """
    profile = subject.profile
    prompts, numbers, seeds = asked(subject, shard)
    generations = respond(subject, shard, prompts, seeds)[0]
    lengths = [len(g.token_ids) for g in generations]
    frame = pd.DataFrame({
        "objective": shard.objective,
        "prompt": np.repeat(np.int16(numbers), lengths),
        "seed": np.repeat(np.int8(seeds), lengths),
        "step": np.concatenate([np.arange(n, dtype=np.int16) for n in lengths]),
        **{name: np.concatenate([getattr(g, name) for g in generations]) for name in ("token_ids", "base_token", "entropy", "steered")},
    })  # fmt: skip
    workers.report(2 * shard.cell.work * len(prompts) / workers.RESPONSES_PER_SECOND)
    if not subject.traced_losses:
        return frame
    first = [i for i, seed in enumerate(seeds) if seed == 0]
    ids, responses = (
        subject.encode([prompts[i] for i in first], shard.cell.model),
        [generations[i] for i in first],
    )
    model = language_model(subject, shard.cell.model, shard.cell.family)
    logits, candidates = candidate_logits(model, ids, responses, profile.decoding.candidates)
    for loss in subject.traced_losses:
        values = candidate_values(
            scorer_of(subject, f"value-{loss}", shard.cell.family), ids, responses, candidates
        )
        measured = {
            "divergence": [
                kl_divergence(base, tilt(base, value, 1.0))
                for base, value in zip(logits, values, strict=True)
            ],
            "range": [value.amax(1) - value.amin(1) for value in values],
        }
        for name, columns in measured.items():
            column = np.full(len(frame), np.nan, dtype=np.float32)
            column[frame["seed"] == 0] = torch.cat(columns).numpy()
            frame[f"{name}_{loss}"] = column
    return frame


def probe(replicate: Replicate, shard: Shard) -> pd.DataFrame:
    """One row per candidate of some states that this cell visits.

    likelihood: ln π over the K candidates. value_LOSS: what value models say. worth: mean reward of the response after so many rollouts of
    the base model from there, on the scale that values are distilled from; worth_error: its standard error.
    """
    profile, sweep = replicate.profile, replicate.profile.sweep
    family, model = (
        shard.cell.family,
        language_model(replicate, shard.cell.model, shard.cell.family),
    )
    prompts, numbers, seeds = asked(replicate, shard)
    rng = random.Random(f"probes {shard.objective}")
    count = max(numbers) + 1
    chosen = [rng.randrange(count) for _ in range(sweep.probes)]
    ids = replicate.encode(prompts[:count], shard.cell.model)
    generations = respond(replicate, shard, prompts[:count], seeds[:count])[0]
    logits, candidates = candidate_logits(model, ids, generations, profile.decoding.candidates)
    values = {
        loss: candidate_values(
            scorer_of(replicate, f"value-{loss}", family), ids, generations, candidates
        )
        for loss in LOSSES
    }
    frames, prefixes = [], []
    for state, i in enumerate(chosen):
        step = rng.randrange(len(generations[i].token_ids))
        base = logits[i][step].log_softmax(-1)
        frames.append(pd.DataFrame({
            "objective": shard.objective, "prompt": np.int16(i), "state": np.int16(state), "step": np.int16(step),
            "entropy": np.float32(-(base.exp() * base).sum()), "rank": np.arange(len(base), dtype=np.int8), "likelihood": base.numpy(),
            **{f"value_{loss}": values[loss][i][step].numpy() for loss in LOSSES},
        }))  # fmt: skip
        response = generations[i].token_ids[:step].tolist()
        prefixes += [[*ids[i], *response, token] for token in candidates[i][step].tolist()]
    frame = pd.concat(frames, ignore_index=True)
    rewards = np.stack(
        [_rollout_rewards(replicate, model, prefixes, seed) for seed in range(sweep.probe_rollouts)]
    )
    worth, spread = rewards.mean(0), rewards.std(0, ddof=1) / np.sqrt(len(rewards))
    workers.report(
        sweep.probes
        * profile.decoding.candidates
        * sweep.probe_rollouts
        / workers.RESPONSES_PER_SECOND
    )
    return frame.assign(worth=worth.astype(np.float32), worth_error=spread.astype(np.float32))


def view(subject: Subject, shard: Shard) -> pd.DataFrame:
    """One row per candidate of every token of the first sample: everything that a reader can be shown, the words included.

    likelihood: ln π of the base over the K candidates; value: what the cell's scorer says of it, asked or not (NaN where nothing steers);
    tilted: ln of the steered policy, as it is where the gate is open. chosen, unsteered: whether it is the token that was taken, and the
    one that the same noise would have taken unsteered.
    """
    cell, settings = shard.cell, steering_of(shard.cell, shard.objective, subject)
    prompts, numbers, seeds = asked(subject, shard)
    first = [i for i, seed in enumerate(seeds) if seed == 0]
    prompts, numbers = [prompts[i] for i in first], [numbers[i] for i in first]
    responses = respond(subject, shard, prompts, [0] * len(first))[0]
    ids = subject.encode(prompts, cell.model)
    logits, candidates = candidate_logits(
        language_model(subject, cell.model, cell.family),
        ids,
        responses,
        subject.profile.decoding.candidates,
    )
    values = [torch.full_like(base, math.nan) for base in logits]
    if settings.scorer is not None:
        values = candidate_values(
            settings.scorer, subject.encode(prompts, cell.value_model), responses, candidates
        )
    frames = []
    for i, response in enumerate(responses):
        base, tokens = logits[i], candidates[i]
        for taken in (
            response.token_ids,
            response.base_token,
        ):  # at a tie for the last place, which rounding decides
            lacking = ~(tokens == torch.from_numpy(taken)[:, None]).any(1)
            tokens[lacking, -1] = torch.from_numpy(taken)[lacking]
        tilted = (
            base
            if settings.scorer is None
            else drop_improbable(
                tilt(base, values[i], settings.beta), base, settings.min_probability
            )
        )
        steps, count = base.shape
        words = subject.tokenizer.batch_decode(tokens.flatten()[:, None].tolist())
        frames.append(pd.DataFrame({
            "objective": shard.objective, "prompt": np.int16(numbers[i]), "seed": np.int8(0),
            "asked": subject.tokenizer.decode(ids[i], skip_special_tokens=True), "step": np.repeat(np.arange(steps, dtype=np.int16), count),
            "rank": np.tile(np.arange(count, dtype=np.int8), steps), "word": words,
            "entropy": np.repeat(response.entropy, count).round(4), "steered": np.repeat(response.steered, count),
            "chosen": (tokens.numpy() == response.token_ids[:, None]).flatten(),
            "unsteered": (tokens.numpy() == response.base_token[:, None]).flatten(),
            **{name: x.log_softmax(-1).flatten().numpy().round(4) for name, x in (("likelihood", base), ("tilted", tilted))},
            "value": values[i].flatten().numpy().round(4),
        }))  # fmt: skip
    workers.report(cell.work * len(prompts) / workers.RESPONSES_PER_SECOND)
    return pd.concat(frames, ignore_index=True)


def _rollout_rewards(
    replicate: Replicate, model: PreTrainedModel, prefixes: list[list[int]], seed: int
) -> np.ndarray:
    """Reward of one response of the base model from each prefix (that may have ended already), `(prefixes,)`."""
    end = model.config.eos_token_id
    going = [i for i, prefix in enumerate(prefixes) if prefix[-1] != end]
    rollouts = replicate.respond(model, [prefixes[i] for i in going], 1000 + seed)
    whole = list(prefixes)
    for i, rollout in zip(going, rollouts, strict=True):
        whole[i] = [*prefixes[i], *ended(rollout)]
    return replicate.profile.training.reward_scale * replicate.rewards(
        REWARD, reward_model(replicate, REWARD), whole
    )


@torch.no_grad()
def candidate_logits(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[Generation], candidates: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and token ids of the candidates at every step of each response, `(tokens, K)` each."""
    logits, tokens = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        whole = torch.tensor([[*prompt, *response.token_ids]])
        best = (
            model(input_ids=whole, use_cache=False)
            .logits[0, len(prompt) - 1 : -1]
            .float()
            .topk(candidates)
        )
        logits.append(best.values)
        tokens.append(best.indices)
    return logits, tokens


@torch.no_grad()
def candidate_values(
    scorer: Scorer, prompts: list[list[int]], responses: list[Generation], candidates: list[Tensor]
) -> list[Tensor]:
    """Values of the candidates at every step of each response, `(tokens, K)` each."""
    tokens, mask = pad_right([response.token_ids.tolist() for response in responses])
    lengths = mask.sum(1)
    session = scorer.start_session(prompts, tokens.shape[1])
    values = [torch.zeros_like(each, dtype=torch.float32) for each in candidates]
    for step in range(tokens.shape[1]):
        rows = (lengths > step).nonzero().squeeze(1)
        found = session.score(
            rows, tokens[rows, :step], torch.stack([candidates[row][step] for row in rows.tolist()])
        )
        for row, scores in zip(rows.tolist(), found, strict=True):
            values[row][step] = scores
    return values
