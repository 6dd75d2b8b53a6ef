"""Checks of models, prompts and values, each of which fails with one sentence."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia._inputs import check_sequences
from sia._kv_cache import check_decoder, check_positions
from sia.scorers.autoregressive import AutoregressiveScorer
from sia.scorers.base import MOST_PADDING, HiddenStateSession, Scorer, Session, known_tokenizers
from sia.signals import PredictedDivergence, Signal
from sia.steering import Steering, candidate_count

# names of tokens that no text has, until a model of the family gives them others
RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>|<unused\d+>")
LARGEST_VALUE = 1e28  # times the largest β it is still a number of float32


def check_inputs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    value_prompts: Sequence[Sequence[int]],
    value_vocabulary: int,
    prompt_indices: Sequence[int],
    max_new_tokens: int,
) -> None:
    """Check the model and its prompts, padded on the left, before the first step.

    Args:
        model: The language model.
        input_ids: Prompts, `(prompts, length)`.
        attention_mask: 1 for their tokens, of the same shape.
        value_prompts: The prompts as the scorer reads them.
        value_vocabulary: Number of tokens of the scorer.
        prompt_indices: Numbers of the prompts in messages.
        max_new_tokens: Longest response.
    """
    check_decoder(model)
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
    read = [(input_ids.flatten().tolist(), vocabulary_size(model))]
    for ids, vocabulary in [*read, *((prompt, value_vocabulary) for prompt in value_prompts)]:
        for token in (min(ids), max(ids)):
            if not 0 <= token < vocabulary:
                raise ValueError(
                    "token ids must be at least 0 and below the vocabulary of "
                    f"{vocabulary} tokens, got {token}"
                )
    check_positions(model, max(lengths) + max_new_tokens - 1)  # the last token is never fed


def check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    value_ids: Sequence[Sequence[int]],
    steering: Steering | None,
    candidates: int | None,
    max_new_tokens: int,
) -> None:
    """Check all prompts before the first batch of them is decoded.

    Args:
        model: The language model.
        tokenizer: Tokenizer of the model.
        ids: Prompts, token ids without padding.
        value_ids: The prompts as the scorer reads them.
        steering: What they will be steered with.
        candidates: K without a steering.
        max_new_tokens: Longest response.
    """
    check_steering(model, steering, candidate_count(steering, candidates), tokenizer)
    vocabulary = vocabulary_size(model)
    check_sequences("prompt", ids, vocabulary)
    read = vocabulary if steering is None else steering.scorer.vocabulary_size
    check_sequences("value prompt", value_ids, read)
    longest = max(range(len(ids)), key=lambda i: len(ids[i]), default=None)
    if longest is None:
        return
    try:  # the last token is never fed
        check_positions(model, len(ids[longest]) + max_new_tokens - 1)
    except ValueError as error:
        raise ValueError(f"prompt {longest}: {error}") from error


def check_steering(
    model: PreTrainedModel,
    steering: Steering | None,
    candidates: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Check that K and the scorer fit the model; return the number of tokens that they share."""
    shared = vocabulary_size(model)
    if steering is not None:
        shared = check_vocabulary(model, steering.scorer, "scorer", tokenizer)
        check_apart(model, steering.scorer)
    if candidates > shared:
        raise ValueError(
            f"candidates must be at most the vocabulary of {shared} tokens, got {candidates}"
        )
    return shared


def check_apart(model: PreTrainedModel, scorer: Scorer) -> None:
    """Raise ValueError for a guide that is an adapter in the very language model it steers."""
    same = isinstance(scorer, AutoregressiveScorer) and scorer.model is model
    if same and "peft_config" in vars(model):
        raise ValueError(
            "language model and autoregressive reward model must be two models, got one (PEFT puts "
            "adapters into the model that it wraps): load the language model apart"
        )


