"""Words of the lab's tokens, without the tokenizer (which needs transformers): drawing stays quick."""

from __future__ import annotations

from functools import cache

from benchmarks.lab.world import World, WorldConfig

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")


@cache
def _words() -> tuple[str, ...]:
    return (*SPECIAL, *World(WorldConfig()).words)


def word(token: int) -> str:
    """The word with this token id."""
    return _words()[token]
