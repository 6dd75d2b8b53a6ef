"""The best of many responses: best-of-N, and chunk-level beam search.

Both decode several samples of each prompt side by side, under any steering, and ask a reward for the best; the samples share
the prompt's caches. Best-of-N as in Stiennon et al., "Learning to summarize with human feedback", 2020; chunk-level beam search as
in Zhou et al., "Weak-to-strong search: Align large language models via searching over small language models", 2024.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia._decoding import check_values, check_vocabulary
from sia._kv_cache import input_device
from sia.batch import Prompts, batches, begin, check_options, prompt_ids
from sia.generation import Generation
from sia.scorers.base import Scorer
from sia.steering import Steering


def best_of_n(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    reward: Scorer,
    n: int,
    steering: Steering | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    value_prompts: Prompts | None = None,
    reward_prompts: Prompts | None = None,
    progress: bool = True,
) -> list[Generation]:
    """Of `n` responses to each prompt, decoded under `steering`, the one of highest reward (the earliest on ties).

    Arguments, result and errors as of `chunk_beam_search`. The first of the n responses is that of `generate` with the same seed.
    """
    check_options(prompts, temperature, n=n, max_new_tokens=max_new_tokens)
    return chunk_beam_search(
        model, tokenizer, prompts, reward, 1, n, max_new_tokens, steering, max_new_tokens, temperature, seed, batch_size,
        value_prompts, reward_prompts, progress,
    )  # fmt: skip


def chunk_beam_search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    reward: Scorer,
    width: int,
    expansions: int,
    chunk: int,
    steering: Steering | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    value_prompts: Prompts | None = None,
    reward_prompts: Prompts | None = None,
    progress: bool = True,
) -> list[Generation]:
    """Keeps the `width` best responses (W) of each prompt and lets each go on in `expansions` ways (K) by `chunk` tokens (L).

    reward: rates responses as they stand: a `RewardScorer` as if they ended there, a `ValueModel` at their last token.
    batch_size: how many responses are decoded together; all width × expansions of a prompt always are.
    value_prompts, reward_prompts: the prompts in the template of the steering's scorer, and of the reward.
    The other arguments are those of `generate`; temperature must not be 0, where all ways would be one.

    Returns per prompt the response of highest reward, with `reward`, and with the `cost` of all that was tried. The order of
    rewards decides; a response that has ended stays as long as it is among the best. Errors as of `generate`.
    """
    counts = {
        "width": width,
        "expansions": expansions,
        "chunk": chunk,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    check_options(prompts, temperature, **counts)
    if temperature == 0 and width * expansions > 1:
        raise ValueError(
            "temperature must be above 0 in a search: greedy samples of a prompt are all the same"
        )
    check_vocabulary(model, reward, "reward")
    ids, value_ids = prompt_ids(tokenizer, prompts, value_prompts, "value")
    _, reward_ids = prompt_ids(tokenizer, prompts, reward_prompts, "reward")
    samples, seeds = width * expansions, [seed] * len(ids)
    found: list[Generation | None] = [None] * len(ids)
    for numbers in batches(ids, max(1, batch_size // samples), "search", progress):
        decoding = begin(
            model,
            tokenizer,
            ids,
            value_ids,
            numbers,
            steering,
            max_new_tokens,
            temperature,
            seeds,
            samples,
        )
        session = reward.start_session([reward_ids[i] for i in numbers], max_new_tokens, samples)
        responses = decoding.responses
        rewards = torch.full((len(numbers), samples), -torch.inf, device=input_device(model))
        while len(rows := decoding.going):
            decoding.run(chunk)
            rated = session.score_responses(
                rows, responses.tokens[rows, : decoding.number], responses.lengths[rows]
            )
            check_values(rated[:, None], rows, numbers, samples, decoding.number - 1)
            rewards.view(-1)[rows] = rated.to(rewards.device)
            if len(decoding.going) == 0:
                break
            going = torch.zeros(rewards.numel(), dtype=torch.bool, device=rewards.device)
            going[decoding.going] = True
            sources, going, held = select_beams(rewards, going.view_as(rewards), width, expansions)
            rewards = rewards.view(-1)[sources].view_as(rewards).masked_fill(~held, -torch.inf)
            decoding.continue_from(sources, going)
            session.reorder(sources)
        best = rewards.argmax(1)
        costs = decoding.costs(session.meters)
        chosen = responses.generations(
            tokenizer,
            (torch.arange(len(numbers), device=best.device) * samples + best).tolist(),
            costs,
        )
        for place, (number, generation) in enumerate(zip(numbers, chosen, strict=True)):
            tried = reduce(add, costs[place * samples : (place + 1) * samples])
            found[number] = replace(
                generation, cost=tried, reward=float(rewards[place, best[place]])
            )
    return found


def select_beams(
    rewards: Tensor, going: Tensor, width: int, expansions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which responses go on. rewards `(prompts, samples)`, −∞ where there is none; going: those that have not ended.

    Of each prompt the `width` best stay (the earlier on ties): one that goes on fills `expansions` rows, one that has ended fills one.
    Returns for every row, `(prompts · samples,)`, where it goes on from and whether it goes on, and `(prompts, samples)` whether it
    holds a response.
    """
    prompts, samples = rewards.shape
    sources = torch.arange(prompts * samples, device=rewards.device)
    held = torch.zeros_like(going)
    best = rewards.sort(dim=1, descending=True, stable=True).indices[:, :width].tolist()
    on = going.tolist()
    for prompt in range(prompts):
        filled = [b for b in best[prompt] if on[prompt][b] for _ in range(expansions)]
        filled += [b for b in best[prompt] if not on[prompt][b] and rewards[prompt, b] > -torch.inf]
        start = prompt * samples
        sources[start : start + len(filled)] = (
            torch.tensor(filled, dtype=torch.int64, device=sources.device) + start
        )
        held[prompt, : len(filled)] = True
    goes_on = going.flatten()[sources] & held.flatten()
    return sources, goes_on, held
