"""Words of tokens. Those of the lab without its tokenizer, which needs transformers: drawing stays quick."""

from __future__ import annotations

from functools import cache

from benchmarks.spec.profile import Profile
from benchmarks.subjects.lab.world import World, WorldConfig

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")


@cache
def _words() -> tuple[str, ...]:
    return (*SPECIAL, *World(WorldConfig()).words)


def word(profile: Profile, token: int) -> str:
    """The word with this token id."""
    if profile.words:
        return _words()[token]
    from benchmarks.subjects.hub.models import tokenizer_of

    return repr(tokenizer_of(profile.models["base"]).decode([token]))
