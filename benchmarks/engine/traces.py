"""Responses token by token: steering, candidates, and what candidates are worth."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.engine.loading import fitted, language_model, reward_model, scorer_of
from benchmarks.engine.measure import expand_prompts, respond, steering_of
from benchmarks.runtime import workers
from benchmarks.spec.cells import Shard
from benchmarks.spec.methods import REWARD
from benchmarks.spec.model_kinds import BASE, JUNCTION, Q_HEAD, ModelKind, value_kind
from benchmarks.subjects.base import Subject
from benchmarks.subjects.lab.replicate import UNSEEN, Replicate, with_eos
from sia import Attention, Generation, Never, Steering
from sia._hidden_states import observe_hidden_states
from sia._inputs import pad_right
from sia._kv_cache import input_device
from sia.scorers.base import Scorer
from sia.steering import divergence, kl_divergence, steer, tilt

OTHER_BETA = 4.0  # besides 1, for which predictors are fitted


def trace_tokens(subject: Subject, shard: Shard) -> pd.DataFrame:
    """Return one row per response token: the token, the entropy of the base, what steering did.

    Of the lab also, at the tokens of the first sample (NaN elsewhere), for each loss (where the
    base learned another world, for the first):

    - divergence_LOSS: KL(π‖π*) in nats over the candidates, π* by the value model of this loss
      and β = 1, whether steered or not.
    - range_LOSS: largest minus smallest value.

    And of the base what a gate could look at, and what it would gain (in another world only
    predicted, shift and attention):

    - attention: the signal of the attention gate.
    - predicted_LOSS: divergence_LOSS as the junction gate predicts it, q_head_LOSS: as it follows
      from the Q-head's values, unseen_LOSS: as a gate predicts it that was not shown this topic
      (NaN for topics that it was shown).
    - other_beta_LOSS: the divergence at β = OTHER_BETA.
    - shift_LOSS: probability that steering at β = 1 changes the token under the same noise.
    """
    prompts, indices, seeds = expand_prompts(subject, shard)
    signals = [Attention()] if _looks_ahead(subject, shard) else []
    responses = respond(subject, shard, prompts, seeds, signals)[0]
    lengths = [len(response.token_ids) for response in responses]
    columns = {
        name: np.concatenate([getattr(response, name) for response in responses])
        for name in ("token_ids", "base_token", "entropy", "steered")
    }
    places = {
        "objective": shard.objective,
        "prompt": np.repeat(np.int16(indices), lengths),
        "seed": np.repeat(np.int8(seeds), lengths),
        "step": np.concatenate([np.arange(n, dtype=np.int16) for n in lengths]),
    }
    frame = pd.DataFrame(places | columns)
    workers.report(2 * shard.cell.work * len(prompts) / workers.RESPONSES_PER_SECOND)
    if not subject.traced_losses:
        return frame
    first = [i for i, seed in enumerate(seeds) if seed == 0]
    measured = _at_steps(subject, shard, [prompts[i] for i in first], [responses[i] for i in first])
    for name, per_response in measured.items():
        column = np.full(len(frame), np.nan, dtype=np.float32)
        column[frame["seed"] == 0] = torch.cat(per_response).cpu().numpy()
        frame[name] = column
    return frame


def _looks_ahead(subject: Subject, shard: Shard) -> bool:
    """Return whether a trace tells what gates could look at: of the lab's base, in any world."""
    cell = shard.cell
    of_base = replace(cell.model, world="") == BASE
    return bool(subject.traced_losses) and cell.gate == "never" and of_base


