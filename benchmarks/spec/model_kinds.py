"""Identity of a model within a profile, apart from its family and replicate."""

from __future__ import annotations

from dataclasses import dataclass

LOSSES = ("mean", "token")  # of value models: the paper's, and per token
SIZES = ("small", "large")  # besides the usual one
# fitted to a language model and a value model of one loss: the predictor of the junction gate, and
# heads that score candidates without branches of a value model
JUNCTION, Q_HEAD, VOCABULARY = FITTED = ("junction", "q-head", "vocabulary-value")
WITH_VARIANTS = ("base", "value", "heads", "unseen-junction", *FITTED)


@dataclass(frozen=True)
class ModelKind:
    """A kind of model or scorer; `str(kind)` is its label in tables, profiles and paths.

    Args:
        name: Role of the model: base, instruct, reward, value, … (see `benchmarks.spec.methods`).
        loss: Training loss of a value model, or of the value model that a head or predictor was
            fitted to: one of LOSSES.
        size: One of SIZES; empty for the usual size.
        world: World of the lab on whose corpus the base model was trained further; empty for its
            own.
    """

    name: str
    loss: str = ""
    size: str = ""
    world: str = ""

    def __str__(self) -> str:
        parts = (self.name, self.loss, self.size)
        return "-".join(filter(None, parts)) + (f"@{self.world}" if self.world else "")

    @classmethod
    def parse(cls, label: str) -> ModelKind:
        """Return the kind with this label, such as `value-token@few-decoys`."""
        stem, _, world = label.partition("@")
        name = next((n for n in WITH_VARIANTS if f"{stem}-".startswith(f"{n}-")), "")
        if not name:
            return cls(stem, world=world)
        words = stem.removeprefix(name).split("-")
        loss = next((word for word in words if word in LOSSES), "")
        size = next((word for word in words if word in SIZES), "")
        return cls(name, loss, size, world)

    @property
    def base(self) -> ModelKind:
        """The base model that this kind starts from."""
        return ModelKind("base", size=self.size, world=self.world)


def teacher_of(label: str) -> str:
    """Return the label of a value model, or of the one that a head was fitted to; empty if none."""
    kind = ModelKind.parse(label)
    if kind.name in FITTED:
        return str(value_kind(kind.loss))
    return label if kind.name == "value" else ""


BASE = ModelKind("base")
INSTRUCT = ModelKind("instruct")


def value_kind(loss: str, size: str = "", world: str = "") -> ModelKind:
    """Return the kind of a value model.

    Args:
        loss: Loss that it is trained with.
        size: Size of its base model; empty for the usual one.
        world: Corpus of its base model; empty for the replicate's own.
    """
    return ModelKind("value", loss, size, world)
