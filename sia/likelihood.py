"""What a steered policy thinks of given responses: exact log-likelihoods, token by token, without sampling.

ln π* of a token that the tilt of `sia.steering` gives a step where the gate opens, ln π over the K candidates where it does not, divided
by the temperature: what `generate` samples from, multiplied up by the chain rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical
from transformers import PreTrainedModel

from sia import _sampling
from sia._checks import check_inputs, check_steering, check_values
from sia._inputs import pad_left, pad_right
from sia._kv_cache import input_device
from sia.gates import Never, Step
from sia.signals import Entropy, Signal
from sia.steering import Steering, candidate_count, entropy, steer


@dataclass(frozen=True)
class Likelihood:
    """Of one response. log_probabilities: ln π(y_t | x, y_<t) under the steered policy, float32; −∞ for a token that is not among its K
    candidates. greedy: whether each token is the most probable one, bool. steered: whether the gate was open, bool."""

    log_probabilities: np.ndarray
    greedy: np.ndarray
    steered: np.ndarray

    @property
    def total(self) -> float:
        """ln π of the whole response, in nats."""
        return float(self.log_probabilities.sum())


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    steering: Steering | None,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    candidates: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    value_prompts: Sequence[Sequence[int]] | None = None,
) -> list[Likelihood]:
    """One `Likelihood` for each response; all are token ids without padding.

    candidates: K without a steering. seed: of gates with noise of their own. value_prompts: as of `generate`.

    Errors: as of `generate`; ValueError for a gate on attention, and for an empty response.
    """
    _sampling.check_temperature(temperature)
    if temperature == 0:
        raise ValueError("temperature must be above 0: a greedy policy has no likelihoods")
    if not len(prompts) == len(responses) == len(value_prompts or prompts):
        raise ValueError(
            f"prompts and responses must be as many, got {len(prompts)} and {len(responses)}"
        )
    for name, sequences in (("prompt", prompts), ("response", responses)):
        empty = [i for i, sequence in enumerate(sequences) if len(sequence) == 0]
        if empty:
            raise ValueError(f"a {name} needs at least one token, number {empty[0]} is empty")
    count = candidate_count(steering, candidates)
    gate = steering.gate if steering else Never()
    foreign = [signal for signal in gate.signals if not isinstance(signal, Entropy)]
    if foreign:
        raise ValueError(
            f"log-likelihoods need a gate that looks at entropies, positions or noise, got {gate}"
        )
    found: list[Likelihood | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        values = [(value_prompts or prompts)[i] for i in chunk]
        these = _batch(
            model,
            steering,
            count,
            [prompts[i] for i in chunk],
            [responses[i] for i in chunk],
            temperature,
            seed,
            values,
            chunk,
        )
        for i, likelihood in zip(chunk, these, strict=True):
            found[i] = likelihood
    return found


def _batch(
    model,
    steering: Steering | None,
    count: int,
    prompts,
    responses,
    temperature: float,
    seed: int,
    value_prompts,
    numbers,
) -> list[Likelihood]:
    device = input_device(model)
    tokens, written = pad_right(responses, device)
    rows, longest = tokens.shape
    check_inputs(model, *pad_left(prompts, device), value_prompts, numbers, longest)
    check_steering(model, steering, count)
    gate = steering.gate if steering else Never()
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    # padding is on the right and attention is causal: no token sees it, and no mask is needed
    whole, _ = pad_right(
        [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)], device
    )
    first = int(starts.min()) - 1  # the first position that predicts a response token
    logits = model(
        input_ids=whole,
        use_cache=False,
        logits_to_keep=torch.arange(first, whole.shape[1], device=device),
    ).logits
    session = steering.scorer.start_session(value_prompts, longest) if steering else None
    keys = _sampling.gate_keys(
        _sampling.step_keys(_sampling.prompt_keys(prompts, [seed] * rows, device), longest)
    )
    results = (
        torch.full((rows, longest), math.nan, device=device),
        *torch.zeros(2, rows, longest, dtype=torch.bool, device=device),
    )
    last = {signal: torch.full((rows,), math.nan, device=device) for signal in gate.signals}
    for number in range(longest):
        there = written[:, number].nonzero().squeeze(1)
        at_step = logits[there, starts[there] - 1 - first + number].float()
        scores, candidates = at_step.topk(count)
        signals = {signal: _entropy(signal, at_step, scores) for signal in gate.signals}
        before = {signal: values[there] for signal, values in last.items()}
        opened = gate.opens(
            Step(number, entropy(scores), at_step, keys[there, number], signals, before)
        )
        for signal, values in signals.items():
            last[signal][there] = values
        where = opened.nonzero().squeeze(1)
        if session is not None and len(where):
            asked = there[where]
            values = session.score(asked, tokens[asked, :number], candidates[where]).to(device)
            check_values(values, asked, numbers, 1, number)
            base = scores[where]
            scores = scores.index_copy(
                0,
                where,
                steer(base, values, steering),
            )
        target = candidates == tokens[there, number : number + 1]  # (n, K)
        log_probabilities = (scores / temperature).log_softmax(-1)
        results[0][there, number] = torch.where(
            target.any(1), (log_probabilities.where(target, 0.0)).sum(1), -math.inf
        )
        results[1][there, number] = target.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
        results[2][there, number] = opened
    columns = [column.cpu().numpy() for column in results]
    return [
        Likelihood(*(column[row, : len(response)] for column in columns))
        for row, response in enumerate(responses)
    ]


def _entropy(signal: Signal, logits: Tensor, scores: Tensor) -> Tensor:
    return (
        entropy(scores)
        if signal == Entropy()
        else Categorical(logits=logits, validate_args=False).entropy()
    )