def _at_steps(
    subject: Subject, shard: Shard, prompts: list, responses: list[Generation]
) -> dict[str, list[Tensor]]:
    """Return the columns of a trace that values and hidden states give, `(tokens,)` by response."""
    cell = shard.cell
    ids = subject.encode(prompts, str(cell.model))
    model = language_model(subject, cell.model, cell.family)
    count = subject.profile.decoding.candidates
    logits, candidates, hidden = candidate_states(model, ids, responses, count)
    columns: dict[str, list[Tensor]] = {}
    elsewhere = cell.model.world
    for loss in subject.profile.losses[:1] if elsewhere else subject.traced_losses:
        scorer = scorer_of(subject, value_kind(loss, world=elsewhere), cell.family)
        values = candidate_values(scorer, ids, responses, candidates)
        columns[f"divergence_{loss}"] = _divergences(logits, values)
        columns[f"range_{loss}"] = [value.amax(1) - value.amin(1) for value in values]
        if _looks_ahead(subject, shard):
            gate = fitted(subject, ModelKind(JUNCTION, loss), cell.family)
            columns |= {
                f"predicted_{loss}": [gate.predictor.predict(states) for states in hidden],
                f"shift_{loss}": [
                    shift_probability(base, tilt(base, value, 1.0))
                    for base, value in zip(logits, values, strict=True)
                ],
            }
        if _looks_ahead(subject, shard) and not elsewhere:
            unseen, head = (
                fitted(subject, ModelKind(name, loss), cell.family) for name in (UNSEEN, Q_HEAD)
            )
            foreseen = [unseen.predictor.predict(states) for states in hidden]
            unseen_topics = cast(Replicate, subject).unseen_topics
            topics = [prompt.item.topic for prompt in prompts]
            estimates = [
                head.values(states, tokens)
                for states, tokens in zip(hidden, candidates, strict=True)
            ]
            columns |= {
                f"unseen_{loss}": [
                    x if topic in unseen_topics else torch.full_like(x, math.nan)
                    for x, topic in zip(foreseen, topics, strict=True)
                ],
                f"q_head_{loss}": _divergences(logits, estimates),
                f"other_beta_{loss}": _divergences(logits, values, OTHER_BETA),
            }
    if _looks_ahead(subject, shard):
        columns["attention"] = [
            torch.from_numpy(response.signal(Attention())) for response in responses
        ]
    return columns


def _divergences(
    logits: Sequence[Tensor], values: Sequence[Tensor], beta: float = 1.0
) -> list[Tensor]:
    """Return KL(π‖π*) at every step, `(tokens,)` by response."""
    pairs = zip(logits, values, strict=True)
    return [kl_divergence(base, tilt(base, value, beta)) for base, value in pairs]


def shift_probability(logits: Tensor, steered: Tensor) -> Tensor:
    """Return the probability that two policies sample different tokens under the same noise.

    Of Gumbel noise, argmax(ln p + g) and argmax(ln q + g) are both k with probability
    1 / Σ_j max(p_j/p_k, q_j/q_k).

    Args:
        logits: Logits of one policy, `(steps, K)`.
        steered: Logits of the other policy, `(steps, K)`.
    """
    ratios = [x[:, None, :] - x[:, :, None] for x in (logits, steered)]  # ln p_j/p_k at [k, j]
    same = torch.maximum(*ratios).logsumexp(-1).neg().exp().sum(-1)
    return (1 - same).clamp(0, 1)


