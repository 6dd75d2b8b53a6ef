"""Steering inside transformers: `model.generate(custom_generate=SteeredGenerate(steering), …)`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from inspect import unwrap
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from sia import _sampling
from sia._decoding import Decoding
from sia._hooks import OWN_CACHE, Hooks, check_generation_config, refuse_if
from sia._inputs import prompt_ids
from sia._kv_cache import check_float64, check_model, input_device
from sia._numbers import python_value, row_numbers
from sia.batch import Prompts, padding_token, template_tokenizers
from sia.generation import Generation
from sia.signals import Signal
from sia.steering import Steering, candidate_count

# arguments of generate that transformers keeps from callables, and what to do instead
WITHHELD = {
    "streamer": "takes a streamer as SteeredGenerate(steering, streamer=streamer)",
    "assistant_model": "does not speculate",
    "negative_prompt_ids": "has no classifier-free guidance",
    "synced_gpus": "does not wait for other processes (ZeRO stage 3, sharded weights)",
}
SUPPORTED_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}


@dataclass
class SteeredOutput(ModelOutput):
    """Result of a steered `generate` with `return_dict_in_generate=True`.

    Attributes:
        sequences: Prompts and responses, `(rows, length)`, padded on the right.
        generations: One `Generation` per row; their text is None without a tokenizer.
    """

    sequences: Tensor | None = None
    generations: list[Generation] | None = None


@dataclass(frozen=True)
class SteeredGenerate:
    """A decoding method for transformers: `model.generate(custom_generate=SteeredGenerate(…), …)`.

    transformers prepares everything as for its own sampling. Logits processors (penalties,
    grammars, watermarks, those of the caller) decide what the candidates are; warpers (temperature,
    top-p, …) come after the tilt.

    transformers keeps `tokenizer`, `streamer` and `assistant_model` of a `generate` call from any
    callable: give the first two here instead; there is no speculative decoding.

    Attributes:
        steering: What to steer with; None samples from the top candidates of the model alone.
        candidates: K without a steering, 10 by default.
        seed: Seed of the noise; None draws it from torch's generator, so that `torch.manual_seed`
            decides. Further rows with the same prompt (`num_return_sequences`) get seed + 1,
            seed + 2, …. A list has one seed per row.
        tokenizer: Tokenizer of the model, for `stop_strings` and for the text of the generations.
        streamer: Receives the prompt, then each token, as transformers' streamers do.
        stop_strings: Texts that end a response.
        value_prompts: The prompts in the value model's own template, one per prompt or one per
            row: all that `sia.generate` takes, texts with a tokenizer, chats with one or with the
            value model's own.
        observe: Signals to keep in the generations besides those of the gate.
    """

    steering: Steering | None = None
    _: KW_ONLY
    candidates: int | None = None
    seed: int | Sequence[int] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    streamer: BaseStreamer | None = None
    stop_strings: str | Sequence[str] = ()
    value_prompts: Prompts | None = None
    observe: Sequence[Signal] = ()

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        stop_strings: str | Sequence[str] = (),
        **model_kwargs: Any,
    ) -> SteeredOutput | Tensor:
        """Decode; called by `model.generate`.

        Args:
            model: The language model.
            input_ids: Prompts padded on the left, `(rows, length)`.
            logits_processor: Processors that transformers prepared.
            stopping_criteria: Criteria that transformers prepared.
            generation_config: Settings of `generate`.
            stop_strings: Stop strings of the `generate` call, besides the object's own.
            **model_kwargs: Attention mask and what else transformers hands on.

        Returns:
            `SteeredOutput` with `return_dict_in_generate=True`, else sequences `(rows, length)`.
        """
        check_model(model)
        check_float64(model)
        _refuse_withheld()
        refuse_if(
            _mixes_adapters(model), "applies the active adapter to all rows, got adapter_names"
        )
        of_checkpoint = model.generation_config.cache_implementation
        if (
            of_checkpoint not in OWN_CACHE
            and of_checkpoint == generation_config.cache_implementation
        ):
            # says how to decode fast, not what: the cache that transformers has made is not used
            generation_config.cache_implementation = None
            model_kwargs.pop("past_key_values", None)
        check_generation_config(generation_config)
        attention_mask = checked_mask(input_ids, model_kwargs)
        prompts = [
            row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        # the loop itself sees to the end and to the length
        lengths = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        ends = [c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        longest = min(lengths, default=generation_config.max_length)
        max_new_tokens = max(longest - input_ids.shape[1], 1)  # criteria are asked after a token
        device, streamer = input_device(model), self.streamer
        hooks = Hooks.prepared(
            logits_processor,
            StoppingCriteriaList([*stopping_criteria, *self._stop_criteria(stop_strings)]),
            generation_config,
            candidate_count(self.steering, self.candidates),
            (lambda tokens: streamer.put(tokens.cpu())) if streamer else None,
        )
        decoding = Decoding(
            model,
            input_ids.to(device),
            attention_mask.to(device),
            steering=self.steering,
            candidates=self.candidates,
            prompt_keys=_sampling.prompt_keys(prompts, row_seeds(prompts, self.seed), device),
            value_prompts=self._value_prompts(prompts, model, generation_config),
            max_new_tokens=max_new_tokens,
            stop_tokens=[token for tokens in ends for token in tokens.tolist()],
            observe=self.observe,
            hooks=hooks,
            tokenizer=self.tokenizer,
        )
        if streamer:
            streamer.put(input_ids.cpu())
        decoding.run(max_new_tokens)
        if streamer:
            streamer.end()
        sequences = decoding.responses.sequences(decoding.prompts, hooks.pad_token)
        sequences = sequences.to(input_ids.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        return SteeredOutput(sequences, decoding.generations(self.tokenizer))

    def _value_prompts(
        self, prompts: list[list[int]], model: PreTrainedModel, config: GenerationConfig
    ) -> list[list[int]]:
        """Return the token ids of the prompts as the scorer reads them, one per row."""
        if self.value_prompts is None:
            return prompts
        padding = padding_token(model, self.tokenizer)
        writers = template_tokenizers(self.steering)
        ids = prompt_ids(self.value_prompts, "value prompt", self.tokenizer, padding, writers)
        samples = config.num_return_sequences or 1
        if len(ids) * samples != len(prompts):
            return ids
        return [row for row in ids for _ in range(samples)]

    def _stop_criteria(self, stop_strings: str | Sequence[str]) -> list[StopStringCriteria]:
        """Return a criterion for the stop strings, the object's own and those of the call."""
        texts: list[str] = []
        for given in (self.stop_strings, stop_strings):
            texts += [given] if isinstance(given, str) else given
        if not texts:
            return []
        if self.tokenizer is None:
            raise ValueError(
                "stop strings need the tokenizer: expected "
                f"custom_generate=SteeredGenerate(steering, tokenizer=tokenizer, "
                f"stop_strings={texts}), got no tokenizer (transformers hands none to a callable)"
            )
        return [StopStringCriteria(self.tokenizer, texts)]


