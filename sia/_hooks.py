"""Functions of the caller that take part in every step, as transformers prepares them.

Logits processors (penalties, grammars, suppressed tokens) decide what the K candidates are. Warpers
(temperature, top-k, top-p and the like) come after the tilt, and only see the candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from typing_extensions import override

# they look at scores alone, whatever tokens these belong to
WARPERS = (
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
)
OWN_CACHE = (None, "dynamic")
# settings of transformers' generate that steering does not have: what they mean, and how they look
# when they are off
UNSUPPORTED = {
    "num_beams": ("samples or decodes greedily", (None, 1)),
    "num_beam_groups": ("samples or decodes greedily", (None, 1)),
    "diversity_penalty": ("samples or decodes greedily", (None, 0)),
    "penalty_alpha": ("has no contrastive search", (None, 0)),
    "dola_layers": ("has no decoding by contrasting layers", (None,)),
    "constraints": ("has no constrained beam search", (None,)),
    "force_words_ids": ("has no constrained beam search", (None,)),
    "cache_implementation": ("keeps its own dynamic cache", OWN_CACHE),
    "guidance_scale": ("has no classifier-free guidance", (None, 1)),
    "prompt_lookup_num_tokens": ("does not speculate", (None,)),
    "assistant_early_exit": ("does not speculate", (None,)),
    "use_mtp": ("does not speculate", (None, False)),
    "speculation_type": ("does not speculate", (None,)),
    "is_assistant": ("does not speculate", (None, False)),
    "token_healing": ("does not heal tokens", (None, False)),
    "forced_bos_token_id": ("forces no first token", (None,)),
}
UNSUPPORTED_OUTPUTS = (
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)


@dataclass(frozen=True)
class Hooks:
    """Work of every step besides steering.

    All but `warp` see every row to the end, ended ones with `pad_token`, as in transformers.

    Attributes:
        process: Before the candidates are chosen: token ids so far `(rows, length)` and scores
            `(rows, vocabulary)` in, scores out.
        warp: After the tilt: None and scores of the candidates `(rows, K)` in, scores out.
        temperature: Divides the scores after that; 0 is greedy.
        stop: Token ids so far in, bool `(rows,)` out.
        stream: Receives the newest tokens, `(rows,)`.
        pad_token: Token of rows that have ended.
        padding: Stands for the padding of prompts in the token ids that processors see, so that
            it is no token to them; None leaves what is there, as transformers does.
    """

    process: Callable[..., Tensor] | None = None
    warp: Callable[..., Tensor] | None = None
    temperature: float = 1.0
    stop: Callable[[Tensor], Tensor] | None = None
    stream: Callable[[Tensor], None] | None = None
    pad_token: int = 0
    padding: int | None = None

    @property
    def see_rows(self) -> bool:
        """True if rows must stay where they are, and ordinary tensors be passed."""
        return any((self.process, self.stop, self.stream))

    @classmethod
    def prepared(
        cls,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        candidates: int,
        stream: Callable[[Tensor], None] | None = None,
    ) -> Self:
        """Sort what transformers has prepared for a `generate` call.

        Args:
            processors: Logits processors and, for sampling, warpers.
            criteria: Stopping criteria; the loop itself sees to the end and the length.
            config: Settings of the call.
            candidates: K; a top-k that keeps all of them, as transformers' default of 50 does, is
                left out.
            stream: Receives the newest tokens.
        """
        warp = LogitsProcessorList(
            p
            for p in processors
            if type(p) in WARPERS and not (type(p) is TopKLogitsWarper and p.top_k >= candidates)
        )
        temperature = 1.0 if config.do_sample else 0.0
        alone = [type(p) for p in warp] == [TemperatureLogitsWarper]
        if config.do_sample and alone:  # the loop does this itself
            temperature = warp.pop().temperature
        built_in = EosTokenCriteria | MaxLengthCriteria
        further = StoppingCriteriaList(c for c in criteria if not isinstance(c, built_in))
        return cls(
            process=LogitsProcessorList(p for p in processors if type(p) not in WARPERS) or None,
            warp=warp or None,
            temperature=temperature,
            stop=(lambda ids: further(ids, None)) if further else None,
            stream=stream,
            pad_token=config.pad_token_id or 0,
        )


def checkpoint_hooks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    stop_tokens: Sequence[int],
    candidates: int,
    samples: int,
    max_new_tokens: int,
    temperature: float | None,
) -> Hooks:
    """Return what the model's `generation_config` says of every step.

    transformers prepares it as for its own `generate`, whose default of top-k 50 is left out.

    Args:
        model: The language model.
        tokenizer: For stop strings.
        input_ids: Prompts padded on the left, `(prompts, length)`.
        attention_mask: Attention mask of the same shape.
        stop_tokens: Tokens that end a response.
        candidates: K.
        samples: Rows of each prompt.
        max_new_tokens: Longest response.
        temperature: 0 is greedy; None for that of the config, 1 by default.
    """
    settings = model.generation_config
    if temperature is None:
        temperature = 1.0 if settings.temperature is None else settings.temperature
    sampling = {"temperature": temperature, "top_k": settings.top_k or 0}
    generate: Any = model.generate
    # processors that look at the prompt's tokens know no padding: it repeats one of them
    first = attention_mask.argmax(1, keepdim=True)
    filled = input_ids.where(attention_mask.bool(), input_ids.gather(1, first))
    processors, criteria, config = generate(
        filled,
        attention_mask=attention_mask,
        custom_generate=_captured,
        do_sample=temperature > 0,
        **(sampling if temperature > 0 else {}),
        max_length=input_ids.shape[1] + max_new_tokens,
        max_new_tokens=None,
        num_return_sequences=samples,
        eos_token_id=list(stop_tokens) or None,
        pad_token_id=settings.pad_token_id or 0,
        cache_implementation=None,  # decoding has its own
        stop_strings=None,  # transformers would ask for the tokenizer, which it does not take here
        return_dict_in_generate=False,
    )
    if settings.stop_strings:
        criteria.append(StopStringCriteria(tokenizer, settings.stop_strings))
    check_generation_config(config)
    padding = model.config.get_text_config().vocab_size  # processors know it as no token
    unfilled: Any = input_ids.masked_fill(attention_mask == 0, padding)
    processors = LogitsProcessorList(
        EncoderNoRepeatNGramLogitsProcessor(p.ngram_size, unfilled)
        if type(p) is EncoderNoRepeatNGramLogitsProcessor and p.ngram_size > 1
        else p
        for p in processors
        if type(p) is not MinLengthLogitsProcessor
    )
    if settings.min_length and settings.min_new_tokens is None and stop_tokens:
        ends = torch.tensor(stop_tokens, device=input_ids.device)
        processors.append(MinLengthOfRows(settings.min_length, ends, padding))
    return replace(Hooks.prepared(processors, criteria, config, candidates), padding=padding)


class MinLengthOfRows(LogitsProcessor):
    """Lets no row end before it has `min_length` tokens; that of transformers counts padding.

    Args:
        min_length: Tokens of prompt and response.
        stop_tokens: Token ids that end a response.
        padding: Token id that stands for padding.
    """

    def __init__(self, min_length: int, stop_tokens: Tensor, padding: int):
        self.min_length, self.stop_tokens, self.padding = min_length, stop_tokens, padding

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores `(rows, vocabulary)`, those of ends −∞ in rows that are too short."""
        short = (input_ids != self.padding).sum(1, keepdim=True) < self.min_length
        return scores.where(~short, scores.index_fill(1, self.stop_tokens, -torch.inf))


def _captured(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig]:
    """Decode nothing: hand back what `generate` has prepared."""
    return logits_processor, stopping_criteria, generation_config


def check_generation_config(config: GenerationConfig) -> None:
    """Refuse settings of `generate` that this decoding does not have."""
    for name, (reason, off) in UNSUPPORTED.items():
        value = vars(config).get(name)
        refuse_if(value not in off, f"{reason}, got {name}={value!r}")
    for name in UNSUPPORTED_OUTPUTS if config.return_dict_in_generate else ():
        requested = bool(vars(config).get(name))
        refuse_if(requested, f"returns sequences and generations, got {name}=True")


def refuse_if(condition: bool, reason: str) -> None:
    """Raise ValueError if the condition is true.

    Args:
        condition: Whether `generate` was asked for something that this decoding does not do.
        reason: What completes "steered decoding …", a verb phrase.
    """
    if condition:
        raise ValueError(f"steered decoding {reason}")
