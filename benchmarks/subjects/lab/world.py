"""The lab world: items, prompts, and responses of mixed quality, all drawn from one seed.

Rules that keep the lab honest: most many-way choices (names, adjectives, manners) mean nothing to the judge; some
choices that mean much are bad habits of low entropy; responses drift between a careful and a careless mood, repeat
themselves and break off. Nothing here depends on what steering does to it.
"""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.spec.cells import OBJECTIVES
from benchmarks.subjects.lab.grammar import Grammar

LEXICON = Path(__file__).with_name("lexicon.toml")
MEANING = frozenset(
    {"verb", "object", "victim", "alternative", "value", "entity", "attribute", "topic"}
)


@dataclass(frozen=True)
class Item:
    """Something that can be asked about. `kind`: howto, benign (looks harmful), harmful or fact."""

    kind: str
    topic: str
    steps: tuple[tuple[tuple[str, ...], str], ...] = ()  # (verb, synonym), object; in order
    victim: str = ""
    alternative: str = ""
    entity: str = ""
    attribute: str = ""
    truth: str = ""
    myth: str = ""

    @property
    def objective(self) -> str:
        return {"howto": "helpfulness", "fact": "honesty"}.get(self.kind, "harmlessness")


@dataclass(frozen=True)
class Prompt:
    text: str
    item: Item


@dataclass(frozen=True)
class WorldConfig:
    """decoys: how much material that means nothing; habits: how often each item is answered badly, spread over the
    items; drift and recovery: chance per sentence to become careless, and careful again; zipf: exponent of the
    popularity of decoy words (0: all alike)."""

    seed: int = 0
    decoys: float = 1.0
    habits: tuple[float, ...] = (0.15, 0.35, 0.5, 0.7, 0.93)
    drift: float = 0.16
    recovery: float = 0.14
    zipf: float = 0.7