def check_vocabulary(
    model: PreTrainedModel,
    scorer: Scorer,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Check that a scorer has the tokens of the model; return how many they share.

    The rows of embeddings may be padded to different sizes, beyond the tokens of the tokenizer.

    Args:
        model: The language model.
        scorer: What values its responses.
        name: Name of the scorer in messages.
        tokenizer: Tokenizer of the model, if there is one.
    """
    if not isinstance(scorer, Scorer):
        raise TypeError(
            f"{name} must be a RewardScorer, a ValueModel or the like, got {type(scorer).__name__}"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = None  # another library's has no vocabulary to compare
    for other in known_tokenizers(scorer) if tokenizer is not None else ():
        check_tokenizers(tokenizer, other, name)
    sizes = vocabulary_size(model), scorer.vocabulary_size
    if sizes[0] == sizes[1]:
        return sizes[0]
    tokens = min(sizes) if tokenizer is None else len(tokenizer)
    if tokenizer is not None and padding_alone(tokenizer) == tokens - 1:
        tokens -= 1  # added to train in batches: no response has it
    if not tokens <= min(sizes) <= max(sizes) <= tokens + MOST_PADDING:
        of = "" if tokenizer is None else f", and the tokenizer {len(tokenizer)}"
        raise ValueError(
            f"model and {name} must share a vocabulary, padding of at most {MOST_PADDING} rows "
            f"aside: the model has {sizes[0]} tokens, the {name} {sizes[1]}{of}"
        )
    return min(sizes)


def padding_alone(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the padding token of a tokenizer, None if it ends texts too."""
    token = tokenizer.pad_token_id
    return None if token == tokenizer.eos_token_id else token


@lru_cache(maxsize=8)  # asked for every batch
def check_tokenizers(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str
) -> None:
    """Check that every token id that two tokenizers have is the same token to both.

    Tokens that one of them reserves for later, or only pads with, may have any name.

    Args:
        tokenizer: Tokenizer of the language model.
        other: Tokenizer of the scorer of its responses.
        name: Name of that scorer in messages.
    """
    ours, theirs = ({i: t for t, i in x.get_vocab().items()} for x in (tokenizer, other))
    unused = {padding_alone(tokenizer), padding_alone(other)}
    differing = [
        token
        for token in ours.keys() & theirs.keys() - unused
        if ours[token] != theirs[token]
        and not (RESERVED.fullmatch(ours[token]) or RESERVED.fullmatch(theirs[token]))
    ]
    if differing:
        first = min(differing)
        raise ValueError(
            f"the tokenizers of model and {name} must agree: token {first} is {ours[first]!r} to "
            f"the model and {theirs[first]!r} to the {name}, the first of {len(differing)}"
        )


def check_values(
    values: Tensor,
    valued: Tensor,
    rows: Tensor,
    prompt_indices: Sequence[int],
    samples: int,
    step: int,
) -> None:
    """Check values that would silently decide the token.

    Args:
        values: What a session returned.
        valued: What it was asked about: candidates `(n, K)`, or a number for each response `(n,)`.
        rows: Their rows, `(n,)`.
        prompt_indices: Number of each prompt, for messages.
        samples: Rows per prompt.
        step: Number of the token, for messages.

    Raises:
        ValueError: If the values have another shape than what they are of.
        FloatingPointError: For NaN, infinity, and what times β would be infinity.
    """
    if values.shape != valued.shape:
        raise ValueError(
            f"a session must return values of the shape {tuple(valued.shape)}, "
            f"got {tuple(values.shape)}"
        )
    wrong = ~(values.abs() <= LARGEST_VALUE)
    if bool(wrong.any()):
        row = int(rows[wrong.view(len(rows), -1).any(1)][0])
        value = values[wrong][0].item()
        raise FloatingPointError(
            f"values must be finite and at most ±{LARGEST_VALUE:g}, got {value:g} at "
            f"step {step} of prompt {prompt_indices[row // samples]}"
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of tokens of the model."""
    return int(model.config.get_text_config().vocab_size)


def check_readers(
    model: PreTrainedModel, signals: Iterable[Signal], session: Session | None
) -> bool:
    """Return whether something reads hidden states, after checking that it fits the model."""
    predictors = [s.predictor for s in signals if isinstance(s, PredictedDivergence)]
    for predictor in predictors:
        predictor.model.check(model, "junction gate")
    if isinstance(session, HiddenStateSession):
        session.check_model(model)
        return True
    return bool(predictors)
