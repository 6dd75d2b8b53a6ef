"""Writing of tokenizers."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:  # which tokenizers raises where the disk is full
            raise
        raise OSError(f"the tokenizer cannot be written to {folder}: {error}") from error
