"""`generate`: a list of prompts in, a list of generations out. The searches share its helpers."""

from collections.abc import Iterator, Sequence
from typing import Any

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
    *,
    candidates: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_size: int = 64,
    value_prompts: Prompts | None = None,
    progress: bool = True,
    observe: Sequence[Signal] = (),
) -> list[Generation]:
    """Return one response per prompt, in the order given.

    Args:
        model: The language model, decoder-only.
        tokenizer: Its tokenizer.
        prompts: Texts or token ids. Texts get the tokenizer's special tokens unless they begin
            with its BOS token already, as chat templates write it.
        steering: What to steer with; None samples from the top candidates of the model alone.
        candidates: K without a steering, 10 by default. A steering has its own.
        max_new_tokens: Longest response.
        temperature: Divides the logits after the tilt; 0 is greedy.
        seed: Together with the prompt it decides the noise: the same prompt and seed give the same
            response in any batch. A list has one seed per prompt: repeat a prompt under other
            seeds for further samples of it.
        batch_size: Number of responses that are decoded together.
        value_prompts: The prompts in the value model's own template; by default the same token ids.
        progress: Whether to show a progress bar.
        observe: Signals (`Entropy("vocabulary")`, `Attention()`) that the generations keep for
            `calibrate`, besides those of the gate.

    Raises:
        ValueError: For an empty prompt, a token or K beyond the vocabulary, vocabularies of
            different sizes, and numbers out of range.
        FloatingPointError: If a value is NaN or infinite.
    """
    check_options(prompts, temperature, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if isinstance(tokenizer, PreTrainedModel):
        raise TypeError(
            "generate(model, tokenizer, …) takes the model first, got a model as the tokenizer"
        )
    ids = tokenize(tokenizer, prompts, "prompt")
    value_ids = tokenize_template(tokenizer, value_prompts, "value", ids)
    seeds = [seed] * len(ids) if isinstance(seed, int) else seed
    if len(seeds) != len(ids):
        raise ValueError(
            f"seed must be one number, or one for each of the {len(ids)} prompts, got {len(seeds)}"
        )
    generations: dict[int, Generation] = {}
    for indices in batches(ids, batch_size, "generate", progress):
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
            observe=observe,
        )
        decoding.run(max_new_tokens)
        generations |= zip(indices, decoding.generations(tokenizer), strict=True)
    return [generations[i] for i in range(len(ids))]


def batches(
    ids: Sequence[Sequence[int]], batch_size: int, description: str, progress: bool
) -> Iterator[list[int]]:
    """Yield the indices of prompts to decode together, of like length for little padding."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with tqdm(total=len(ids), desc=description, unit="prompt", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices
            bar.update(len(indices))


def start_decoding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    value_ids: Sequence[Sequence[int]],
    indices: Sequence[int],
    seeds: Sequence[int],
    **settings: Any,
) -> Decoding:
    """Prepare the decoding of the prompts at `indices`; settings as of `Decoding`."""
    device = input_device(model)
    prompts = [ids[i] for i in indices]
    input_ids, attention_mask = pad_left(prompts, device)
    return Decoding(
        model,
        input_ids,
        attention_mask,
        row_keys=_sampling.prompt_keys(prompts, [seeds[i] for i in indices], device),
        value_prompts=[value_ids[i] for i in indices],
        prompt_indices=indices,
        stop_tokens=eos_token_ids(model.generation_config, tokenizer.eos_token_id),
        **settings,
    )


def check_options(prompts: Prompts, temperature: float, **counts: int) -> None:
    """Check that prompts are a list, the temperature is in range and the counts are at least 1."""
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts, got a single text")
    _sampling.check_temperature(temperature)
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def tokenize_template(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts | None,
    name: str,
    default: list[list[int]],
) -> list[list[int]]:
    """Return token ids of the prompts in another model's template; None stands for `default`."""
    if prompts is None:
        return default
    if len(prompts) != len(default):
        raise ValueError(
            f"{name}_prompts must be as many as prompts: expected {len(default)}, "
            f"got {len(prompts)}"
        )
    return tokenize(tokenizer, prompts, f"{name} prompt")


def tokenize(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, name: str) -> list[list[int]]:
    """Return token ids without padding; ids pass through.

    Raises:
        TypeError: If a prompt is neither a text nor token ids.
        ValueError: If a prompt is empty.
    """
    rows = []
    for index, prompt in enumerate(prompts):
        ids = token_ids(tokenizer, prompt)
        if ids is None:
            kind = type(prompt).__name__
            given = "a list of other things" if isinstance(prompt, Sequence) else kind
            raise TypeError(
                f"a {name} must be a text or a list of token ids (apply chat templates first), "
                f"number {index} is {given}"
            )
        if not ids:
            raise ValueError(f"a {name} needs at least one token, number {index} is empty")
        rows.append(ids)
    return rows


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int] | None:
    """Return the token ids of a text, list, array or tensor; None if it is something else."""
    if isinstance(prompt, str):
        bos = tokenizer.bos_token
        special = not (bos and prompt.startswith(bos))
        return list(tokenizer(prompt, add_special_tokens=special).input_ids) if prompt else []
    ids = prompt.tolist() if isinstance(prompt, Tensor | np.ndarray) else prompt
    if not isinstance(ids, Sequence) or not all(isinstance(i, int | np.integer) for i in ids):
        return None
    return list(ids)
