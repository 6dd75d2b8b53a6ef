"""The decoding loop, and its two entry points: `generate` for lists of prompts, `steered_generate` for transformers.

One step: forward pass of the language model (cached) → K candidates and their entropy → gate → values of the candidates
where it opened → tilt → one token per row by Gumbel-max with keyed noise → finished rows leave the batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.utils import ModelOutput

from sia import sampling
from sia.caching import growing_cache
from sia.gates import Step
from sia.scoring import Session
from sia.steering import Steering, drop_improbable, entropy, kl_divergence, tilt
from sia.trace import Cost, Generation

DEFAULT_CANDIDATES = 10  # K where there is no steering to name it
COMPACT_BELOW = 7 / 8  # rows leave the batch together, once this share of it is left: every leaving copies the cache

Process = Callable[[Tensor, Tensor], Tensor]  # (token ids so far, scores over the vocabulary) → scores
Stop = Callable[[Tensor], Tensor]  # token ids so far → bool (rows,)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    steering: Steering | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    value_prompts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    progress: bool = True,
) -> list[Generation]:
    """One response per prompt, in the order given.

    prompts: texts, or token ids. Texts get the tokenizer's special tokens unless they begin with its BOS token already,
        as chat templates write it.
    steering: None samples from the top 10 candidates of the model alone.
    temperature: 0 is greedy. It divides the logits after the tilt.
    seed: with the prompt it decides the noise: the same prompt and seed give the same response in any batch. Use
        other seeds for further samples of a prompt.
    value_prompts: the prompts in the value model's own template; by default the same token ids.

    Errors: ValueError for an empty prompt, a token or K beyond the vocabulary, vocabularies of different sizes, numbers out of
    range; FloatingPointError where a value is NaN or infinite.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, got a single text")
    if math.isnan(temperature) or temperature < 0 or math.isinf(temperature):
        raise ValueError(f"temperature must be 0 (greedy) or a finite number above it, got {temperature}")
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if value_prompts is not None and len(value_prompts) != len(prompts):
        raise ValueError(f"value_prompts must be as many as prompts: expected {len(prompts)}, got {len(value_prompts)}")
    ids = tokenize(tokenizer, prompts, "prompt")
    value_ids = ids if value_prompts is None else tokenize(tokenizer, value_prompts, "value prompt")
    stops = eos_token_ids(model.generation_config, tokenizer)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
    generations: list[Generation | None] = [None] * len(ids)
    with tqdm(total=len(ids), desc="generate", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            input_ids, attention_mask = pad_left([ids[i] for i in chunk], model.device)
            responses = decode(
                model,
                input_ids,
                attention_mask,
                steering=steering,
                row_keys=sampling.prompt_keys([ids[i] for i in chunk], [seed] * len(chunk), model.device),
                value_prompts=[value_ids[i] for i in chunk],
                numbers=chunk,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_tokens=stops,
            )
            for i, generation in zip(chunk, responses.generations(tokenizer), strict=True):
                generations[i] = generation
            bar.update(len(chunk))
    return generations


@dataclass
class SteeredOutput(ModelOutput):
    """sequences: prompt and response, `(rows, length)`, padded on the right. generations: a `Generation` per row."""

    sequences: Tensor | None = None
    generations: list[Generation] | None = None


@torch.no_grad()
def steered_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    steering: Steering | None = None,
    seed: int | None = None,
    value_prompts: Sequence[Sequence[int]] | None = None,
    **model_kwargs,
) -> SteeredOutput | Tensor:
    """For `model.generate(**inputs, custom_generate=steered_generate, steering=steering, …)`.

    transformers prepares everything as for its own sampling: its logits processors (temperature, top-p, …) come after the tilt.
    steering: None samples from the top 10 candidates of the model alone.
    seed: of the noise; by default drawn from torch's generator, so that `torch.manual_seed` decides, as in transformers.
        Further rows with the same prompt (`num_return_sequences`) get seed + 1, seed + 2, …
    value_prompts: token ids of the prompts in the value model's own template, one per row.

    Returns `SteeredOutput` with `return_dict_in_generate=True`, else the sequences `(rows, length)`. The `text` of its generations
    is None: transformers hands no tokenizer on.
    """
    if generation_config.num_beams > 1:
        raise ValueError(f"steered_generate samples or decodes greedily, got num_beams={generation_config.num_beams}")
    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(f"steered_generate starts from an empty cache, got one with {cache.get_seq_length()} tokens")
    prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))
    seen: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(seed + seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
    responses = decode(
        model,
        input_ids,
        attention_mask,
        steering=steering,
        row_keys=sampling.prompt_keys(prompts, seeds, input_ids.device),
        value_prompts=prompts if value_prompts is None else value_prompts,
        max_new_tokens=generation_config.max_length - input_ids.shape[1],
        temperature=1.0 if generation_config.do_sample else 0.0,
        stop_tokens=eos_token_ids(generation_config),
        cache=cache,
        process=logits_processor if len(logits_processor) else None,
        stop=(lambda ids: stopping_criteria(ids, None)) if len(stopping_criteria) else None,
    )
    sequences = responses.sequences(input_ids, generation_config.pad_token_id)
    if not generation_config.return_dict_in_generate:
        return sequences
    return SteeredOutput(sequences=sequences, generations=responses.generations(None))


@dataclass
class Responses:
    """What `decode` writes down: everything `(rows, max_new_tokens)`, of which the first `lengths` columns count."""

    tokens: Tensor
    entropy: Tensor
    steered: Tensor
    base_token: Tensor
    kl: Tensor
    lengths: Tensor  # (rows,)
    finished: Tensor  # (rows,)
    prompt_lengths: Tensor  # (rows,)
    session: Session | None = None

    @classmethod
    def empty(cls, prompt_lengths: Tensor, max_new_tokens: int) -> Responses:
        def blank(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(len(prompt_lengths), *shape, dtype=dtype, device=prompt_lengths.device)

        return cls(
            tokens=blank(torch.int64, max_new_tokens),
            entropy=blank(torch.float32, max_new_tokens),
            steered=blank(torch.bool, max_new_tokens),
            base_token=blank(torch.int64, max_new_tokens),
            kl=blank(torch.float32, max_new_tokens),
            lengths=blank(torch.int64),
            finished=blank(torch.bool),
            prompt_lengths=prompt_lengths,
        )

    def record(
        self, rows: Tensor, number: int, token: Tensor, entropy: Tensor, steered: Tensor, base_token: Tensor, kl: Tensor, ended: Tensor
    ) -> None:
        """Writes one step of these rows down; every argument `(rows,)`."""
        written = (self.tokens, self.entropy, self.steered, self.base_token, self.kl)
        for column, values in zip(written, (token, entropy, steered, base_token, kl), strict=True):
            column[rows, number] = values
        self.lengths[rows] = number + 1
        self.finished[rows] = ended
        if self.session:
            self.session.append(rows, token)

    def sequences(self, input_ids: Tensor, pad_token_id: int | None) -> Tensor:
        length = int(self.lengths.max())
        beyond = torch.arange(length, device=self.tokens.device) >= self.lengths[:, None]
        return torch.cat([input_ids, self.tokens[:, :length].masked_fill(beyond, pad_token_id or 0)], dim=1)

    def generations(self, tokenizer: PreTrainedTokenizerBase | None) -> list[Generation]:
        arrays = [x.cpu().numpy() for x in (self.tokens, self.entropy, self.steered, self.base_token, self.kl)]
        lengths, finished, prompts = self.lengths.tolist(), self.finished.tolist(), self.prompt_lengths.tolist()
        forwards = self.session.forwards.tolist() if self.session else [0] * len(lengths)
        computed = self.session.tokens.tolist() if self.session else [0] * len(lengths)
        generations = []
        for row, length in enumerate(lengths):
            tokens, *rest = [array[row, :length].copy() for array in arrays]
            text = None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
            cost = Cost(length, prompts[row] + length - 1, forwards[row], computed[row])
            generations.append(Generation(text, tokens, *rest, finished=finished[row], cost=cost))
        return generations


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    steering: Steering | None,
    row_keys: Tensor,
    value_prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    stop_tokens: Sequence[int],
    numbers: Sequence[int] | None = None,
    cache: Cache | None = None,
    process: Process | None = None,
    stop: Stop | None = None,
) -> Responses:
    """The loop. input_ids, attention_mask: `(rows, length)`, padded on the left; row_keys: `(rows,)`.

    numbers: what to call the rows in messages, their places in the caller's list.
    """
    numbers = range(len(input_ids)) if numbers is None else numbers
    check(model, input_ids, attention_mask, value_prompts, steering, numbers)
    device, (count, prompt_length) = input_ids.device, input_ids.shape
    candidate_count = steering.candidates if steering else DEFAULT_CANDIDATES
    responses = Responses.empty(attention_mask.sum(1), max_new_tokens)
    if steering and steering.scorer is not None:
        responses.session = steering.scorer.begin(value_prompts, max_new_tokens)
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    padded = not bool(attention_mask.all())
    mask = torch.cat([attention_mask, attention_mask.new_ones(count, max_new_tokens)], dim=1)
    ids = torch.cat([input_ids, input_ids.new_zeros(count, max_new_tokens)], dim=1)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    cache = growing_cache(model.config, prompt_length + max_new_tokens) if cache is None else cache
    rows, alive = torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    current = input_ids
    for number in range(max_new_tokens):
        length = prompt_length + number
        logits = (
            model(
                input_ids=current,
                attention_mask=mask[:, :length] if padded else None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )  # (rows, vocabulary)
        base, candidates = logits.topk(candidate_count)  # (rows, K)
        uncertainty = entropy(base)
        steered, kl, opened = base, torch.zeros_like(uncertainty), torch.zeros_like(alive)
        if responses.session:
            opened = steering.gate.opens(Step(number, uncertainty, logits, row_keys)) & alive
            where = opened.nonzero().squeeze(1)
            if len(where):
                values = responses.session.score(rows[where], candidates[where]).to(device)
                check_values(values, rows[where], numbers, number)
                tilted = drop_improbable(tilt(base[where], values, steering.beta), base[where], steering.min_probability)
                steered = base.index_copy(0, where, tilted)
                kl[where] = kl_divergence(tilted, base[where])
        noise = sampling.gumbel(row_keys, number, candidates)
        seen = (ids[:, :length], candidates, logits.shape[1], alive)
        base_token = _pick(_processed(process, base, *seen), candidates, noise, temperature)
        token = base_token if steered is base else _pick(_processed(process, steered, *seen), candidates, noise, temperature)
        ids[:, length] = token
        ended = torch.isin(token, stops)
        done = ended | stop(ids[:, : length + 1]) if stop else ended
        step = (x[alive] for x in (token, uncertainty, opened, base_token, kl))
        responses.record(rows[alive], number, *step, ended[alive])
        alive = alive & ~done
        left = int(alive.sum())
        if left == 0:
            break
        current, positions = token[:, None], positions[:, -1:] + 1
        if left <= COMPACT_BELOW * len(alive):
            keep = alive.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, alive, row_keys, current, positions, mask, ids = (x[keep] for x in (rows, alive, row_keys, current, positions, mask, ids))
    return responses


def _pick(scores: Tensor, candidates: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """The sampled token of each row, `(rows,)`."""
    return candidates.gather(1, sampling.choose(scores, noise, temperature)[:, None]).squeeze(1)


def _processed(process: Process | None, scores: Tensor, ids: Tensor, candidates: Tensor, vocabulary: int, alive: Tensor) -> Tensor:
    """Candidate scores `(rows, K)` after the caller's logits processors, which see the whole vocabulary."""
    if process is None:
        return scores
    everywhere = scores.new_full((len(scores), vocabulary), -math.inf).scatter(1, candidates, scores)
    processed = process(ids, everywhere).gather(1, candidates)
    if bool(((processed == -math.inf).all(1) & alive).any()):
        raise ValueError(f"the logits processors ruled out all {scores.shape[1]} candidates of a row: ask for more candidates")
    return processed


def check(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    value_prompts: Sequence[Sequence[int]],
    steering: Steering | None,
    numbers: Sequence[int],
) -> None:
    """What can be wrong before the first step, each in one sentence."""
    if len(value_prompts) != len(input_ids):
        raise ValueError(f"value_prompts must be one per row: expected {len(input_ids)}, got {len(value_prompts)}")
    lengths = attention_mask.sum(1).tolist()
    for number, length, value_prompt in zip(numbers, lengths, value_prompts, strict=True):
        if length == 0 or len(value_prompt) == 0:
            raise ValueError(f"a prompt needs at least one token, prompt {number} has none")
    if not bool(attention_mask[:, -1].all()):
        raise ValueError('prompts must be padded on the left (tokenizer.padding_side = "left"), got padding on the right')
    vocabulary = model.config.get_text_config().vocab_size
    highest = max(int(input_ids.max()), *(max(prompt) for prompt in value_prompts))
    if highest >= vocabulary:
        raise ValueError(f"token ids must be below the vocabulary of {vocabulary} tokens, got {highest}")
    candidates = steering.candidates if steering else DEFAULT_CANDIDATES
    if candidates > vocabulary:
        raise ValueError(f"candidates must be at most the vocabulary of {vocabulary} tokens, got {candidates}")
    if steering and steering.scorer is not None and steering.scorer.vocabulary_size != vocabulary:
        raise ValueError(
            f"model and scorer must share a vocabulary: the model has {vocabulary} tokens, the scorer {steering.scorer.vocabulary_size}"
        )


def check_values(values: Tensor, rows: Tensor, numbers: Sequence[int], step: int) -> None:
    """NaN or infinite values would silently decide the token."""
    if not bool(values.isfinite().all()):
        wrong = int((~values.isfinite()).any(1).nonzero()[0, 0])
        raise FloatingPointError(f"values must be finite, got NaN or infinity at step {step} of prompt {numbers[int(rows[wrong])]}")


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | Sequence[Sequence[int]], what: str) -> list[list[int]]:
    """Token ids without padding; ids pass through. Errors: ValueError for an empty prompt."""
    bos = tokenizer.bos_token
    ids = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            special = not (bos and prompt.startswith(bos))
            prompt = tokenizer(prompt, add_special_tokens=special).input_ids if prompt else []
        if not len(prompt):
            raise ValueError(f"a {what} needs at least one token, number {i} is empty")
        ids.append(list(prompt))
    return ids


def pad_left(ids: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, both `(rows, longest)`."""
    longest = max(len(row) for row in ids)
    input_ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    return input_ids, mask


def eos_token_ids(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> list[int]:
    """Every token that ends a response: of the generation config, and of the tokenizer."""
    configured = config.eos_token_id
    ids = set(configured if isinstance(configured, (list, tuple)) else [configured])
    if tokenizer is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(token for token in ids if token is not None)
