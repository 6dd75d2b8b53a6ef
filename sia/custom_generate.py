"""The transformers way: `model.generate(**inputs, custom_generate=steered_generate, steering=steering, …)`."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
)
from transformers.generation.logits_process import TopKLogitsWarper
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from sia import sampling
from sia.batch import eos_token_ids
from sia.caching import input_device
from sia.decoding import DEFAULT_CANDIDATES, Decoding
from sia.gates import Signal
from sia.steering import Steering
from sia.trace import Generation

NOT_RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass
class SteeredOutput(ModelOutput):
    """sequences: prompt and response, `(rows, length)`, padded on the right. generations: a `Generation` per row."""

    sequences: Tensor | None = None
    generations: list[Generation] | None = None


class SteeredGenerate:
    """The callable `steered_generate`; its arguments are those of `__call__` after `generation_config`."""

    __name__ = "steered_generate"

    @property
    def __signature__(self) -> inspect.Signature:
        """What transformers asks for to know which arguments of `generate` to hand on.

        transformers 5 takes `tokenizer` and `streamer` out of the arguments before it asks, and drops them where the decoding
        method is a callable; it then refuses stop strings for want of a tokenizer, and a streamer waits for ever. So they are put
        back at the moment of asking.
        """
        asking = sys._getframe(1)
        while asking is not None and asking.f_code is not GenerationMixin._extract_generation_mode_kwargs.__code__:
            asking = asking.f_back
        if asking is not None:
            dropped = asking.f_locals["generation_mode_kwargs"]
            asking.f_locals["kwargs"].update({new: dropped[old] for old, new in HANDED_ON.items() if old in dropped})
        return inspect.signature(type(self).__call__.__get__(self))

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        steering: Steering | None = None,
        seed: int | None = None,
        value_prompts: Sequence[Sequence[int]] | None = None,
        observe: Sequence[Signal] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        token_streamer: BaseStreamer | None = None,
        **model_kwargs,
    ) -> SteeredOutput | Tensor:
        """transformers prepares everything as for its own sampling: its logits processors (temperature, top-p, …) come after the tilt.

        steering: None samples from the top 10 candidates of the model alone.
        seed: of the noise; by default drawn from torch's generator, so that `torch.manual_seed` decides, as in transformers.
            Further rows with the same prompt (`num_return_sequences`) get seed + 1, seed + 2, …
        value_prompts: token ids of the prompts in the value model's own template, one per row.
        observe: signals to keep in the generations besides those of the gate.
        tokenizer: of the model, for `stop_strings` and the `text` of the generations, which is None without it.
        token_streamer: what `generate` got as `streamer`.

        Returns `SteeredOutput` with `return_dict_in_generate=True`, else the sequences `(rows, length)`.
        """
        check_generation_config(generation_config)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and type(cache) is not DynamicCache:
            raise ValueError(f"steered_generate keeps its own dynamic cache, got a {type(cache).__name__}")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"steered_generate starts from an empty cache, got one with {cache.get_seq_length()} tokens")
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        if seed is None:
            seed = int(torch.randint(2**62, (1,)))
        seen: Counter[tuple[int, ...]] = Counter()
        seeds = []
        for prompt in prompts:
            seeds.append(seed + seen[tuple(prompt)])
            seen[tuple(prompt)] += 1
        max_new_tokens = generation_config.max_length - input_ids.shape[1]
        # a top-k that keeps all K candidates does nothing to them
        candidates = steering.candidates if steering else DEFAULT_CANDIDATES
        processors = [p for p in logits_processor if not (type(p) is TopKLogitsWarper and p.top_k >= candidates)]
        device = input_device(model)
        decoding = Decoding(
            model,
            input_ids.to(device),
            attention_mask.to(device),
            steering=steering,
            row_keys=sampling.prompt_keys(prompts, seeds, device),
            value_prompts=prompts if value_prompts is None else value_prompts,
            max_new_tokens=max_new_tokens,
            temperature=1.0 if generation_config.do_sample else 0.0,
            stop_tokens=eos_token_ids(generation_config),
            observe=observe,
            process=LogitsProcessorList(processors) if processors else None,
            stop=(lambda ids: stopping_criteria(ids, None)) if len(stopping_criteria) else None,
            stream=(lambda tokens: token_streamer.put(tokens.cpu())) if token_streamer else None,
        )
        decoding.run(max_new_tokens)
        if token_streamer:
            token_streamer.end()
        sequences = decoding.responses.sequences(decoding.prompts, generation_config.pad_token_id).to(input_ids.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        return SteeredOutput(sequences=sequences, generations=decoding.generations(tokenizer))


HANDED_ON = {"tokenizer": "tokenizer", "streamer": "token_streamer"}
steered_generate = SteeredGenerate()


def check_generation_config(config: GenerationConfig) -> None:
    """What is asked of `generate` and cannot be had from this decoding, each in one sentence."""
    if config.num_beams > 1:
        raise ValueError(f"steered_generate samples or decodes greedily, got num_beams={config.num_beams}")
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(f'steered_generate keeps its own dynamic cache, got cache_implementation="{config.cache_implementation}"')
    for name in NOT_RETURNED if config.return_dict_in_generate else ():
        if vars(config).get(name):
            raise ValueError(f"steered_generate returns sequences and generations, got {name}=True")