def steered_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    steering: Steering | None = None,
    candidates: int | None = None,
    seed: int | Sequence[int] | None = None,
    value_prompts: Prompts | None = None,
    observe: Sequence[Signal] = (),
    stop_strings: str | Sequence[str] = (),
    **model_kwargs: Any,
) -> SteeredOutput | Tensor:
    """Decode as `SteeredGenerate` does, with its settings as arguments of `generate`.

    The call is `model.generate(**inputs, custom_generate=steered_generate, steering=steering, …)`.
    For a tokenizer, streamer or stop strings use `SteeredGenerate`: transformers keeps them from a
    callable.
    """
    decode = SteeredGenerate(
        steering, candidates=candidates, seed=seed, value_prompts=value_prompts, observe=observe
    )
    return decode(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        stop_strings,
        **model_kwargs,
    )


@contextmanager
def taken_stop_strings(*configs: GenerationConfig | None) -> Iterator[Sequence[str]]:
    """Take the stop strings out of generation configs, and return those of the first that has any.

    transformers would ask for the tokenizer, which it hands to no callable.
    """
    given = [config for config in configs if config is not None]
    texts = [config.stop_strings for config in given]
    for config in given:
        config.stop_strings = None
    try:
        yield next(filter(None, texts), ())
    finally:
        for config, text in zip(given, texts, strict=True):
            config.stop_strings = text


