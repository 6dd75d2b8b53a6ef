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
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import TopKLogitsWarper
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from sia import _sampling
from sia._decoding import Decoding, Hooks
from sia._kv_cache import input_device
from sia.generation import Generation
from sia.signals import Signal
from sia.steering import Steering, candidate_count

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
        while asking is not None and asking.f_code.co_name != "_extract_generation_mode_kwargs":
            asking = asking.f_back
        if asking is not None:
            dropped, arguments = (
                asking.f_locals.get(name, {}) for name in ("generation_mode_kwargs", "kwargs")
            )
            arguments.update(
                {new: dropped[old] for old, new in HANDED_ON.items() if old in dropped}
            )
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
        candidates: int | None = None,
        seed: int | Sequence[int] | None = None,
        value_prompts: Sequence[Sequence[int]] | None = None,
        observe: Sequence[Signal] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        token_streamer: BaseStreamer | None = None,
        assistant_model: PreTrainedModel | None = None,
        **model_kwargs,
    ) -> SteeredOutput | Tensor:
        """transformers prepares everything as for its own sampling: its logits processors (temperature, top-p, …) come after the tilt.
        At a steered step they are asked twice, once about the base scores, to know what would have been said unsteered.

        steering: None samples from the top 10 candidates of the model alone.
        seed: of the noise; by default drawn from torch's generator, so that `torch.manual_seed` decides, as in transformers.
            Further rows with the same prompt (`num_return_sequences`) get seed + 1, seed + 2, … A list has one for each row.
        value_prompts: token ids of the prompts in the value model's own template, one per row.
        observe: signals to keep in the generations besides those of the gate.
        tokenizer: of the model, for `stop_strings` and the `text` of the generations, which is None without it.
        token_streamer: what `generate` got as `streamer`. assistant_model: refused, as is everything else that would be ignored.

        Returns `SteeredOutput` with `return_dict_in_generate=True`, else the sequences `(rows, length)`.
        """
        check_generation_config(generation_config)
        given = {
            name
            for name, value in {**model_kwargs, "assistant_model": assistant_model}.items()
            if value is not None
        }
        if ignored := sorted(given - set(READ)):
            raise ValueError(f"steered_generate does not know what to do with {', '.join(ignored)}")
        if input_ids.shape[1] == 0:
            raise ValueError(
                "steered_generate needs input_ids of at least one token (inputs_embeds alone will not do)"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is not None and type(cache) is not DynamicCache:
            raise ValueError(
                f"steered_generate keeps its own dynamic cache, got a {type(cache).__name__}"
            )
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"steered_generate starts from an empty cache, got one with {cache.get_seq_length()} tokens"
            )
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = model_kwargs.get("position_ids")
        usual = (attention_mask.cumsum(1) - 1).clamp(min=0)
        if positions is not None and not torch.equal(
            positions * attention_mask, usual * attention_mask
        ):
            raise ValueError(
                "steered_generate counts positions from the first token of each prompt, got other position_ids"
            )
        prompts = [
            row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        if seed is None:
            seed = int(torch.randint(2**62, (1,)))
        seen: Counter[tuple[int, ...]] = Counter()
        seeds = [] if isinstance(seed, int) else list(seed)
        for prompt in prompts if isinstance(seed, int) else ():
            seeds.append(seed + seen[tuple(prompt)])
            seen[tuple(prompt)] += 1
        if len(seeds) != len(prompts):
            raise ValueError(
                f"seed must be one number, or one for each of the {len(prompts)} rows, got {len(seeds)}"
            )
        # a top-k that keeps all K candidates does nothing to them
        count = candidate_count(steering, candidates)
        processors = [
            p for p in logits_processor if not (type(p) is TopKLogitsWarper and p.top_k >= count)
        ]
        # the end and the length are seen to by the loop itself
        criteria = StoppingCriteriaList(
            c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)
        )
        lengths = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        max_new_tokens = min(lengths, default=generation_config.max_length) - input_ids.shape[1]
        device = input_device(model)
        decoding = Decoding(
            model,
            input_ids.to(device),
            attention_mask.to(device),
            steering=steering,
            row_keys=_sampling.prompt_keys(prompts, seeds, device),
            value_prompts=prompts if value_prompts is None else value_prompts,
            max_new_tokens=max_new_tokens,
            temperature=1.0 if generation_config.do_sample else 0.0,
            stop_tokens=[
                token
                for c in stopping_criteria
                if isinstance(c, EosTokenCriteria)
                for token in c.eos_token_id.tolist()
            ],
            observe=observe,
            candidates=candidates,
            hooks=Hooks(
                process=LogitsProcessorList(processors) if processors else None,
                stop=(lambda ids: criteria(ids, None)) if len(criteria) else None,
                stream=(lambda ids: token_streamer.put(ids.cpu())) if token_streamer else None,
                pad_token=generation_config.pad_token_id or 0,
            ),
        )
        decoding.run(max_new_tokens)
        if token_streamer:
            token_streamer.end()
        sequences = decoding.responses.sequences(
            decoding.prompts, generation_config.pad_token_id or 0
        ).to(input_ids.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        return SteeredOutput(sequences=sequences, generations=decoding.generations(tokenizer))


HANDED_ON = {
    "tokenizer": "tokenizer",
    "streamer": "token_streamer",
    "assistant_model": "assistant_model",
}
READ = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
steered_generate = SteeredGenerate()


def check_generation_config(config: GenerationConfig) -> None:
    """What is asked of `generate` and cannot be had from this decoding, each in one sentence."""
    if config.num_beams > 1:
        raise ValueError(
            f"steered_generate samples or decodes greedily, got num_beams={config.num_beams}"
        )
    if config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f'steered_generate keeps its own dynamic cache, got cache_implementation="{config.cache_implementation}"'
        )
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            f"steered_generate has no classifier-free guidance, got guidance_scale={config.guidance_scale}"
        )
    if config.prompt_lookup_num_tokens is not None:
        raise ValueError(
            f"steered_generate does not speculate, got prompt_lookup_num_tokens={config.prompt_lookup_num_tokens}"
        )
    for name in NOT_RETURNED if config.return_dict_in_generate else ():
        if vars(config).get(name):
            raise ValueError(f"steered_generate returns sequences and generations, got {name}=True")