def rollout_values(replicate: Replicate, shard: Shard) -> pd.DataFrame:
    """Return one row per candidate of some states that the base policy visits.

    - base_logprob: ln π over the K candidates.
    - value_LOSS: scores of the value models.
    - worth: mean reward of the response after some rollouts of the base model from there, on the
      scale that values are distilled from; worth_error: its standard error.
    """
    profile, sweep, cell = replicate.profile, replicate.profile.sweep, shard.cell
    model = language_model(replicate, cell.model, cell.family)
    prompts, indices, seeds = expand_prompts(replicate, shard)
    rng = random.Random(f"probes {shard.objective}")
    count = max(indices) + 1
    chosen = [rng.randrange(count) for _ in range(sweep.probes)]
    ids = replicate.encode(prompts[:count], str(cell.model))
    responses = respond(replicate, shard, prompts[:count], seeds[:count])[0]
    logits, candidates, _ = candidate_states(model, ids, responses, profile.decoding.candidates)
    values = {}
    for loss in replicate.traced_losses:
        scorer = scorer_of(replicate, value_kind(loss), cell.family)
        values[f"value_{loss}"] = candidate_values(scorer, ids, responses, candidates)
    frames, prefixes = [], []
    for state, i in enumerate(chosen):
        step = rng.randrange(len(responses[i].token_ids))
        base = logits[i][step].log_softmax(-1)
        columns = {
            "objective": shard.objective,
            "prompt": np.int16(i),
            "state": np.int16(state),
            "step": np.int16(step),
            "entropy": np.float32(-(base.exp() * base).sum().item()),
            "rank": np.arange(len(base), dtype=np.int8),
            "base_logprob": base.cpu().numpy(),
        }
        of_state = {name: scores[i][step].cpu().numpy() for name, scores in values.items()}
        frames.append(pd.DataFrame(columns | of_state))
        prefix = [*ids[i], *responses[i].token_ids[:step].tolist()]
        prefixes += [[*prefix, token] for token in candidates[i][step].tolist()]
    rewards = np.stack(
        [_rollout_rewards(replicate, model, prefixes, seed) for seed in range(sweep.probe_rollouts)]
    )
    spread = rewards.std(0, ddof=1) / np.sqrt(len(rewards))
    workers.report(rewards.size / workers.RESPONSES_PER_SECOND)
    return pd.concat(frames, ignore_index=True).assign(
        worth=rewards.mean(0).astype(np.float32), worth_error=spread.astype(np.float32)
    )


def _rollout_rewards(
    replicate: Replicate, model: PreTrainedModel, prefixes: list[list[int]], seed: int
) -> np.ndarray:
    """Return the reward of one response from each prefix, which may have ended, `(prefixes,)`."""
    end = model.config.eos_token_id
    going = [i for i, prefix in enumerate(prefixes) if prefix[-1] != end]
    rollouts = replicate.respond(model, [prefixes[i] for i in going], 1000 + seed)
    whole = list(prefixes)
    for i, rollout in zip(going, rollouts, strict=True):
        whole[i] = [*prefixes[i], *with_eos(rollout)]
    rewards = replicate.rewards(REWARD, reward_model(replicate, REWARD), whole)
    return replicate.profile.training.reward_scale * rewards


