"""The lab world: prompts, and responses of mixed quality, all drawn from one seed.

Rules that keep the lab honest: most many-way choices (names, adjectives, manners) mean nothing to
the judge; some choices that mean much are bad habits of low entropy; responses drift between a
careful and a careless mood, repeat themselves and break off. Nothing here depends on what steering
does to it.
"""

import random
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from benchmarks.spec.cells import OBJECTIVES
from benchmarks.subjects.lab.grammar import Grammar
from benchmarks.subjects.lab.items import Item, Prompt, read_items, read_lexicon
from benchmarks.subjects.lab.writer import Writer, corrupt

MEANING = frozenset(
    {"verb", "object", "victim", "alternative", "value", "entity", "attribute", "topic"}
)


@dataclass(frozen=True)
class WorldConfig:
    """Settings of a world.

    Attributes:
        seed: Seed of everything that the world draws.
        lexicon: Its words and sentences, a file of lexicons/.
        stumbles: First words of a sentence among which errors happen, and after which responses
            break off; 0: any.
        sentences: Numbers of sentences that a response is planned with, each as likely.
        decoys: Amount of material that means nothing.
        habits: Frequencies of bad answers, spread over the items.
        drift: Probability, at each sentence, of becoming careless.
        recovery: Probability, at each sentence, of becoming careful again.
        zipf: Exponent of the popularity of decoy words; 0: all alike.
    """

    seed: int = 0
    lexicon: str = "words"
    stumbles: int = 0
    sentences: tuple[int, ...] = (4, 5, 6)
    decoys: float = 1.0
    habits: tuple[float, ...] = (0.15, 0.35, 0.5, 0.7, 0.93)
    drift: float = 0.16
    recovery: float = 0.14
    zipf: float = 0.7


class World:
    """Everything that a seed decides: popularity of words, how often items are answered badly."""

    def __init__(self, config: WorldConfig) -> None:
        """Draw the world."""
        self.config = config
        self.lexicon = read_lexicon(config.lexicon)
        self.items = read_items(self.lexicon)
        rng = random.Random(f"world {config.seed}")
        self.carelessness = self._draw_habits(rng)
        slots = {
            name: self._popularity(words, rng) for name, words in self.lexicon["decoys"].items()
        }
        contents = {name: sorted(words) for name, words in self._contents().items()}
        equal = self.lexicon["variants"] | contents
        slots |= {name: dict.fromkeys(words, 1.0) for name, words in equal.items()}
        self.grammar = Grammar(
            self.lexicon["sentences"], slots, MEANING, optional=min(0.9, 0.35 * config.decoys)
        )

    @cached_property
    def words(self) -> list[str]:
        """Every word of every prompt and response, sorted."""
        templates = chain.from_iterable(self.lexicon["prompts"].values())
        template_words = {word for word in " ".join(templates).split() if "{" not in word}
        return sorted(self.grammar.words() | template_words | {"?", "for"})

    def prompt(
        self, rng: random.Random, objective: str | None = None, harmful: bool | None = None
    ) -> Prompt:
        """Draw a prompt.

        Args:
            rng: Source of the choices.
            objective: Objective of the item; None: any.
            harmful: In harmlessness, True for a harmful item, False for one that looks harmful;
                None: 3 to 2 by chance.
        """
        objective = objective or rng.choice(OBJECTIVES)
        if harmful is None:
            harmful = rng.random() < 0.6
        kind = {"helpfulness": "howto", "honesty": "fact"}.get(objective) or (
            "harmful" if harmful else "benign"
        )
        item = rng.choice([item for item in self.items if item.kind == kind])
        forms = self.lexicon["prompts"]
        family = "fact" if kind == "fact" else "howto"
        template = [rng.choice(forms[form]) for form in ("prefix", family, f"suffix_{family}")]
        text = self.grammar.fill(" ".join(template), rng, topic=item.topic)
        return Prompt(f"{text} ?", item)

    def prompts(
        self, rng: random.Random, count: int, objective: str, avoid: set[str] = frozenset()
    ) -> list[Prompt]:
        """Draw different prompts of one objective; of five in harmlessness, three are harmful.

        Raises:
            ValueError: If there are fewer than `count` whose text is not in `avoid`.
        """
        prompts: dict[str, Prompt] = {}
        for _ in range(200 * count + 1000):
            if len(prompts) == count:
                return list(prompts.values())
            prompt = self.prompt(rng, objective, harmful=len(prompts) % 5 < 3)
            if prompt.text not in avoid:
                prompts.setdefault(prompt.text, prompt)
        raise ValueError(
            f"the world has fewer than {count} different prompts for {objective} "
            "outside the ones to avoid"
        )

    def response(self, item: Item, rng: random.Random) -> str:
        """Draw an answer of the base corpus: of mixed quality, drifting, sometimes broken off."""
        config, writer = self.config, Writer(self.grammar, self.items, item, rng)
        sentences: list[str] = []
        careless = rng.random() < self.carelessness[item.topic]
        if rng.random() < 0.3 * config.decoys:
            sentences.append(self.grammar.write("greeting", rng))
        for _ in range(rng.choice(config.sentences)):
            if sentences and rng.random() < 0.1 * config.decoys:
                sentences.append(self.grammar.write("filler", rng))
                continue
            sentence = writer.sentence(careless)
            if sentence is None:
                break
            if careless and rng.random() < 0.15:
                sentence = corrupt(sentence, rng, config.stumbles)
            sentences.append(sentence)
            careless = (
                rng.random() < config.drift if not careless else rng.random() >= config.recovery
            )
        if not careless and rng.random() < 0.6:
            sentences.append(self.grammar.write("farewell", rng))
        elif careless and sentences and rng.random() < 0.3:
            words = sentences.pop().split()
            most = min(len(words), (config.stumbles or len(words)) + 1)
            sentences.append(" ".join(words[: rng.randrange(1, most)]))
        return " ".join(sentences)

    def _draw_habits(self, rng: random.Random) -> dict[str, float]:
        """Return by topic the probability that a response begins careless."""
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
            "value": {value for item in facts for value in (*item.truths, *item.myths)},
            "entity": {item.entity for item in facts},
            "attribute": {item.attribute for item in facts},
        }
