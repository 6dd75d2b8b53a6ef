"""Steered decoding with the cost structure reported for the paper's published code.

No cache for either model, all attention matrices at every step, and the K candidates scored as K
whole sequences. Only the structure is reproduced, in our own words; the noise is that of `sia`, so
that both loops must produce the same tokens.
"""

import torch
from transformers import PreTrainedModel

from sia import ValueModel, _sampling
from sia.gates import Gate, Step
from sia.signals import Entropy
from sia.steering import entropy, tilt


@torch.no_grad()
def published_loop(
    model: PreTrainedModel,
    value_model: ValueModel,
    prompt: list[int],
    gate: Gate,
    beta: float,
    candidates: int,
    max_new_tokens: int,
    seed: int,
) -> list[int]:
    """Return the response tokens to one prompt, at temperature 1, without a stop token.

    Args:
        model: Language model with eager attention, which keeps its matrices.
        gate: A gate that looks at the entropy of the candidates, or at nothing.
    """
    ids, key = torch.tensor([prompt]), _sampling.prompt_keys([prompt], [seed])
    last = torch.tensor([torch.nan])
    for number in range(max_new_tokens):
        logits = model(input_ids=ids, output_attentions=True, use_cache=False).logits[:, -1].float()
        scores, tokens = logits.topk(candidates)
        uncertainty, keys = entropy(scores), _sampling.gate_keys(_sampling.mix(key, number))
        signals, previous = {Entropy(): uncertainty}, {Entropy(): last}
        if gate.opens(Step(number, uncertainty, logits, keys, signals, previous)).item():
            branches = torch.cat([ids.expand(candidates, -1), tokens[0, :, None]], dim=1)
            scores = tilt(scores, value_model(branches)[None, :, -1], beta)
        last = uncertainty
        chosen = _sampling.choose(scores, _sampling.gumbel(key, number, tokens), 1.0)
        ids = torch.cat([ids, tokens[:, chosen]], dim=1)
    return ids[0, len(prompt) :].tolist()
