"""Steered decoding as plainly as it can be written.

One prompt, no cache, each candidate scored as a whole sequence.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sia import _sampling
from tests.helpers.tiny import EOS


@dataclass
class Look:
    """Signals of one step that a gate of the reference may read."""

    step: int
    key: Tensor
    entropy: float
    vocabulary_entropy: float
    attentions: tuple[Tensor, ...] | None  # of each layer: (1, heads, length, length)

    def attention(self, layers=slice(None), heads=slice(None)) -> float:
        """Return the mean attention distance (≤ 10) of the newest position, without position 0."""
        row = torch.cat(self.attentions)[layers][:, heads, -1].mean((0, 1)).tolist()
        return sum(
            weight * min(len(row) - 1 - position, 10)
            for position, weight in enumerate(row)
            if position > 0
        )


def apply(processors, ids: Tensor, scores: Tensor) -> Tensor:
    """Return the scores of one row, `(tokens,)`, after all processors."""
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0]


def nats(p: Tensor) -> float:
    return -sum(x * math.log(x) for x in p.tolist() if x > 0)


@torch.no_grad()
def whole_values(value_model, prompt, candidates):
    """Return the values of whole sequences, each read at its last token."""
    return value_model(torch.tensor([[*prompt, token] for token in candidates]))[:, -1]


@torch.no_grad()
def decode(
    model,
    values,
    prompt,
    opens,
    *,
    beta=1.0,
    candidates=10,
    max_new_tokens=12,
    temperature=1.0,
    seed=0,
    value_prompt=None,
    min_probability=0.0,
    attentive=False,
    process=(),
    warp=(),
) -> dict[str, list]:
    """Decode one response.

    Args:
        values: Gives the values of candidate tokens: (prefix, candidates) → values.
        opens: The gate, given the looks at each step so far.
        attentive: Whether the gate looks at attention.
        process: Logits processors, which decide what the candidates are.
        warp: Warpers, which come after the tilt.

    Returns:
        The attributes of a `Generation` that has the same steps.
    """
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    key = _sampling.prompt_keys([prompt], [seed])
    response, trace, looks = [], [], []
    while len(response) < max_new_tokens and response[-1:] != [EOS]:
        step, ids = len(response), torch.tensor([prompt + response])
        logits = apply(process, ids, model(input_ids=ids).logits[:, -1])
        attentions = eager(input_ids=ids, output_attentions=True).attentions if attentive else None
        base, tokens = logits.topk(candidates)
        p = base.softmax(0)
        looks.append(Look(step, key, nats(p), nats(logits.softmax(0)), attentions))
        steered, scores = opens(looks), base
        if steered:
            values_now = values([*(value_prompt or prompt), *response], tokens.tolist())
            scores = values_now if math.isinf(beta) else base + beta * values_now
            kept = (base > -math.inf) & ((p >= min_probability) | (p == p.max()))
            scores = torch.where(kept, scores, -math.inf)
        noise = _sampling.gumbel(key, step, tokens[None])[0]
        token, base_token = (
            tokens[(s.double() / temperature + noise if temperature else s).argmax()].item()
            for s in (apply(warp, ids, scores[None]), apply(warp, ids, base[None]))
        )
        q = scores.softmax(0)
        kl = sum((a * (a / b).log()).item() for a, b in zip(q, p, strict=True) if a > 0)
        response.append(token)
        trace.append((token, steered, base_token, looks[-1].entropy, kl))
    names = ("token_ids", "steered", "base_token", "entropy", "kl")
    return dict(zip(names, map(list, zip(*trace, strict=True)), strict=True))


@torch.no_grad()
def whole_rewards(model, prefix, candidates):
    """transformers' own reading of each sequence alone, ended by EOS once."""
    ends = [[token] if token == EOS else [token, EOS] for token in candidates]
    return torch.stack([model(torch.tensor([[*prefix, *end]])).logits[0, 0] for end in ends])


def beam_search(extend, reward, keys, *, width, expansions, chunk, max_new_tokens=10):
    """Chunk-level beam search over beams (reward, response) of one prompt.

    Args:
        extend: Continues a response: (key of its row, response, tokens, max_new_tokens) → response.
        reward: Of a response as it stands.
        keys: Noise of the rows, `(width · expansions,)`.

    Returns:
        Reward and response of the best beam.
    """
    beams, ended, copies = [[]], [], len(keys)
    while beams:
        rows = [beam for beam in beams for _ in range(copies)]
        continued = [
            extend(keys[row : row + 1], beam, chunk, max_new_tokens)
            for row, beam in enumerate(rows)
        ]
        pairs = [(reward(response), response) for response in continued]
        best = sorted([*pairs, *ended], key=lambda pair: -pair[0])[:width]
        beams = [r for _, r in best if r[-1] != EOS and len(r) < max_new_tokens]
        ended = [pair for pair in best if pair[1] not in beams]
        copies = expansions
    return max(ended, key=lambda pair: pair[0])
