"""Steered decoding as plainly as it can be written: one prompt, no cache, each candidate scored as a whole sequence."""

from __future__ import annotations

import math

import torch

from sia import sampling


@torch.no_grad()
def decode(
    model, value_model, prompt, opens, *, beta, candidates, max_new_tokens, temperature, seed, eos, value_prompt=None, min_probability=0.0
):
    """Lists of token, entropy, steered, base_token and kl per step. opens(entropy, step, key): the gate."""
    key = sampling.prompt_keys([prompt], [seed])
    response, trace = [], []
    for step in range(max_new_tokens):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, -1]
        base, tokens = logits.topk(candidates)
        p = base.softmax(0)
        entropy = -(p * p.log()).sum().item()
        steered = opens(entropy, step, key)
        scores = base.clone()
        if steered:
            sequences = torch.tensor([(value_prompt or prompt) + response + [token] for token in tokens.tolist()])
            values = value_model(sequences)[:, -1]
            scores = values if math.isinf(beta) else base + beta * values
            scores = torch.where((p >= min_probability) | (p == p.max()), scores, -math.inf)
        noise = sampling.gumbel(key, step, tokens[None])[0]
        pick = [(s / temperature + noise).argmax() if temperature else s.argmax() for s in (scores.double(), base.double())]
        q = scores.softmax(0)
        kl = sum((a * (a / b).log()).item() for a, b in zip(q, p, strict=True) if a > 0)
        response.append(tokens[pick[0]].item())
        trace.append((response[-1], entropy, steered, tokens[pick[1]].item(), kl))
        if response[-1] == eos:
            break
    return [list(column) for column in zip(*trace, strict=True)]
