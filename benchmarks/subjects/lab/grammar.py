"""Sentence templates that can be filled and, the other way round, recognised.

A template is a string of words with slots, "{order} {verb} the {?adjective} {object} .": the world
writes with it and the judge reads with it, so both know exactly the same sentences. Text is lower
case with spaces around every mark.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache

SLOT = re.compile(r"\{(\??)(\w+)\}")


@dataclass(frozen=True)
class Sentence:
    """Recognised sentence: its kind, and the content of the slots that carry meaning."""

    kind: str
    fields: dict[str, str]


class Grammar:
    """Sentences that can be written and recognised.

    Args:
        templates: Templates by kind of sentence.
        slots: Weight of each alternative, by slot.
        meaning: Slots whose content `parse` reports; the others are decoration.
        optional: Probability that an optional slot is filled.
    """

    def __init__(
        self,
        templates: dict[str, list[str]],
        slots: dict[str, dict[str, float]],
        meaning: frozenset[str],
        optional: float,
    ) -> None:
        """Compile the templates."""
        self.templates = templates
        self.slots = slots
        self.optional = optional
        self._alternatives = {name: list(weights) for name, weights in slots.items()}
        self._weights = {name: list(weights.values()) for name, weights in slots.items()}
        self._patterns = [
            (kind, self._pattern(template, meaning))
            for kind, of_kind in templates.items()
            for template in of_kind
        ]
        self.parse = lru_cache(maxsize=200_000)(self._parse)

    def fill(self, template: str, rng: random.Random, **fields: str) -> str:
        """Return a sentence of `template`; slots not given in `fields` are drawn by weight."""

        def draw(match: re.Match[str]) -> str:
            optional, name = match.groups()
            if name in fields:
                return fields[name]
            if optional and rng.random() >= self.optional:
                return ""
            return rng.choices(self._alternatives[name], self._weights[name])[0]

        return " ".join(SLOT.sub(draw, template).split())

    def write(self, kind: str, rng: random.Random, **fields: str) -> str:
        """Return a sentence of this kind."""
        return self.fill(rng.choice(self.templates[kind]), rng, **fields)

    def words(self) -> set[str]:
        """Return every word that a sentence can contain."""
        texts = [
            SLOT.sub("", template) for of_kind in self.templates.values() for template in of_kind
        ]
        texts += [alternative for weights in self.slots.values() for alternative in weights]
        return {word for text in texts for word in text.split()}

    def _pattern(self, template: str, meaning: frozenset[str]) -> re.Pattern[str]:
        parts = []
        for word in template.split():
            slot = SLOT.fullmatch(word)
            if slot is None:
                parts.append(re.escape(word) + " ")
                continue
            optional, name = slot.groups()
            longest_first = sorted(self.slots[name], key=len, reverse=True)
            group = "|".join(re.escape(alternative) + " " for alternative in longest_first)
            opening = f"(?P<{name}>" if name in meaning else "(?:"
            parts.append(f"{opening}{group})" + ("?" if optional else ""))
        return re.compile("".join(parts))

    def _parse(self, text: str) -> Sentence | None:
        for kind, pattern in self._patterns:
            match = pattern.fullmatch(text + " ")
            if match is not None:
                fields = {name: text.strip() for name, text in match.groupdict().items() if text}
                return Sentence(kind, fields)
        return None
