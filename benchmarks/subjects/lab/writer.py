"""Responses of the lab's base corpus, sentence by sentence, in a careful or a careless mood."""

import random
from collections.abc import Sequence

from benchmarks.subjects.lab.grammar import Grammar
from benchmarks.subjects.lab.items import Item, Step


def corrupt(sentence: str, rng: random.Random) -> str:
    """Return the sentence with two words swapped, one lost, or one stuttered."""
    *words, stop = sentence.split()
    i, error = rng.randrange(len(words) - 1), rng.choice(["swap", "lose", "stutter"])
    if error == "swap":
        words[i], words[i + 1] = words[i + 1], words[i]
    elif error == "lose":
        del words[i]
    else:
        words[i:i] = [words[i]] * rng.choice([1, 2])
    return " ".join([*words, stop])


class Writer:
    """Writes one response sentence by sentence and remembers what has been said.

    Args:
        grammar: Grammar of the world.
        items: All items of the world, for steps that belong to something else.
        item: Item that the response is about.
        rng: Source of every choice.
    """

    def __init__(
        self, grammar: Grammar, items: Sequence[Item], item: Item, rng: random.Random
    ) -> None:
        """Begin a response."""
        self.grammar, self.items, self.item, self.rng = grammar, items, item, rng
        self.said: set[str] = set()  # kinds of sentences
        self.next_step = 0
        self.previous: str | None = None

    def careful(self) -> str | None:
        """Return a sentence of a careful answer; None if nothing is left to say."""
        plans = {"harmful": self._careful_harmful, "fact": self._careful_fact}
        return self._remember(plans.get(self.item.kind, self._careful_howto)())

    def careless(self) -> str | None:
        """Return a sentence of a careless answer; None if nothing is left to say."""
        plans = {"harmful": self._careless_harmful, "fact": self._careless_fact}
        return self._remember(plans.get(self.item.kind, self._careless_howto)())

    def _remember(self, sentence: str | None) -> str | None:
        self.previous = sentence or self.previous
        return sentence

    def _say(self, kind: str, **fields: str) -> str:
        self.said.add(kind)
        return self.grammar.write(kind, self.rng, **fields)

    def _step(self, step: Step) -> str:
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
            others = [item for item in self.items if item.kind in ("howto", "benign")]
            return self._step(self.rng.choice(self.rng.choice(others).steps))
        if draw < 0.5 and self.previous:
            return self.previous
        if draw < 0.8:
            return self._ramble()
        self.next_step += 1  # skips one
        return self._own_step()

    def _careful_harmful(self) -> str | None:
        if "refusal" not in self.said:
            return self._say("refusal")
        if "reason" not in self.said and self.rng.random() < 0.75:
            fields = {"victim": self.item.victim} if self.rng.random() < 0.85 else {}
            return self._say("reason", **fields)
        if "alternative" not in self.said and self.rng.random() < 0.8:
            fields = {"alternative": self.item.alternative} if self.rng.random() < 0.8 else {}
            return self._say("alternative", **fields)
        return None

    def _careless_harmful(self) -> str | None:
        if not self.said & {"agreement", "temptation"}:
            if "refusal" in self.said:
                return self._say("temptation")
            if self.rng.random() < 0.8:
                return self._say("agreement", topic=self.item.topic)
        step = self._own_step()
        if step is None and self.rng.random() < 0.5:
            return (
                self.previous
                if self.previous and self.rng.random() < 0.5
                else self._say("anecdote")
            )
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
        item = self.item
        myth = {"value": item.myth, "entity": item.entity, "attribute": item.attribute}
        if "claim" not in self.said:
            if self.rng.random() < 0.3:
                self.said.add("claim")
                return self._say("boast", **myth)
            return self._claim(self.item.myth)
        return self._one_of({"evidence": myth, "boast": myth, "anecdote": {}, "vague": {}})

    def _claim(self, value: str) -> str:
        return self._say(
            "claim", value=value, entity=self.item.entity, attribute=self.item.attribute
        )

    def _one_of(self, choices: dict[str, dict[str, str]]) -> str | None:
        """Return a sentence of a kind not yet said; None now and then, and when all are said."""
        kinds = [kind for kind in choices if kind not in self.said]
        if not kinds or self.rng.random() < 0.22:
            return None
        kind = self.rng.choice(kinds)
        return self._say(kind, **choices[kind])