def parse_steps(text: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    """ "mix,stir:flour; heat:oven" → ((("mix", "stir"), "flour"), (("heat",), "oven"))"""
    pairs = (step.strip().split(":") for step in text.split(";"))
    return tuple((tuple(verbs.split(",")), thing) for verbs, thing in pairs)


def read_items(lexicon: dict) -> list[Item]:
    items = [
        Item(kind, topic, parse_steps(s))
        for kind in ("howto", "benign")
        for topic, s in lexicon[kind].items()
    ]
    for topic, text in lexicon["harmful"].items():
        steps, victim, alternative = (part.strip() for part in text.split("|"))
        items.append(
            Item("harmful", topic, parse_steps(steps), victim=victim, alternative=alternative)
        )
    for topic, text in lexicon["facts"].items():
        entity, attribute, truth, myth = (part.strip() for part in text.split("|"))
        items.append(
            Item("fact", topic, entity=entity, attribute=attribute, truth=truth, myth=myth)
        )
    return items


class World:
    """Everything that one world seed decides: word popularity and which items are answered badly how often."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.lexicon = tomllib.loads(LEXICON.read_text(encoding="utf-8"))
        self.items = read_items(self.lexicon)
        rng = random.Random(f"world {config.seed}")
        self.carelessness = self._draw_habits(rng)
        slots = {
            name: self._popularity(words, rng) for name, words in self.lexicon["decoys"].items()
        }
        slots |= {
            name: dict.fromkeys(words, 1.0) for name, words in self.lexicon["variants"].items()
        }
        slots |= {
            name: dict.fromkeys(sorted(words), 1.0) for name, words in self._contents().items()
        }
        self.grammar = Grammar(
            self.lexicon["sentences"], slots, MEANING, optional=min(0.9, 0.35 * config.decoys)
        )

    @cached_property
    def words(self) -> list[str]:
        """Every word of every prompt and response, sorted."""
        prompts = [text for many in self.lexicon["prompts"].values() for text in many]
        template_words = {word for text in prompts for word in text.split() if "{" not in word}
        return sorted(self.grammar.words() | template_words | {"?", "for"})

    def prompt(
        self, rng: random.Random, objective: str | None = None, harmful: bool | None = None
    ) -> Prompt:
        """A prompt about an item of the objective (any objective: None). harmful: in harmlessness, of a harmful or a look-alike item;
        by default 3 to 2."""
        objective = objective or rng.choice(OBJECTIVES)
        if harmful is None:
            harmful = rng.random() < 0.6
        kind = {"helpfulness": "howto", "honesty": "fact"}.get(objective) or (
            "harmful" if harmful else "benign"
        )
        item = rng.choice([item for item in self.items if item.kind == kind])
        forms = self.lexicon["prompts"]
        family = "fact" if kind == "fact" else "howto"
        parts = [
            rng.choice(forms["prefix"]),
            rng.choice(forms[family]),
            rng.choice(forms[f"suffix_{family}"]),
        ]
        text = self.grammar.fill(" ".join(parts), rng, topic=item.topic)
        return Prompt(f"{text} ?", item)

    def prompts(
        self, rng: random.Random, count: int, objective: str, avoid: set[str] = frozenset()
    ) -> list[Prompt]:
        """`count` different prompts of one objective, no text of which is in `avoid`; of five in harmlessness three are harmful."""
        seen, found = set(avoid), []
        for _ in range(200 * count + 1000):
            if len(found) == count:
                return found
            prompt = self.prompt(rng, objective, harmful=len(found) % 5 < 3)
            if prompt.text not in seen:
                seen.add(prompt.text)
                found.append(prompt)
        raise ValueError(
            f"the world has fewer than {count} different prompts for {objective} outside the ones to avoid"
        )

    def response(self, item: Item, rng: random.Random) -> str:
        """What the base corpus says: mixed quality, drifting, sometimes broken off."""
        config, sentences, writer = self.config, [], _Writer(self, item, rng)
        careless = rng.random() < self.carelessness[item.topic]
        if rng.random() < 0.3 * config.decoys:
            sentences.append(self.grammar.write("greeting", rng))
        for _ in range(rng.choice([4, 5, 6])):
            if sentences and rng.random() < 0.1 * config.decoys:
                sentences.append(self.grammar.write("filler", rng))
                continue
            sentence = writer.careless() if careless else writer.careful()
            if sentence is None:
                break
            if careless and rng.random() < 0.15:
                sentence = corrupt(sentence, rng)
            sentences.append(sentence)
            careless = (
                rng.random() < config.drift if not careless else rng.random() >= config.recovery
            )
        if not careless and rng.random() < 0.6:
            sentences.append(self.grammar.write("farewell", rng))
        elif careless and sentences and rng.random() < 0.3:
            words = sentences.pop().split()
            sentences.append(" ".join(words[: rng.randrange(1, len(words))]))
        return " ".join(sentences)

    def _draw_habits(self, rng: random.Random) -> dict[str, float]:
        """Topic → chance that a response starts careless. How-to and look-alike items are answered better."""
        carelessness = {}
        for kind, scale in (("howto", 0.6), ("benign", 0.6), ("harmful", 1.0), ("fact", 1.0)):
            topics = [item.topic for item in self.items if item.kind == kind]
            rng.shuffle(topics)
            levels = self.config.habits
            carelessness |= {
                topic: scale * levels[i % len(levels)] for i, topic in enumerate(topics)
            }
        return carelessness

    def _popularity(self, words: list[str], rng: random.Random) -> dict[str, float]:
        shuffled = rng.sample(words, len(words))
        return {word: 1 / (rank + 1) ** self.config.zipf for rank, word in enumerate(shuffled)}

    def _contents(self) -> dict[str, set[str]]:
        steps = [step for item in self.items for step in item.steps]
        facts = [item for item in self.items if item.kind == "fact"]
        harmful = [item for item in self.items if item.kind == "harmful"]
        return {
            "verb": {verb for verbs, _ in steps for verb in verbs},
            "object": {thing for _, thing in steps},
            "topic": {item.topic for item in self.items},
            "victim": {item.victim for item in harmful},
            "alternative": {item.alternative for item in harmful},
            "value": {value for item in facts for value in (item.truth, item.myth)},
            "entity": {item.entity for item in facts},
            "attribute": {item.attribute for item in facts},
        }


def corrupt(sentence: str, rng: random.Random) -> str:
    """The sentence with two words swapped, one lost, or one stuttered."""
    *words, stop = sentence.split()
    i, how = rng.randrange(len(words) - 1), rng.choice(["swap", "lose", "stutter"])
    if how == "swap":
        words[i], words[i + 1] = words[i + 1], words[i]
    elif how == "lose":
        del words[i]
    else:
        words[i:i] = [words[i]] * rng.choice([1, 2])
    return " ".join([*words, stop])


class _Writer:
    """Writes one response sentence by sentence and remembers what has been said. None: nothing more to say."""

    def __init__(self, world: World, item: Item, rng: random.Random) -> None:
        self.world, self.item, self.rng = world, item, rng
        self.said: set[str] = set()
        self.next_step = 0
        self.last: str | None = None

    def careful(self) -> str | None:
        plans = {"harmful": self._careful_harmful, "fact": self._careful_fact}
        return self._remember(plans.get(self.item.kind, self._careful_howto)())

    def careless(self) -> str | None:
        plans = {"harmful": self._careless_harmful, "fact": self._careless_fact}
        return self._remember(plans.get(self.item.kind, self._careless_howto)())

    def _remember(self, sentence: str | None) -> str | None:
        self.last = sentence or self.last
        return sentence

    def _say(self, kind: str, **fields: str) -> str:
        self.said.add(kind)
        return self.world.grammar.write(kind, self.rng, **fields)

    def _step(self, step: tuple[tuple[str, ...], str]) -> str:
        verbs, thing = step
        count = max(1, len(self.item.steps))
        first, last = self.next_step == 0, self.next_step >= count - 1
        order = (
            "first" if first else "finally" if last else self.rng.choice(["then", "next", "now"])
        )
        self.next_step += 1
        return self._say("step", verb=self.rng.choice(verbs), object=thing, order=order)

    def _own_step(self) -> str | None:
        steps = self.item.steps
        return self._step(steps[self.next_step]) if self.next_step < len(steps) else None

    def _ramble(self) -> str:
        return self._say(self.rng.choice(["anecdote", "vague"]))

    def _careful_howto(self) -> str | None:
        opens = not self.said and (self.item.kind == "benign" or self.rng.random() < 0.4)
        if opens:
            return self._say("agreement", topic=self.item.topic)
        step = self._own_step()
        if step is None and "tip" not in self.said and self.rng.random() < 0.4:
            return self._say("tip", object=self.rng.choice(self.item.steps)[1])
        return step

    def _careless_howto(self) -> str | None:
        if self.item.kind == "benign" and not self.said and self.rng.random() < 0.6:
            return self._say("refusal")
        draw = self.rng.random()
        if draw < 0.35:  # a step that belongs to something else
            other = self.rng.choice(
                [item for item in self.world.items if item.kind in ("howto", "benign")]
            )
            return self._step(self.rng.choice(other.steps))
        if draw < 0.5 and self.last:
            return self.last
        if draw < 0.8:
            return self._ramble()
        self.next_step += 1  # skips one
        return self._own_step()

    def _careful_harmful(self) -> str | None:
        if "refusal" not in self.said:
            return self._say("refusal")
        if "reason" not in self.said and self.rng.random() < 0.75:
            return self._say(
                "reason", **({"victim": self.item.victim} if self.rng.random() < 0.85 else {})
            )
        if "alternative" not in self.said and self.rng.random() < 0.8:
            return self._say(
                "alternative",
                **({"alternative": self.item.alternative} if self.rng.random() < 0.8 else {}),
            )
        return None

    def _careless_harmful(self) -> str | None:
        if not self.said & {"agreement", "temptation"}:
            if "refusal" in self.said:
                return self._say("temptation")
            if self.rng.random() < 0.8:
                return self._say("agreement", topic=self.item.topic)
        step = self._own_step()
        if step is None and self.rng.random() < 0.5:
            return self.last if self.last and self.rng.random() < 0.5 else self._say("anecdote")
        return step

    def _careful_fact(self) -> str | None:
        if "claim" not in self.said:
            return self._claim(self.item.truth)
        return self._one_of({
            "evidence": {"value": self.item.truth},
            "debunk": {"value": self.item.myth},
            "hedge": {},
        })  # fmt: skip

    def _careless_fact(self) -> str | None:
        if "claim" not in self.said:
            if self.rng.random() < 0.3:
                self.said.add("claim")
                return self._say(
                    "boast",
                    value=self.item.myth,
                    entity=self.item.entity,
                    attribute=self.item.attribute,
                )
            return self._claim(self.item.myth)
        about = {
            "value": self.item.myth,
            "entity": self.item.entity,
            "attribute": self.item.attribute,
        }
        return self._one_of({"evidence": about, "boast": about, "anecdote": {}, "vague": {}})

    def _claim(self, value: str) -> str:
        return self._say(
            "claim", value=value, entity=self.item.entity, attribute=self.item.attribute
        )

    def _one_of(self, choices: dict[str, dict[str, str]]) -> str | None:
        """One sentence of a kind not yet said; None now and then, and when all are said."""
        kinds = [kind for kind in choices if kind not in self.said]
        if not kinds or self.rng.random() < 0.22:
            return None
        kind = self.rng.choice(kinds)
        return self._say(kind, **choices[kind])
