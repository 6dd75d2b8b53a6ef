"""Steering inside transformers: `model.generate(custom_generate=SteeredGenerate(steering), …)`."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
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

UNSUPPORTED_OUTPUTS = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
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

    transformers prepares everything as for its own sampling. Its logits processors (temperature,
    top-p, …) come after the tilt; on steered steps they are called twice, the second time about
    the base scores, for the token that would have been picked unsteered.

    transformers keeps `tokenizer`, `streamer` and `assistant_model` of a `generate` call from any
    callable: give the first two here instead; there is no speculative decoding.

    Attributes:
        steering: What to steer with; None samples from the top candidates of the model alone.
        candidates: K without a steering, 10 by default.
        seed: Seed of the noise; None draws it from torch's generator, so that `torch.manual_seed`
            decides. Further rows with the same prompt (`num_return_sequences`) get seed + 1,
            seed + 2, …. A list has one seed per row.
        tokenizer: Of the model, for `stop_strings` and for the text of the generations.
        streamer: Receives the prompt, then each token, as transformers' streamers do.
        stop_strings: Texts that end a response.
        value_prompts: Token ids of the prompts in the value model's own template, one per row.
        observe: Signals to keep in the generations besides those of the gate.
    """

    steering: Steering | None = None
    _: KW_ONLY
    candidates: int | None = None
    seed: int | Sequence[int] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    streamer: BaseStreamer | None = None
    stop_strings: str | Sequence[str] = ()
    value_prompts: Sequence[Sequence[int]] | None = None
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
            stop_strings: Those of the `generate` call, besides the object's own.
            **model_kwargs: Attention mask and what else transformers hands on.

        Returns:
            `SteeredOutput` with `return_dict_in_generate=True`, else sequences `(rows, length)`.
        """
        check_generation_config(generation_config)
        attention_mask = checked_mask(input_ids, model_kwargs)
        prompts = [
            row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)
        ]
        # the loop itself sees to the end and to the length
        lengths = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        ends = [c.eos_token_id for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        max_new_tokens = min(lengths, default=generation_config.max_length) - input_ids.shape[1]
        pad_token = generation_config.pad_token_id or 0
        criteria = self._further_criteria(stopping_criteria, stop_strings)
        device, streamer = input_device(model), self.streamer
        decoding = Decoding(
            model,
            input_ids.to(device),
            attention_mask.to(device),
            steering=self.steering,
            candidates=self.candidates,
            row_keys=_sampling.prompt_keys(prompts, row_seeds(prompts, self.seed), device),
            value_prompts=prompts if self.value_prompts is None else self.value_prompts,
            max_new_tokens=max_new_tokens,
            temperature=1.0 if generation_config.do_sample else 0.0,
            stop_tokens=[token for tokens in ends for token in tokens.tolist()],
            observe=self.observe,
            hooks=Hooks(
                process=self._effective_processors(logits_processor),
                stop=(lambda ids: criteria(ids, None)) if criteria else None,
                stream=(lambda tokens: streamer.put(tokens.cpu())) if streamer else None,
                pad_token=pad_token,
            ),
        )
        if streamer:
            streamer.put(input_ids.cpu())
        decoding.run(max_new_tokens)
        if streamer:
            streamer.end()
        sequences = decoding.responses.sequences(decoding.prompts, pad_token).to(input_ids.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        return SteeredOutput(sequences, decoding.generations(self.tokenizer))

    def _effective_processors(
        self, processors: LogitsProcessorList
    ) -> Callable[..., Tensor] | None:
        """Leave out a top-k that keeps all K candidates, as transformers' default of 50 does."""
        count = candidate_count(self.steering, self.candidates)
        kept = [p for p in processors if type(p) is not TopKLogitsWarper or p.top_k < count]
        process: Callable[..., Tensor] = LogitsProcessorList(kept)
        return process if kept else None

    def _further_criteria(
        self, criteria: StoppingCriteriaList, stop_strings: str | Sequence[str]
    ) -> StoppingCriteriaList:
        """Return the criteria that the loop does not see to itself, stop strings included."""
        built_in = EosTokenCriteria | MaxLengthCriteria
        further = StoppingCriteriaList(c for c in criteria if not isinstance(c, built_in))
        texts: list[str] = []
        for given in (self.stop_strings, stop_strings):
            texts += [given] if isinstance(given, str) else given
        if not texts:
            return further
        if self.tokenizer is None:
            raise ValueError(
                "stop strings need the tokenizer: expected "
                f"custom_generate=SteeredGenerate(steering, tokenizer=tokenizer, "
                f"stop_strings={texts}), got no tokenizer (transformers hands none to a callable)"
            )
        return StoppingCriteriaList([*further, StopStringCriteria(self.tokenizer, texts)])


