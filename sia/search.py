"""Searches for the response of highest reward: best-of-N and chunk-level beam search.

Both decode several samples of each prompt side by side, under any steering, and choose by a reward;
the samples share the prompt's caches. Best-of-N: Stiennon et al., "Learning to summarize with human
feedback", 2020. Chunk-level beam search: Zhou et al., "Weak-to-strong search: Align large language
models via searching over small language models", 2024.
"""

from dataclasses import replace
from functools import reduce
from operator import add

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia._checks import check_prompts, check_values, check_vocabulary
from sia._decoding import Decoding
from sia._inputs import check_sequences
from sia._numbers import whole_number
from sia.batch import (
    Prompts,
    batches,
    read_prompts,
    read_template,
    start_decoding,
    stop_tokens,
)
from sia.generation import Generation
from sia.scorers.base import Scorer, Session, close, values_responses
from sia.steering import Steering


def best_of_n(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    reward: Scorer,
    n: int,
    steering: Steering | None = None,
    *,
    candidates: int | None = None,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    value_prompts: Prompts | None = None,
    reward_prompts: Prompts | None = None,
    progress: bool = True,
) -> list[Generation]:
    """Return for each prompt the best of `n` responses by `reward` (the earliest on ties).

    The first of the n responses is that of `generate` with the same seed. Arguments, result and
    errors are those of `chunk_beam_search`.
    """
    n = whole_number("n", n, 1)
    return chunk_beam_search(
        model,
        tokenizer,
        prompts,
        reward,
        width=1,
        expansions=n,
        chunk=max_new_tokens,
        steering=steering,
        candidates=candidates,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        value_prompts=value_prompts,
        reward_prompts=reward_prompts,
        progress=progress,
    )


