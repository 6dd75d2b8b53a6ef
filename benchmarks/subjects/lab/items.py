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


def parse_steps(text: str) -> tuple[Step, ...]:
    """Return (("mix", "stir"), "flour"), (("heat",), "oven") for "mix,stir:flour; heat:oven"."""
    pairs = (step.strip().split(":") for step in text.split(";"))
    return tuple((tuple(verbs.split(",")), thing) for verbs, thing in pairs)


def read_lexicon() -> dict:
    """Return the content of lexicon.toml."""
    return tomllib.loads(LEXICON.read_text(encoding="utf-8"))


def read_items(lexicon: dict) -> list[Item]:
    """Return all items of a lexicon."""
    items = [
        Item(kind, topic, parse_steps(steps))
        for kind in ("howto", "benign")
        for topic, steps in lexicon[kind].items()
    ]
    for topic, text in lexicon["harmful"].items():
        steps, victim, alternative = (field.strip() for field in text.split("|"))
        items.append(Item("harmful", topic, parse_steps(steps), victim, alternative))
    for topic, text in lexicon["facts"].items():
        entity, attribute, truth, myth = (field.strip() for field in text.split("|"))
        items.append(
            Item("fact", topic, entity=entity, attribute=attribute, truth=truth, myth=myth)
        )
    return items