def steered_generate(
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


def row_seeds(prompts: Sequence[Sequence[int]], seed: int | Sequence[int] | None) -> list[int]:
    """Return a seed per row: seed, seed + 1, … for rows that share a prompt."""
    if seed is None:
        seed = int(torch.randint(2**62, (1,)))
    if isinstance(seed, int):
        repeats = Counter[tuple[int, ...]]()
        return [seed + count_before(repeats, prompt) for prompt in prompts]
    if len(seed) != len(prompts):
        raise ValueError(
            f"seed must be one number, or one for each of the {len(prompts)} rows, got {len(seed)}"
        )
    return list(seed)


def count_before(repeats: Counter[tuple[int, ...]], prompt: Sequence[int]) -> int:
    """Return how often the prompt was counted before, and count it."""
    repeats[tuple(prompt)] += 1
    return repeats[tuple(prompt)] - 1


def checked_mask(input_ids: Tensor, model_kwargs: Mapping[str, Any]) -> Tensor:
    """Return the attention mask `(rows, length)`, after refusing inputs that would be ignored."""
    given = {name: value for name, value in model_kwargs.items() if value is not None}
    ignored = ", ".join(sorted(given.keys() - SUPPORTED_MODEL_KWARGS))
    cache = given.get("past_key_values", DynamicCache())
    own_cache = type(cache) is DynamicCache
    cached = cache.get_seq_length() if own_cache else 0
    _refuse(
        {
            f"does not know what to do with {ignored}": ignored != "",
            "needs input_ids of at least one token (inputs_embeds alone will not do)": (
                input_ids.shape[1] == 0
            ),
            f"keeps its own dynamic cache, got a {type(cache).__name__}": not own_cache,
            f"starts from an empty cache, got one with {cached} tokens": cached > 0,
        }
    )
    mask = given.get("attention_mask", torch.ones_like(input_ids))
    usual = (mask.cumsum(1) - 1).clamp(min=0)
    moved = not torch.equal(given.get("position_ids", usual) * mask, usual * mask)
    _refuse({"counts positions from the first token of each prompt, got other position_ids": moved})
    return mask


def check_generation_config(config: GenerationConfig) -> None:
    """Refuse settings of `generate` that this decoding does not have."""
    cache, guidance = config.cache_implementation, config.guidance_scale
    lookup = config.prompt_lookup_num_tokens
    refused = {
        f"samples or decodes greedily, got num_beams={config.num_beams}": config.num_beams > 1,
        f'keeps its own dynamic cache, got cache_implementation="{cache}"': (
            cache not in (None, "dynamic")
        ),
        f"has no classifier-free guidance, got guidance_scale={guidance}": (
            guidance not in (None, 1)
        ),
        f"does not speculate, got prompt_lookup_num_tokens={lookup}": lookup is not None,
    }
    for name in UNSUPPORTED_OUTPUTS if config.return_dict_in_generate else ():
        requested = bool(vars(config).get(name))
        refused[f"returns sequences and generations, got {name}=True"] = requested
    _refuse(refused)


def _refuse(reasons: Mapping[str, bool]) -> None:
    """Raise ValueError with the first of these reasons that holds."""
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"steered_generate {reason}")
