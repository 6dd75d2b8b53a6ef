"""Lists of prompts in, lists of generations out: `generate`, and what it shares with the searches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia import _sampling
from sia._decoding import Decoding
from sia._inputs import eos_token_ids, pad_left
from sia._kv_cache import input_device
from sia.generation import Generation
from sia.signals import Signal
from sia.steering import Steering

Prompts = Sequence[str] | Sequence[Sequence[int]]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    steering: Steering | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_size: int = 64,
    value_prompts: Prompts | None = None,
    progress: bool = True,
    observe: Sequence[Signal] = (),
) -> list[Generation]:
    """One response per prompt, in the order given.

    prompts: texts, or token ids. Texts get the tokenizer's special tokens unless they begin with its BOS token already,
        as chat templates write it.
    steering: None samples from the top 10 candidates of the model alone.
    temperature: 0 is greedy. It divides the logits after the tilt.
    seed: with the prompt it decides the noise: the same prompt and seed give the same response in any batch. A list has one
        for each prompt: repeat a prompt under other seeds for further samples of it.
    value_prompts: the prompts in the value model's own template; by default the same token ids.
    observe: signals (`Entropy("vocabulary")`, `Attention()`) that the generations keep for `calibrate`, besides those of the gate.

    Errors: ValueError for an empty prompt, a token or K beyond the vocabulary, vocabularies of different sizes, numbers out of
    range; FloatingPointError where a value is NaN or infinite.
    """
    check_options(prompts, temperature, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if isinstance(tokenizer, PreTrainedModel):
        raise TypeError(
            "generate(model, tokenizer, …) takes the model first, got a model as the tokenizer"
        )
    ids, value_ids = prompt_ids(tokenizer, prompts, value_prompts, "value")
    seeds = [seed] * len(ids) if isinstance(seed, int) else seed
    if len(seeds) != len(ids):
        raise ValueError(
            f"seed must be one number, or one for each of the {len(ids)} prompts, got {len(seeds)}"
        )
    generations: list[Generation | None] = [None] * len(ids)
    for chunk in batches(ids, batch_size, "generate", progress):
        decoding = begin(
            model,
            tokenizer,
            ids,
            value_ids,
            chunk,
            steering,
            max_new_tokens,
            temperature,
            seeds,
            observe=observe,
        )
        decoding.run(max_new_tokens)
        for i, generation in zip(chunk, decoding.generations(tokenizer), strict=True):
            generations[i] = generation
    return generations


def batches(
    ids: Sequence[Sequence[int]], batch_size: int, description: str, progress: bool
) -> Iterator[list[int]]:
    """Numbers of the prompts to decode together, of like length for little padding; the progress bar counts those that are done."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with tqdm(total=len(ids), desc=description, unit="prompt", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            yield chunk
            bar.update(len(chunk))


def begin(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    value_ids: Sequence[Sequence[int]],
    chunk: Sequence[int],
    steering: Steering | None,
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    samples: int = 1,
    observe: Sequence[Signal] = (),
) -> Decoding:
    """The decoding of those prompts whose numbers are in `chunk`. seeds: one for each prompt."""
    device = input_device(model)
    input_ids, attention_mask = pad_left([ids[i] for i in chunk], device)
    return Decoding(
        model,
        input_ids,
        attention_mask,
        steering=steering,
        row_keys=_sampling.prompt_keys([ids[i] for i in chunk], [seeds[i] for i in chunk], device),
        value_prompts=[value_ids[i] for i in chunk],
        numbers=chunk,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_tokens=eos_token_ids(model.generation_config, tokenizer.eos_token_id),
        samples=samples,
        observe=observe,
    )


def check_options(prompts: Prompts, temperature: float, **counts: int) -> None:
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, got a single text")
    _sampling.check_temperature(temperature)
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, other: Prompts | None, name: str
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of the same prompts in another model's template (`other`), by default the same."""
    if other is not None and len(other) != len(prompts):
        raise ValueError(
            f"{name}_prompts must be as many as prompts: expected {len(prompts)}, got {len(other)}"
        )
    ids = tokenize(tokenizer, prompts, "prompt")
    return ids, ids if other is None else tokenize(tokenizer, other, f"{name} prompt")


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, what: str) -> list[list[int]]:
    """Token ids without padding; ids pass through. Errors: ValueError for an empty prompt."""
    bos = tokenizer.bos_token
    ids = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            special = not (bos and prompt.startswith(bos))
            prompt = tokenizer(prompt, add_special_tokens=special).input_ids if prompt else []
        if isinstance(prompt, Tensor | np.ndarray):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or not all(
            isinstance(token, int | np.integer) for token in prompt
        ):
            given = (
                "a list of other things" if isinstance(prompt, Sequence) else type(prompt).__name__
            )
            raise TypeError(
                f"a {what} must be a text or a list of token ids (apply chat templates first), number {i} is {given}"
            )
        if not len(prompt):
            raise ValueError(f"a {what} needs at least one token, number {i} is empty")
        ids.append(list(prompt))
    return ids
