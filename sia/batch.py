"""`generate`: a list of prompts in, a list of generations out. The searches share its helpers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from sia._checks import check_prompts
from sia._decoding import Decoding
from sia._hooks import checkpoint_hooks
from sia._inputs import TextDecoder, eos_token_ids, pad_left, prompt_ids
from sia._kv_cache import check_decoder, check_float64, check_model, input_device, rotary_switch
from sia._numbers import row_numbers, whole_number
from sia._padding import follows_padding
from sia._sampling import check_temperature, prompt_keys
from sia.generation import Generation
from sia.scorers.base import Scorer, known_tokenizers
from sia.signals import Signal
from sia.steering import Steering, candidate_count

Chat = Sequence[Mapping[str, Any]]
Prompts = (
    Sequence[str]
    | Sequence[Chat]
    | Sequence[Sequence[int]]
    | Tensor
    | np.ndarray
    | Mapping[str, Any]
)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    steering: Steering | None = None,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    *,
    candidates: int | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 64,
    value_prompts: Prompts | None = None,
    progress: bool = True,
    observe: Sequence[Signal] = (),
) -> list[Generation]:
    """Return one response per prompt, in the order given.

    All else that the model's `generation_config` says is heeded as by `model.generate`: penalties
    and suppressed tokens before the candidates are chosen, top-p and the like after the tilt.

    Args:
        model: The language model, decoder-only.
        tokenizer: Its tokenizer. For prompts of token ids, one of another library will do that has
            `decode` and `eos_token_id`.
        prompts: Texts, chats (lists of messages) or token ids, or what a tokenizer or its chat
            template returns: a mapping with `input_ids` and `attention_mask`. Texts get the
            tokenizer's special tokens unless they begin with its BOS token already.
        steering: What to steer with; None samples from the top candidates of the model alone.
        max_new_tokens: Longest response.
        temperature: Divides the logits after the tilt; 0 is greedy. None for that of the model's
            `generation_config`, 1 by default.
        candidates: K without a steering, 10 by default. A steering has its own.
        seed: Together with the prompt it decides the noise: the same prompt and seed give the same
            response in any batch. A list has one seed per prompt: repeat a prompt under other
            seeds for further samples of it.
        batch_size: Number of responses that are decoded together.
        value_prompts: The prompts in the value model's own template; by default the same token ids.
            Chats are written in the template of the tokenizer that the value model was loaded
            with or, if it has none, of `tokenizer`.
        progress: Whether to show a progress bar.
        observe: Signals (`Entropy("vocabulary")`, `Attention()`) that the generations keep for
            `calibrate`, besides those of the gate.

    Raises:
        TypeError: For prompts of another kind.
        ValueError: For an empty prompt, a token or K beyond the vocabulary, vocabularies that do
            not fit together, numbers out of range, and settings of the `generation_config` that
            steering does not have (beams).
        FloatingPointError: If a value is NaN or infinite.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    ids = read_prompts(model, tokenizer, prompts)
    value_ids = read_template(model, tokenizer, value_prompts, "value", ids, steering)
    seeds = row_numbers("seed", seed, len(ids), "prompts")
    check_prompts(model, tokenizer, ids, value_ids, steering, candidates, max_new_tokens)
    generations: dict[int, Generation] = {}
    for indices in batches(model, ids, max_new_tokens, batch_size, "generate", progress):
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
        decoding.run(decoding.max_new_tokens)
        generations |= zip(indices, decoding.generations(tokenizer), strict=True)
    return [generations[i] for i in range(len(ids))]


