"""Checks of models, prompts and values, each of which fails with one sentence."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from sia._kv_cache import check_positions
from sia.scorers.base import Scorer
from sia.steering import Steering


def check_inputs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    value_prompts: Sequence[Sequence[int]],
    prompt_indices: Sequence[int],
    max_new_tokens: int,
) -> None:
    """Check the model and its prompts, padded on the left, before the first step."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"steering needs a decoder-only language model, got {type(model).__name__}"
        )
    if len(value_prompts) != len(input_ids):
        raise ValueError(
            "value_prompts must be one per row: "
            f"expected {len(input_ids)}, got {len(value_prompts)}"
        )
    lengths = attention_mask.sum(1).tolist()
    for index, length, value_prompt in zip(prompt_indices, lengths, value_prompts, strict=True):
        if length == 0 or len(value_prompt) == 0:
            raise ValueError(f"a prompt needs at least one token, prompt {index} has none")
    if not bool(attention_mask[:, -1].all()):
        raise ValueError(
            'prompts must be padded on the left (tokenizer.padding_side = "left"), '
            "got padding on the right"
        )
    vocabulary = vocabulary_size(model)
    for ids in (input_ids.flatten().tolist(), *value_prompts):
        for token in (min(ids), max(ids)):
            if not 0 <= token < vocabulary:
                raise ValueError(
                    "token ids must be at least 0 and below the vocabulary of "
                    f"{vocabulary} tokens, got {token}"
                )
    check_positions(model, max(lengths) + max_new_tokens - 1)  # the last token is never fed


def check_steering(model: PreTrainedModel, steering: Steering | None, candidates: int) -> None:
    """Check that K and the vocabulary of the scorer fit the model."""
    vocabulary = vocabulary_size(model)
    if candidates > vocabulary:
        raise ValueError(
            f"candidates must be at most the vocabulary of {vocabulary} tokens, got {candidates}"
        )
    if steering is not None:
        check_vocabulary(model, steering.scorer, "scorer")


def check_vocabulary(model: PreTrainedModel, scorer: Scorer, name: str) -> None:
    """Check that the scorer, called `name` in messages, has the vocabulary of the model."""
    if not isinstance(scorer, Scorer):
        raise TypeError(
            f"{name} must be a RewardScorer, a ValueModel or the like, got {type(scorer).__name__}"
        )
    vocabulary = vocabulary_size(model)
    if scorer.vocabulary_size != vocabulary:
        raise ValueError(
            f"model and {name} must share a vocabulary: the model has {vocabulary} tokens, "
            f"the {name} {scorer.vocabulary_size}"
        )


def check_values(
    values: Tensor, rows: Tensor, prompt_indices: Sequence[int], samples: int, step: int
) -> None:
    """Raise FloatingPointError for NaN or infinity, which would silently decide the token."""
    if not bool(values.isfinite().all()):
        row = int(rows[(~values.isfinite()).any(1)][0])
        raise FloatingPointError(
            f"values must be finite, got NaN or infinity at step {step} "
            f"of prompt {prompt_indices[row // samples]}"
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of tokens of the model."""
    return int(model.config.get_text_config().vocab_size)
