"""Items of the lab world, which prompts ask about, and the lexicon that they are read from."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

LEXICONS = Path(__file__).with_name("lexicons")
Step = tuple[tuple[str, ...], str]  # synonymous verbs, object


@dataclass(frozen=True)
class Item:
    """Something that can be asked about.

    Attributes:
        kind: howto, benign (looks harmful), harmful or fact.
        topic: Words by which prompts name it.
        steps: Pairs of synonymous verbs and an object, in order.
        victim: Whom a harmful item harms.
        alternative: What to do instead of a harmful item.
        entity: What a fact is about; `attribute` is the quality that is asked for.
        truths: Synonyms of its true value.
        myths: Synonyms of what many believe instead.
    """

    kind: str
    topic: str
    steps: tuple[Step, ...] = ()
    victim: str = ""
    alternative: str = ""
    entity: str = ""
    attribute: str = ""
    truths: tuple[str, ...] = ()
    myths: tuple[str, ...] = ()

    @property
    def objective(self) -> str:
        """Objective that answers to prompts about it are judged by."""
        return {"howto": "helpfulness", "fact": "honesty"}.get(self.kind, "harmlessness")


@dataclass(frozen=True)
class Prompt:
    """Prompt about an item."""

    text: str
    item: Item


def read_lexicon(name: str) -> dict:
    """Return the content of a file of lexicons/."""
    return tomllib.loads((LEXICONS / f"{name}.toml").read_text(encoding="utf-8"))


def read_items(lexicon: dict) -> list[Item]:
    """Return all items of a lexicon."""
    items = []
    for kind in ("howto", "benign", "harmful", "fact"):
        for topic, fields in lexicon[kind].items():
            steps = tuple((tuple(verbs), thing) for verbs, thing in fields.get("steps", ()))
            values = {name: tuple(fields.get(name, ())) for name in ("truths", "myths")}
            items.append(Item(kind, topic, **fields | values | {"steps": steps}))
    return items