def row_seeds(prompts: Sequence[Sequence[int]], seed: int | Sequence[int] | None) -> list[int]:
    """Return a seed per row: seed, seed + 1, … for rows that share a prompt."""
    seed = python_value(seed)
    if seed is None:
        seed = int(torch.randint(2**62, (1,), device="cpu"))
    seeds = row_numbers("seed", seed, len(prompts), "rows")
    if not isinstance(seed, int):
        return seeds
    repeats = Counter[tuple[int, ...]]()
    return [number + count_before(repeats, row) for number, row in zip(seeds, prompts, strict=True)]


def count_before(repeats: Counter[tuple[int, ...]], prompt: Sequence[int]) -> int:
    """Return how often the prompt was counted before, and count it."""
    repeats[tuple(prompt)] += 1
    return repeats[tuple(prompt)] - 1


def checked_mask(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> Tensor:
    """Return the attention mask `(rows, length)`, after refusing inputs that would be ignored."""
    given = {name: value for name, value in model_kwargs.items() if not _is_blank(name, value)}
    ignored = ", ".join(sorted(given.keys() - SUPPORTED_MODEL_KWARGS))
    cache = given.get("past_key_values", DynamicCache())
    own_cache = type(cache) is DynamicCache
    cached = cache.get_seq_length() if own_cache else 0
    refuse_if(ignored != "", f"does not know what to do with {ignored}")
    embeds = "needs input_ids of at least one token (inputs_embeds alone will not do)"
    refuse_if(input_ids.shape[1] == 0, embeds)
    refuse_if(not own_cache, f"keeps its own dynamic cache, got a {type(cache).__name__}")
    refuse_if(cached > 0, f"starts from an empty cache, got one with {cached} tokens")
    mask = given.get("attention_mask", torch.ones_like(input_ids))
    usual = (mask.cumsum(1) - 1).clamp(min=0)
    # multimodal models number height and width too, which are alike in texts
    moved = bool(((given.get("position_ids", usual) - usual) * mask).any())
    positions = "counts positions from the first token of each prompt, got other position_ids"
    refuse_if(moved, positions)
    return mask


def _is_blank(name: str, value: object) -> bool:
    """Return whether an argument says nothing, as those that multimodal models add to a text."""
    if isinstance(value, Tensor):
        return name.endswith("token_type_ids") and not bool(value.any())
    return value is None or value == {}


def _refuse_withheld() -> None:
    """Refuse arguments of the running `generate` call that transformers keeps from callables.

    They stand in its frame alone.
    """
    code = unwrap(GenerationMixin.generate).__code__
    frames = (frame for frame, _ in walk_stack(None) if frame.f_code is code)
    caller = next(frames, None)
    if caller is not None:
        for name, instead in WITHHELD.items():
            value = caller.f_locals.get(name)
            refuse_if(value is not None and value is not False, f"{instead}, got {name}")


def _mixes_adapters(model: PreTrainedModel) -> bool:
    """Return whether PEFT's generate was given `adapter_names`, an adapter for each row.

    Hooks of the layers hold them, as many as there are rows at first; ended rows leave the batch.
    """
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(hook, partial) and "adapter_names" in hook.keywords for hook in hooks)
