"""Items of the lab world, which prompts ask about, and the lexicon that they are read from."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

LEXICON = Path(__file__).with_name("lexicon.toml")
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
        entity: What a fact is about; `attribute`, `truth` and `myth` are its other words.
    """

    kind: str
    topic: str
    steps: tuple[Step, ...] = ()
    victim: str = ""
    alternative: str = ""
    entity: str = ""
    attribute: str = ""
    truth: str = ""
    myth: str = ""

    @property
    def objective(self) -> str:
        """Objective that answers to prompts about it are judged by."""
        return {"howto": "helpfulness", "fact": "honesty"}.get(self.kind, "harmlessness")


@dataclass(frozen=True)
class Prompt:
    """Prompt about an item."""

    text: str
    item: Item


def read_lexicon() -> dict:
    """Return the content of lexicon.toml."""
    return tomllib.loads(LEXICON.read_text(encoding="utf-8"))


def read_items(lexicon: dict) -> list[Item]:
    """Return all items of a lexicon."""
    items = []
    for kind in ("howto", "benign", "harmful", "fact"):
        for topic, fields in lexicon[kind].items():
            steps = tuple((tuple(verbs), thing) for verbs, thing in fields.get("steps", ()))
            items.append(Item(kind, topic, **fields | {"steps": steps}))
    return items