def chunk_beam_search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    reward: Scorer,
    *,
    width: int,
    expansions: int,
    chunk: int,
    steering: Steering | None = None,
    candidates: int | None = None,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    value_prompts: Prompts | None = None,
    reward_prompts: Prompts | None = None,
    progress: bool = True,
) -> list[Generation]:
    """Return for each prompt the response of highest reward that a beam search finds.

    The `width` best responses of each prompt are kept, and each goes on in `expansions` ways by
    `chunk` tokens, until all have ended. A response that has ended stays among them as long as its
    reward is high enough.

    Args:
        model: Same as in `generate`, like all arguments that are not listed here.
        tokenizer: Tokenizer of the model.
        prompts: Texts, chats or token ids.
        reward: Scores responses as they stand: a `RewardScorer` as if they ended there, a
            `ValueModel` at their last token.
        width: W, responses kept per prompt.
        expansions: K, continuations of each kept response.
        chunk: L, tokens between two selections.
        steering: Steers every continuation.
        candidates: Tokens that take part without a steering.
        max_new_tokens: Longest response.
        temperature: Above 0, for greedy continuations would all be the same; None for that of the
            model's `generation_config`, 1 by default.
        seed: Seed of the noise.
        batch_size: Number of responses decoded together; those of a prompt always are.
        value_prompts: The prompts in the template of the steering's scorer, as of `generate`.
        reward_prompts: The prompts in the template of the reward, in the same way.
        progress: Whether to show a progress bar.

    Returns:
        Generations with their `reward`, and with the `cost` of all that was tried.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    width, expansions = whole_number("width", width, 1), whole_number("expansions", expansions, 1)
    chunk, batch_size = whole_number("chunk", chunk, 1), whole_number("batch_size", batch_size, 1)
    ids = read_prompts(model, tokenizer, prompts)
    configured = model.generation_config.temperature
    if (configured if temperature is None else temperature) == 0 and width * expansions > 1:
        raise ValueError(
            "temperature must be above 0 in a search: greedy samples of a prompt are all the same"
        )
    vocabulary = check_vocabulary(model, reward, "reward", tokenizer)
    if not values_responses(reward):
        raise ValueError(
            "a reward must value whole responses, as a RewardScorer or a ValueModel does, "
            f"got a {type(reward).__name__} that values candidates alone"
        )
    reward = close(reward, tokenizer, stop_tokens(model, tokenizer))
    value_ids = read_template(model, tokenizer, value_prompts, "value", ids, steering)
    reward_ids = read_template(model, tokenizer, reward_prompts, "reward", ids, reward)
    check_prompts(model, tokenizer, ids, value_ids, steering, candidates, max_new_tokens)
    check_sequences("reward prompt", reward_ids, reward.vocabulary_size)
    samples, seeds = width * expansions, [whole_number("seed", seed)] * len(ids)
    generations: dict[int, Generation] = {}
    for indices in batches(
        model, ids, max_new_tokens, max(1, batch_size // samples), "search", progress
    ):
        decoding = start_decoding(
            model,
            tokenizer,
            ids,
            value_ids,
            indices,
            seeds,
            steering=steering,
            candidates=candidates,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            samples=samples,
            vocabulary=vocabulary,
        )
        session = reward.start_session([reward_ids[i] for i in indices], max_new_tokens, samples)
        rewards = _search(decoding, session, width, expansions, chunk)
        generations |= zip(indices, _best(decoding, session, rewards, tokenizer), strict=True)
    return [generations[i] for i in range(len(ids))]


def _search(
    decoding: Decoding, session: Session, width: int, expansions: int, chunk: int
) -> Tensor:
    """Decode chunk by chunk and return the rewards of what is there in the end.

    Returns:
        Rewards `(prompts, samples)`, −∞ where a row holds no response.
    """
    responses, samples = decoding.responses, width * expansions
    shape, device = (len(decoding.prompts), samples), responses.tokens.device
    rewards = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
    while len(rows := decoding.active_rows):
        decoding.run(chunk)
        step = decoding.step
        lengths = responses.lengths[rows]
        scores = session.score_responses(rows, responses.tokens[rows, :step], lengths).to(rewards)
        check_values(scores, lengths, rows, decoding.prompt_indices, samples, step - 1)
        rewards.view(-1)[rows] = scores
        active = torch.zeros(rewards.numel(), dtype=torch.bool, device=rewards.device)
        active[decoding.active_rows] = True
        if not bool(active.any()):
            break
        sources, active, filled = select_beams(rewards, active.view_as(rewards), width, expansions)
        rewards = rewards.view(-1)[sources].view_as(rewards).masked_fill(~filled, -torch.inf)
        decoding.reorder(sources, active)
        session.reorder(sources)
    return rewards


def _best(
    decoding: Decoding, session: Session, rewards: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[Generation]:
    """Return the best response to each prompt; rewards `(prompts, samples)`."""
    samples, costs = rewards.shape[1], decoding.costs(session.meters)
    starts = range(0, rewards.numel(), samples)  # the first row of each prompt
    best = rewards.argmax(1).tolist()  # the earliest on ties
    rows = [start + sample for start, sample in zip(starts, best, strict=True)]
    chosen = decoding.responses.generations(tokenizer, rows, costs)
    highest = rewards.amax(1).tolist()
    return [
        replace(generation, cost=reduce(add, costs[start : start + samples]), reward=reward)
        for generation, start, reward in zip(chosen, starts, highest, strict=True)
    ]


def select_beams(
    rewards: Tensor, active: Tensor, width: int, expansions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the responses that stay: the `width` best of each prompt, the earlier on ties.

    A response that goes on fills `expansions` rows, one that has ended fills one.

    Args:
        rewards: `(prompts, samples)`, −∞ where there is no response.
        active: Whether the response has not ended, bool `(prompts, samples)`.
        width: Number of responses to keep.
        expansions: Number of ways in which a response goes on.

    Returns:
        For every row `(prompts · samples,)` its source and whether it goes on, and
        `(prompts, samples)` whether it holds a response.
    """
    prompts, samples = rewards.shape
    sources = torch.arange(prompts * samples, device=rewards.device)
    filled = torch.zeros_like(active)
    order = rewards.sort(dim=1, descending=True, stable=True).indices[:, :width].tolist()
    held = (rewards > -torch.inf).tolist()
    for prompt, (best, goes_on) in enumerate(zip(order, active.tolist(), strict=True)):
        continued = [sample for sample in best if goes_on[sample] for _ in range(expansions)]
        ended = [sample for sample in best if held[prompt][sample] and not goes_on[sample]]
        rows = torch.tensor([*continued, *ended], dtype=torch.int64, device=sources.device)
        start = prompt * samples
        sources[start : start + len(rows)] = rows + start
        filled[prompt, : len(rows)] = True
    return sources, active.flatten()[sources] & filled.flatten(), filled
