"""The lab's tokenizers, of words or pieces of words, with a chat template."""

from collections.abc import Iterable, Sequence

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from benchmarks.subjects.lab.items import Prompt

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
PAD, BOS, EOS = range(3)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + ' ' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, numbered as in `words` after special tokens."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _pretrained(tokenizer)


def subword_tokenizer(texts: Iterable[str], pieces: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of byte pair encoding, trained on texts.

    Args:
        texts: Texts of the world.
        pieces: Size of the vocabulary, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    # no space of the template beside them becomes a token
    special = [AddedToken(token, lstrip=True, rstrip=True, special=True) for token in SPECIAL]
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _pretrained(tokenizer)


def _pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]
) -> list[list[int]]:
    """Return the token ids of each prompt as a user turn and an open assistant turn."""
    chats = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return tokenizer(texts, add_special_tokens=False).input_ids


def encode_responses(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each finished response, the end included."""
    return [[*ids, EOS] for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