def candidate_table(
    subject: Subject, shard: Shard, responses: Sequence[Generation]
) -> pd.DataFrame:
    """Return one row per candidate of every token of measured responses, words included.

    Tokens, entropies and steered steps are those that were measured. Probabilities and values are
    computed for these tokens anew, so that rounding may part them from the entropies.

    - base_logprob: ln π of the base over the K candidates.
    - value: score of the cell's scorer, whether the gate is open or not (NaN where nothing
      steers); tilted: ln of the steered policy, as it is where the gate is open.
    - divergence: KL(π‖π*) in nats of the step, of the base by the profile's first loss at β = 1;
      predicted: as the junction gate of this loss predicts it (NaN where there is none).
    - chosen, unsteered: whether it is the token that was taken, and the one that the same noise
      would have taken unsteered.

    Args:
        subject: Models and prompts.
        shard: The cell and the prompts.
        responses: One to each prompt.
    """
    cell, steering = shard.cell, steering_of(shard.cell, shard.objective, subject)
    expanded, all_indices, seeds = expand_prompts(subject, shard)
    first = [i for i, seed in enumerate(seeds) if seed == 0]
    prompts, indices = [expanded[i] for i in first], [all_indices[i] for i in first]
    ids = subject.encode(prompts, str(cell.model))
    model = language_model(subject, cell.model, cell.family)
    count = subject.profile.decoding.candidates
    logits, candidates, hidden = candidate_states(model, ids, responses, count)
    kind = cell.scorer or value_kind(subject.profile.losses[0])
    shown = steering or Steering(scorer_of(subject, kind, cell.family), Never(), 1.0)
    value_ids = subject.encode(prompts, str(kind))
    values = candidate_values(shown.scorer, value_ids, responses, candidates)
    predicted = [torch.full((len(base),), math.nan) for base in logits]
    if subject.profile.has(junction := ModelKind(JUNCTION, kind.loss)):
        predict = fitted(subject, junction, cell.family).predictor.predict
        predicted = [predict(states).cpu() for states in hidden]
    frames = []
    for i, response in enumerate(responses):
        base, tokens, value = (each[i].cpu() for each in (logits, candidates, values))
        optimal = steer(base, value, shown)
        tilted = base if steering is None else optimal
        steps, width = base.shape
        columns = {
            "objective": shard.objective,
            "prompt": np.int16(indices[i]),
            "seed": np.int8(0),
            "asked": subject.tokenizer.decode(ids[i], skip_special_tokens=True),
            "step": np.repeat(np.arange(steps, dtype=np.int16), width),
            "rank": np.tile(np.arange(width, dtype=np.int8), steps),
            "word": subject.words(tokens.flatten().tolist()),
            "entropy": np.repeat(response.entropy, width).round(4),
            "steered": np.repeat(response.steered, width),
            "chosen": (tokens.numpy() == response.token_ids[:, None]).flatten(),
            "unsteered": (tokens.numpy() == response.base_token[:, None]).flatten(),
            "base_logprob": base.log_softmax(-1).flatten().numpy().round(4),
            "tilted": tilted.log_softmax(-1).flatten().numpy().round(4),
            "value": np.float32(np.nan) if steering is None else value.flatten().numpy().round(4),
            "divergence": np.repeat(divergence(base, optimal).numpy(), width).round(4),
            "predicted": np.repeat(predicted[i].numpy(), width).round(4),
        }
        frames.append(pd.DataFrame(columns))
    workers.report(cell.work * len(prompts) / workers.RESPONSES_PER_SECOND)
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def candidate_states(
    model: PreTrainedModel,
    prompts: list[list[int]],
    responses: Sequence[Generation],
    candidates: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return logits and ids of the candidates, `(tokens, K)`, and hidden states by response.

    The tokens that the response and the unsteered policy took are among them, also where rounding
    ranks another token higher than when they were taken. Hidden states: the last ones of the
    language model, `(tokens, hidden)`.
    """
    logits, tokens, hidden = [], [], []
    device = input_device(model)
    for prompt, response in zip(prompts, responses, strict=True):
        whole = torch.tensor([[*prompt, *response.token_ids]], device=device)
        with observe_hidden_states(model, read=True) as observed:
            steps = model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        taken = np.stack([response.token_ids, response.base_token], axis=1)
        first = steps.scatter(1, torch.tensor(taken, device=device), torch.inf)
        chosen = first.topk(candidates).indices
        best = steps.gather(1, chosen).sort(descending=True, stable=True)
        logits.append(best.values)
        tokens.append(chosen.gather(1, best.indices))
        hidden.append(observed.latest[0, len(prompt) - 1 : -1])
    return logits, tokens, hidden


@torch.no_grad()
def candidate_values(
    scorer: Scorer,
    prompts: list[list[int]],
    responses: Sequence[Generation],
    candidates: list[Tensor],
) -> list[Tensor]:
    """Return values of the candidates at every step, `(tokens, K)` per response."""
    whole = [response.token_ids.tolist() for response in responses]
    tokens, mask = pad_right(whole, candidates[0].device)
    lengths = mask.sum(1)
    session = scorer.start_session(prompts, tokens.shape[1])
    values = [torch.zeros_like(each, dtype=torch.float32) for each in candidates]
    for step in range(tokens.shape[1]):
        rows = (lengths > step).nonzero().squeeze(1)
        at_step = torch.stack([candidates[row][step] for row in rows.tolist()])
        scores = session.score(rows, tokens[rows, :step], at_step)
        for row, row_scores in zip(rows.tolist(), scores, strict=True):
            values[row][step] = row_scores
    return values