def batches(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    description: str,
    progress: bool,
) -> Iterator[list[int]]:
    """Yield the indices of prompts to decode together, sorted by length to reduce padding.

    All prompts of a batch have one length where rotary frequencies may change during decoding, and
    where padding moves positions.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with tqdm(total=len(ids), desc=description, unit="prompt", disable=not progress) as bar:
        while order:
            shortest = len(ids[order[0]])
            indices = order[:batch_size]
            longest = len(ids[indices[-1]]) + max_new_tokens
            padded = len(ids[indices[-1]]) > shortest
            moved = rotary_switch(model, shortest, longest) is not None
            if moved or (padded and not follows_padding(model)):
                indices = [i for i in indices if len(ids[i]) == shortest]
            order = order[len(indices) :]
            yield indices
            bar.update(len(indices))


def start_decoding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    value_ids: Sequence[Sequence[int]],
    indices: Sequence[int],
    seeds: Sequence[int],
    *,
    steering: Steering | None = None,
    candidates: int | None = None,
    max_new_tokens: int,
    temperature: float | None = None,
    samples: int = 1,
    **settings: Any,
) -> Decoding:
    """Prepare the decoding of the prompts at `indices`; settings as of `generate` or `Decoding`."""
    check_decoder(model)
    count = candidate_count(steering, candidates)
    device = input_device(model)
    prompts = [ids[i] for i in indices]
    input_ids, attention_mask = pad_left(prompts, device)
    ends = stop_tokens(model, tokenizer)
    hooks = checkpoint_hooks(
        model,
        tokenizer,
        input_ids,
        attention_mask,
        stop_tokens=ends,
        candidates=count,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=None if temperature is None else check_temperature(temperature),
    )
    return Decoding(
        model,
        input_ids,
        attention_mask,
        prompt_keys=prompt_keys(prompts, [seeds[i] for i in indices], device),
        value_prompts=[value_ids[i] for i in indices],
        prompt_indices=indices,
        stop_tokens=ends,
        steering=steering,
        candidates=candidates,
        max_new_tokens=max_new_tokens,
        samples=samples,
        hooks=hooks,
        tokenizer=tokenizer,
        **settings,
    )


def stop_tokens(model: PreTrainedModel, tokenizer: TextDecoder) -> list[int]:
    """Return the tokens that end a response: those of the checkpoint and of the tokenizer."""
    return eos_token_ids(model.generation_config, tokenizer.eos_token_id)


def read_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts
) -> list[list[int]]:
    """Return the token ids of prompts, without padding."""
    if isinstance(tokenizer, PreTrainedModel):
        raise TypeError(
            "generate(model, tokenizer, …) takes the model first, got a model as the tokenizer"
        )
    check_model(model)
    check_decoder(model)
    check_float64(model)
    if not isinstance(tokenizer, TextDecoder):
        inside = isinstance(tokenizer, ProcessorMixin)
        raise TypeError(
            f"tokenizer must be a tokenizer{', such as processor.tokenizer' * inside}, got a "
            f"{type(tokenizer).__name__}"
        )
    return prompt_ids(prompts, "prompt", tokenizer, padding_token(model, tokenizer))


def read_template(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts | None,
    name: str,
    default: list[list[int]],
    reader: Scorer | Steering | None,
) -> list[list[int]]:
    """Return token ids of the prompts as another model reads them; None stands for `default`."""
    if prompts is None:
        return default
    padding = padding_token(model, tokenizer)
    ids = prompt_ids(prompts, f"{name} prompt", tokenizer, padding, template_tokenizers(reader))
    if len(ids) != len(default):
        raise ValueError(
            f"{name}_prompts must be as many as prompts: expected {len(default)}, got {len(ids)}"
        )
    return ids


def template_tokenizers(reader: Scorer | Steering | None) -> list[PreTrainedTokenizerBase]:
    """Return the tokenizers of a scorer, or of that of a steering, that have a chat template."""
    scorer = reader.scorer if isinstance(reader, Steering) else reader
    known = () if scorer is None else known_tokenizers(scorer)
    return [tokenizer for tokenizer in known if tokenizer.chat_template]


def padding_token(model: PreTrainedModel, tokenizer: TextDecoder | None) -> int | None:
    """Return the token that pads prompts without a mask, unless it ends responses too.

    It is the model's, or the tokenizer's if the model has none.
    """
    config = model.generation_config
    token, ends = config.pad_token_id, eos_token_ids(config)
    if token is None and isinstance(tokenizer, PreTrainedTokenizerBase):
        token, ends = tokenizer.pad_token_id, stop_tokens(model, tokenizer)
    return None if token in ends else token
