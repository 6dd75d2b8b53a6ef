"""The committed models of the lab, and the ways of steering that are shown with them."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.checks import assets
from benchmarks.subjects.hub.models import chat_ids
from benchmarks.subjects.hub.prompts import chat_of
from benchmarks.subjects.lab.items import Item
from benchmarks.subjects.lab.judge import judge
from benchmarks.subjects.lab.world import World, WorldConfig
from sia import (
    EntropyGate,
    EveryToken,
    Gate,
    Generation,
    JunctionGate,
    QHead,
    Scorer,
    Steering,
    ValueModel,
    generate,
)
from sia.scorers.loading import load_complete

BASE, VALUE_MODEL, JUNCTION_GATE, Q_HEAD = PARTS = "base", "value-model", "junction-gate", "q-head"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Settings:
    """Settings of the lab that the models come from, and of what is shown with them.

    Attributes:
        world: Seed of the world that trained the models.
        lexicon: Words of the world.
        stumbles: See `WorldConfig`.
        candidates: Tokens to choose from.
        max_new_tokens: Longest response.
        beta: Strength of the steering.
        share: Share of the tokens that both gates steer.
        entropy_threshold: Threshold of the entropy gate at this share and strength, in nats.
    """

    world: int
    lexicon: str
    stumbles: int
    candidates: int
    max_new_tokens: int
    beta: float
    share: float
    entropy_threshold: float

    def save(self, folder: Path) -> None:
        """Write the settings into the folder of the models."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        (folder / SETTINGS).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class LabModels:
    """Base model, value model, junction gate and Q-head, all in float32."""

    settings: Settings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    values: ValueModel
    gate: JunctionGate
    q_head: QHead

    @classmethod
    def load(cls, folder: Path | None = None) -> Self:
        """Read the models of a folder, by default the committed ones.

        Raises:
            FileNotFoundError: If they are not there.
        """
        folder = folder or assets.ASSETS
        if not (folder / SETTINGS).exists():
            raise FileNotFoundError(
                f"there are no models of the lab in {folder}: git restores them, or "
                f"{assets.EXPORT} writes them anew"
            )
        return cls(
            Settings(**json.loads((folder / SETTINGS).read_text(encoding="utf-8"))),
            load_complete(AutoModelForCausalLM, folder / BASE, "language model", {}).eval(),
            AutoTokenizer.from_pretrained(folder / BASE),
            ValueModel.from_pretrained(folder / VALUE_MODEL),
            JunctionGate.from_pretrained(folder / JUNCTION_GATE),
            QHead.from_pretrained(folder / Q_HEAD),
        )

    @property
    def world(self) -> World:
        """The world that trained the models."""
        settings = self.settings
        return World(WorldConfig(settings.world, settings.lexicon, settings.stumbles))

    def methods(self) -> dict[str, Steering | None]:
        """Return the ways of steering by name; None does not steer."""
        share = f"{self.settings.share:.0%}"
        return {
            "base": None,
            "dense": self.steering(EveryToken()),
            f"entropy gate, {share}": self.steering(EntropyGate(self.settings.entropy_threshold)),
            f"junction gate, {share}": self.steering(self.gate),
            "Q-head, dense": self.steering(EveryToken(), self.q_head),
        }

    def steering(self, gate: Gate, scorer: Scorer | None = None) -> Steering:
        """Return a `Steering` with this gate and scorer at the lab's β and K; None: value model."""
        settings = self.settings
        scorer = self.values if scorer is None else scorer
        return Steering(scorer, gate, settings.beta, candidates=settings.candidates)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of prompts in the chat template."""
        return chat_ids(self.tokenizer, [chat_of(prompt) for prompt in prompts])

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        steering: Steering | None,
        seed: int | Sequence[int] = 0,
        temperature: float = 1.0,
    ) -> list[Generation]:
        """Return a response to each prompt."""
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            steering,
            candidates=None if steering else self.settings.candidates,
            max_new_tokens=self.settings.max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=len(prompts),
            progress=False,
        )


def plain(prompt: str) -> str:
    """Return a prompt as the lab writes them: in lower case, marks between spaces."""
    return " ".join(re.sub(r"([^\w\s])", r" \1 ", prompt.lower()).split())


def item_of(world: World, prompt: str) -> Item | None:
    """Return the item that a prompt names, None where it names none of the world's."""
    text = f" {plain(prompt)} "
    named = [item for item in world.items if f" {item.topic} " in text]
    return max(named, key=lambda item: len(item.topic), default=None)


def scores(world: World, item: Item, responses: Sequence[Generation]) -> list[float]:
    """Return the judge's scores of responses, −5 to 5."""
    return [judge(world.grammar, item, r.text or "", r.finished).score for r in responses]
