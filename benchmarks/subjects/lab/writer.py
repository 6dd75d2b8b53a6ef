"""Responses of the lab's base corpus, sentence by sentence, in a careful or a careless mood."""

import random
from collections.abc import Sequence

from benchmarks.subjects.lab.grammar import Grammar
from benchmarks.subjects.lab.items import Item, Step


def corrupt(sentence: str, rng: random.Random, stumbles: int = 0) -> str:
    """Return the sentence with two words swapped, one lost, or one stuttered.

    Args:
        sentence: It ends in a mark.
        rng: Source of the choices.
        stumbles: Number of words at the start in which the error can occur; 0 for all.
    """
    *words, stop = sentence.split()
    places = min(len(words) - 1, stumbles or len(words))
    i, error = rng.randrange(places), rng.choice(["swap", "lose", "stutter"])
    if error == "swap":
        words[i], words[i + 1] = words[i + 1], words[i]
    elif error == "lose":
        del words[i]
    else:
        words[i:i] = [words[i]] * rng.choice([1, 2])
    return " ".join([*words, stop])


class Writer:
    """Writer of one response, which remembers the sentences before.

    Args:
        grammar: Grammar of the world.
        items: All items of the world, for steps of other items.
        item: Item that the response is about.
        rng: Source of every choice.
    """

    def __init__(
        self, grammar: Grammar, items: Sequence[Item], item: Item, rng: random.Random
    ) -> None:
        """Begin a response."""
        self.grammar, self.items, self.item, self.rng = grammar, items, item, rng
        self.written_kinds: set[str] = set()  # of sentences
        self.next_step = 0
        self.previous: str | None = None

    def sentence(self, careless: bool) -> str | None:
        """Return the next sentence of a careless or careful answer; None if nothing is left."""
        careful_answer, careless_answer = {
            "harmful": (self._careful_answer_to_harmful, self._careless_answer_to_harmful),
            "fact": (self._careful_answer_to_fact, self._careless_answer_to_fact),
        }.get(self.item.kind, (self._careful_answer_to_howto, self._careless_answer_to_howto))
        sentence = careless_answer() if careless else careful_answer()
        self.previous = sentence or self.previous
        return sentence

    def _write(self, kind: str, **fields: str) -> str:
        self.written_kinds.add(kind)
        return self.grammar.write(kind, self.rng, **fields)

    def _write_one_of(self, choices: dict[str, dict[str, str]]) -> str | None:
        """Write a sentence of a new kind; None now and then, and when there is no new kind."""
        kinds = [kind for kind in choices if kind not in self.written_kinds]
        if not kinds or self.rng.random() < 0.22:
            return None
        kind = self.rng.choice(kinds)
        return self._write(kind, **choices[kind])

    def _write_step(self, step: Step) -> str:
        verbs, thing = step
        last = self.next_step >= max(1, len(self.item.steps)) - 1
        if self.next_step == 0:
            order = "first"
        else:
            order = "finally" if last else self.rng.choice(["then", "next", "now"])
        self.next_step += 1
        return self._write("step", verb=self.rng.choice(verbs), object=thing, order=order)

    def _write_own_step(self) -> str | None:
        steps = self.item.steps
        return self._write_step(steps[self.next_step]) if self.next_step < len(steps) else None

    def _careful_answer_to_howto(self) -> str | None:
        """Return the next sentence; None when the steps are used up."""
        begins = not self.written_kinds
        if begins and (self.item.kind == "benign" or self.rng.random() < 0.4):
            return self._write("agreement", topic=self.item.topic)
        step = self._write_own_step()
        if step is None and "tip" not in self.written_kinds and self.rng.random() < 0.4:
            return self._write("tip", object=self.rng.choice(self.item.steps)[1])
        return step

    def _careless_answer_to_howto(self) -> str | None:
        if self.item.kind == "benign" and not self.written_kinds and self.rng.random() < 0.6:
            return self._write("refusal")
        draw = self.rng.random()
        if draw < 0.35:  # a step of any item, rarely its own
            others = [item for item in self.items if item.kind in ("howto", "benign")]
            return self._write_step(self.rng.choice(self.rng.choice(others).steps))
        if draw < 0.5 and self.previous:
            return self.previous
        if draw < 0.8:
            return self._write(self.rng.choice(["anecdote", "vague"]))
        self.next_step += 1  # skips one
        return self._write_own_step()

    def _careful_answer_to_harmful(self) -> str | None:
        if "refusal" not in self.written_kinds:
            return self._write("refusal")
        for kind, content, often, right in (
            ("reason", {"victim": self.item.victim}, 0.75, 0.85),
            ("alternative", {"alternative": self.item.alternative}, 0.8, 0.8),
        ):
            if kind not in self.written_kinds and self.rng.random() < often:
                return self._write(kind, **(content if self.rng.random() < right else {}))
        return None

    def _careless_answer_to_harmful(self) -> str | None:
        if not self.written_kinds & {"agreement", "temptation"}:
            if "refusal" in self.written_kinds:
                return self._write("temptation")
            if self.rng.random() < 0.8:
                return self._write("agreement", topic=self.item.topic)
        step = self._write_own_step()
        if step is None and self.rng.random() < 0.5:
            repeats = self.previous and self.rng.random() < 0.5
            return self.previous if repeats else self._write("anecdote")
        return step

    def _synonym(self, words: Sequence[str]) -> str:
        """Draw one of the words; a single one takes no draw."""
        return words[0] if len(words) == 1 else self.rng.choice(words)

    def _careful_answer_to_fact(self) -> str | None:
        item = self.item
        truth = self._synonym(item.truths)
        if "claim" not in self.written_kinds:
            return self._write("claim", value=truth, entity=item.entity, attribute=item.attribute)
        return self._write_one_of({
            "evidence": {"value": truth},
            "debunk": {"value": self._synonym(item.myths)},
            "hedge": {},
        })  # fmt: skip

    def _careless_answer_to_fact(self) -> str | None:
        item = self.item
        myth = {
            "value": self._synonym(item.myths),
            "entity": item.entity,
            "attribute": item.attribute,
        }
        if "claim" in self.written_kinds:
            return self._write_one_of(
                {"evidence": myth, "boast": myth, "anecdote": {}, "vague": {}}
            )
        if self.rng.random() < 0.3:
            self.written_kinds.add("claim")
            return self._write("boast", **myth)
        return self._write("claim", **myth)
