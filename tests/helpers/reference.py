"""Steered decoding as plainly as it can be written: one prompt, no cache, each candidate scored as a whole sequence."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sia import _sampling
from tests.helpers.tiny import EOS


@dataclass
class Look:
    """What a gate of the reference may look at in one step."""

    step: int
    key: Tensor
    entropy: float
    vocabulary_entropy: float
    attentions: Tensor | None  # (layers, heads, length, length)

    def attention(self, layers=slice(None), heads=slice(None)) -> float:
        """Newest position, averaged, position 0 left out, each weight times its distance, at most 10, summed."""
        row = self.attentions[layers][:, heads, -1].mean((0, 1)).tolist()
        return sum(
            weight * min(len(row) - 1 - position, 10)
            for position, weight in enumerate(row)
            if position > 0
        )


def nats(p: Tensor) -> float:
    return -sum(x * math.log(x) for x in p.tolist() if x > 0)


@torch.no_grad()
def whole_values(value_model, prompt, candidates):
    """The values of whole sequences, each read at its last token."""
    return value_model(torch.tensor([[*prompt, token] for token in candidates]))[:, -1]


@torch.no_grad()
def decode(
    model, values, prompt, opens, *, beta, candidates, max_new_tokens, temperature, seed, eos, value_prompt=None, min_probability=0.0,
    attentive=False,
):  # fmt: skip
    """Lists of token, entropy, steered, base_token and kl per step.

    values(prefix, candidate tokens) → their values. opens(looks): the gate, given what was seen at each step so far.
    attentive: whether the gate looks at attention.
    """
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    key = _sampling.prompt_keys([prompt], [seed])
    response, trace, looks = [], [], []
    for step in range(max_new_tokens):
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids).logits[0, -1]
        attentions = (
            torch.cat(eager(input_ids=ids, output_attentions=True).attentions)
            if attentive
            else None
        )
        base, tokens = logits.topk(candidates)
        p = base.softmax(0)
        looks.append(Look(step, key, nats(p), nats(logits.softmax(0)), attentions))
        steered = opens(looks)
        scores = base.clone()
        if steered:
            found = values([*(value_prompt or prompt), *response], tokens.tolist())
            scores = found if math.isinf(beta) else base + beta * found
            scores = torch.where((p >= min_probability) | (p == p.max()), scores, -math.inf)
        noise = _sampling.gumbel(key, step, tokens[None])[0]
        pick = [
            (s / temperature + noise).argmax() if temperature else s.argmax()
            for s in (scores.double(), base.double())
        ]
        q = scores.softmax(0)
        kl = sum((a * (a / b).log()).item() for a, b in zip(q, p, strict=True) if a > 0)
        response.append(tokens[pick[0]].item())
        trace.append((response[-1], looks[-1].entropy, steered, tokens[pick[1]].item(), kl))
        if response[-1] == eos:
            break
    return [list(column) for column in zip(*trace, strict=True)]


@torch.no_grad()
def whole_rewards(model, prefix, candidates):
    """transformers' own reading of each sequence alone, ended by EOS once."""
    sequences = [
        [*prefix, token] if token == EOS else [*prefix, token, EOS] for token in candidates
    ]
    return torch.stack(
        [model(input_ids=torch.tensor([sequence])).logits[0, 0] for sequence in sequences]
    )
