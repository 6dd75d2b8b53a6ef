"""Inputs of models: token ids of prompts, padding, and the tokens that end a response."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from sia._numbers import as_number, python_value

# what tokenizers return: the prompts, and what says nothing about them that a model would read
READ_KEYS = {"input_ids", "attention_mask", "token_type_ids"}
IGNORED_KEYS = {
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "assistant_masks",
    "overflow_to_sample_mapping",
    "num_truncated_tokens",
    "overflowing_tokens",
}
# what chat templates raise, jinja's own and Python's; tokenizers raise some of them for half pairs
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
)


@runtime_checkable
class TextDecoder(Protocol):
    """A tokenizer, as far as prompts of token ids need one."""

    eos_token_id: Any

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the text of token ids."""


@runtime_checkable
class Table(Protocol):
    """A table of pandas or of its kind, which iterates over the names of its columns."""

    columns: Any


def pad_left(ids: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, padded on the left, both int64 `(rows, longest)`."""
    input_ids, mask = pad_right([list(row)[::-1] for row in ids], device)
    return input_ids.flip(1), mask.flip(1)


def pad_right(
    sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu", padding: int = 0
) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, padded on the right, both int64 `(rows, longest)`."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.tensor(
        [[*sequence, *[padding] * (longest - len(sequence))] for sequence in sequences],
        device=device,
    )
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    return input_ids, (torch.arange(longest, device=device) < lengths[:, None]).long()


def eos_token_ids(
    config: GenerationConfig | PreTrainedConfig, further: int | None = None
) -> list[int]:
    """Return the tokens that end a response: those of the config, and `further` if it is given."""
    configured = config.eos_token_id
    ids = {*(configured if isinstance(configured, (list, tuple)) else [configured]), further}
    return sorted(token for token in ids if token is not None)


def check_tokens(name: str, sequence: Any, vocabulary: int) -> None:
    """Raise ValueError unless a sequence holds token ids of the vocabulary, one at least."""
    tokens = sequence.tolist() if isinstance(sequence, np.ndarray | Tensor) else sequence
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise ValueError(f"a {name} must be a list of token ids, got {sequence!r}")
    if not tokens:
        raise ValueError(f"a {name} needs at least one token, got none")
    for token in map(python_value, tokens):
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"a {name} must be a list of token ids, got one that holds {token!r}")
        if not 0 <= token < vocabulary:
            raise ValueError(
                "token ids must be at least 0 and below the vocabulary of "
                f"{vocabulary} tokens, got {token}"
            )


def check_sequences(name: str, sequences: Sequence[Any], vocabulary: int) -> None:
    """Raise ValueError, which names its number, for a sequence that `check_tokens` refuses."""
    for number, sequence in enumerate(sequences):
        try:
            check_tokens(name, sequence, vocabulary)
        except ValueError as error:
            raise ValueError(f"{name} {number}: {error}") from error


def prompt_ids(
    prompts: Any,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    padding: int | None = None,
    writers: Sequence[PreTrainedTokenizerBase] = (),
) -> list[list[int]]:
    """Return the token ids of prompts, without padding.

    Args:
        prompts: Texts, chats or token ids, in a list, an array or a tensor; or what a tokenizer or
            its chat template returns: a mapping with `input_ids` and, if padded, `attention_mask`.
        name: Name of one prompt, for messages.
        tokenizer: Reads texts and chats.
        padding: Token that pads a tensor, an array or a mapping without a mask.
        writers: Tokenizers in whose chat templates chats are written instead, which must agree.

    Raises:
        TypeError: If it is something else.
        ValueError: If a prompt is empty, there are inputs that would be ignored, or the templates
            of `writers` differ.
    """
    rows: Any
    if isinstance(prompts, Mapping):
        rows = _encoded_rows(prompts, name, padding)
    elif isinstance(prompts, np.ndarray | Tensor) and prompts.ndim == 2:
        rows = _without_padding(prompts.tolist(), padding)
    elif isinstance(prompts, Table):
        raise TypeError(f"{name}s must be a list of prompts, got a table: pass one of its columns")
    elif isinstance(prompts, str) or not isinstance(prompts, Iterable):
        given = "a single text" if isinstance(prompts, str) else type(prompts).__name__
        raise TypeError(f"{name}s must be a list of prompts, got {given}")
    elif _is_chat(rows := list(prompts)):
        raise TypeError(f"{name}s must be a list of prompts, got a single chat")
    ids = [
        _prompt_row(prompt, index, name, tokenizer, padding, writers)
        for index, prompt in enumerate(rows)
    ]
    for index, row in enumerate(ids):
        if not row:
            raise ValueError(f"a {name} needs at least one token, number {index} is empty")
    return ids


def _prompt_row(
    prompt: Any,
    index: int,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    padding: int | None,
    writers: Sequence[PreTrainedTokenizerBase],
) -> list[int]:
    """Return the token ids of prompt number `index`: a text, a chat, token ids or a mapping."""
    text = isinstance(prompt, str)
    if text or _is_chat(prompt):
        own = [] if tokenizer is None else [tokenizer]
        readers = own if text else writers or own
        if not readers:
            raise TypeError(
                f"a {name} must be a list of token ids where there is no tokenizer, "
                f"number {index} is a {'text' if text else 'chat'}"
            )
        try:
            read = [(_text_ids if text else _chat_ids)(reader, prompt) for reader in readers]
        except TEMPLATE_ERRORS as error:
            texts = [prompt] if text else [str(message.get("content")) for message in prompt]
            if any(map(holds_half_pair, texts)):
                raise ValueError(
                    f"a {name} must be valid Unicode, number {index} holds half of a surrogate pair"
                ) from error
            if text:
                raise
            raise ValueError(f"the chat template refuses {name} {index}: {error}") from error
        if any(other != read[0] for other in read):
            raise ValueError(
                f"a {name} must be a list of token ids where the scorers of a sum have different "
                f"chat templates, number {index} is a chat"
            )
        return read[0]
    rows = _encoded_rows(prompt, name, padding) if isinstance(prompt, Mapping) else _rows(prompt)
    tokens = rows[0] if len(rows) == 1 else [None] if rows else []
    ids = tokens if all(type(token) is int for token in tokens) else list(map(as_number, tokens))
    if not all(isinstance(token, int) for token in ids):
        given = "a list of other things" if isinstance(prompt, Sequence) else type(prompt).__name__
        raise TypeError(
            f"a {name} must be a text, a chat (a list of messages) or a list of token ids, "
            f"number {index} is {given}"
        )
    return list(ids)


def _encoded_rows(encoding: Mapping[str, Any], name: str, padding: int | None) -> list[list[int]]:
    """Return the token ids that a mapping holds under `input_ids`, without padding."""
    if "input_ids" not in encoding:
        raise TypeError(
            f"{name}s in a mapping must have input_ids, as tokenizers return them, "
            f"got {', '.join(map(str, encoding)) or 'an empty one'}"
        )
    types = (np.any(np.asarray(row)) for row in _rows(encoding.get("token_type_ids", [])))
    ignored = [*(encoding.keys() - READ_KEYS - IGNORED_KEYS), *["token_type_ids"] * any(types)]
    if ignored:
        raise ValueError(
            f"{name}s must be input_ids with their attention_mask alone, "
            f"got {', '.join(sorted(ignored))} too, which steering would ignore"
        )
    ids = _rows(encoding["input_ids"])
    masks = encoding.get("attention_mask")
    if masks is None:  # rows of several lengths are not padded
        padded = all(isinstance(row, list) for row in ids) and len(set(map(len, ids))) == 1
        return _without_padding(ids, padding) if padded else ids
    lengths = [list(map(len, rows)) for rows in (ids, _rows(masks))]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"the attention_mask of {name}s must have the shape of input_ids, rows of "
            f"{lengths[0]} tokens, got {lengths[1]}"
        )
    return [
        [token for token, kept in zip(row, mask, strict=True) if kept]
        for row, mask in zip(ids, _rows(masks), strict=True)
    ]


def _without_padding(rows: list[list[Any]], padding: int | None) -> list[list[Any]]:
    """Return the rows without the token that pads them, if there is one."""
    if padding is None:
        return rows
    return [[token for token in row if token != padding] for row in rows]


def _rows(values: Any) -> list[list[Any]]:
    """Return the rows of a tensor, an array or a list, of which one may stand alone."""
    if isinstance(values, np.ndarray | Tensor):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        return [[None]]  # is no token
    listed = [x.tolist() if isinstance(x, np.ndarray | Tensor) else x for x in values]
    return [listed] if listed and not isinstance(listed[0], Sequence) else listed


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, with special tokens unless it begins with BOS already."""
    bos = tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    return list(tokenizer(text, add_special_tokens=special).input_ids) if text else []


def holds_half_pair(text: str) -> bool:
    """Return whether a text holds half of a surrogate pair, which no vocabulary has."""
    return any("\ud800" <= sign <= "\udfff" for sign in text)


def _is_chat(prompt: Any) -> bool:
    """Return whether this is a list of messages, each with a role."""
    messages = prompt if isinstance(prompt, list | tuple) else []
    return bool(messages) and all(isinstance(m, Mapping) and "role" in m for m in messages)


def _chat_ids(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the token ids of a chat by the template, up to where the assistant goes on."""
    begun = chat[-1]["role"] == "assistant"
    messages: list[Any] = list(chat)
    ids: Any = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=not begun,
        continue_final_message=begun,
        return_dict=False,
    )
    return list(ids)
