"""Subjects of measurement: the interface of the lab's replicates and the models of the Hub."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Self

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.spec.cells import Condition
from benchmarks.spec.model_kinds import JUNCTION, Q_HEAD, VOCABULARY
from benchmarks.spec.profile import Hardware, Profile
from sia import (
    Generation,
    JunctionGate,
    QHead,
    RewardScorer,
    Steering,
    ValueModel,
    VocabularyValueModel,
    generate,
)
from sia.signals import Signal

Fitted = JunctionGate | QHead | VocabularyValueModel
FITTED_CLASSES: dict[str, type[Fitted]] = {
    JUNCTION: JunctionGate,
    Q_HEAD: QHead,
    VOCABULARY: VocabularyValueModel,
}


class Subject(ABC):
    """Models that answer prompts, with whatever encodes, steers and scores their responses.

    A kind of model is named as in cells: base, instruct, reward, value-mean, …. Prompts are of a
    type of the subject's own, which others pass on as they are.

    Attributes:
        profile: Settings of the run.
        tokenizer: Tokenizer of the language models.
        batch_size: Responses decoded together.
        models_kept: Number of models that a worker keeps in memory.
        reward_strength: Factor of β where rewards take the place of values.
        traced_losses: Losses of the value models whose divergence traces report.
    """

    profile: Profile
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    models_kept: int
    reward_strength: float
    traced_losses: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def open(cls, profile: Profile, replicate: int) -> Self:
        """Return the subject of a profile; `replicate` counts where there are several."""

    @classmethod
    def prepare(
        cls, profile: Profile, cells: Iterable[Condition], requested: Hardware, gpus: int | None
    ) -> tuple[Profile, dict]:
        """Get ready to measure `cells`, before any worker starts.

        Args:
            profile: Settings of the run.
            cells: Everything that will be measured.
            requested: Hardware of the run; what is empty or 0 is to be detected.
            gpus: GPUs of the cluster; None: ask this machine.

        Returns:
            The profile as it is measured, and what the tables say of that in their provenance.
        """
        return profile, {}

    @classmethod
    def gpus_each(cls, profile: Profile) -> int:
        """Return the GPUs that a worker takes, of those of this machine."""
        return 1

    @abstractmethod
    def digest_of(self, cell: Condition) -> str:
        """Return the digest of all that decides what the models of a cell say."""

    @abstractmethod
    def prompts_of(self, split: str, objective: str) -> list:
        """Return the prompts of one objective in the split "test" or "validation"."""

    @abstractmethod
    def encode(self, prompts: Sequence, kind: str) -> list[list[int]]:
        """Return the token ids of prompts in the template of a kind of model."""

    @abstractmethod
    def conversations(
        self, prompts: Sequence, responses: Sequence[Generation], kind: str
    ) -> list[list[int]]:
        """Return the token ids of prompts with their responses, as a reward model reads them."""

    @abstractmethod
    def language_model(self, kind: str, family: str) -> PreTrainedModel:
        """Load a language model."""

    @abstractmethod
    def reward_model(self, kind: str) -> PreTrainedModel:
        """Load a reward model, a sequence classifier with one label."""

    @abstractmethod
    def value_model(self, kind: str, family: str) -> ValueModel:
        """Load a value model."""

    @abstractmethod
    def fitted(self, kind: str, family: str) -> Fitted:
        """Load what is fitted to the base model and a value model (kinds of `FITTED_CLASSES`)."""

    @abstractmethod
    def reward_scorer(
        self, language_model: PreTrainedModel, reward_model: PreTrainedModel
    ) -> RewardScorer:
        """Return the scorer of candidates by a reward model, beside this language model."""

    @abstractmethod
    def scores(
        self,
        prompts: Sequence,
        responses: Sequence[Generation],
        first: Sequence[int],
        numbers: Sequence[int],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> dict[str, np.ndarray | list]:
        """Return the metrics of responses, each `(responses,)`.

        Args:
            prompts: Prompt of each response.
            responses: Responses to score.
            first: Indices of the first response to each prompt.
            numbers: For each response, the index in `first` of its prompt.
            reward_model: Function that returns the reward model of a kind.
        """

    @abstractmethod
    def score(
        self,
        prompts: Sequence,
        responses: Sequence[Generation],
        reward_model: Callable[[str], PreTrainedModel],
    ) -> np.ndarray:
        """Return the profile's score of responses, float32 `(responses,)`."""

    def words(self, tokens: Sequence[int]) -> list[str]:
        """Return how token ids are written, with the spaces before them."""
        pieces = self.tokenizer.convert_ids_to_tokens(list(tokens))
        texts = [str(self.tokenizer.decode([token])) for token in tokens]
        # some decoders drop the space of a first token
        return [
            f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
            for piece, text in zip(pieces, texts, strict=True)
        ]

    def respond(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seed: int | Sequence[int],
        steering: Steering | None = None,
        observe: Sequence[Signal] = (),
        value_prompts: Sequence[Sequence[int]] | None = None,
    ) -> list[Generation]:
        """Return a response to each prompt by the profile's decoding settings."""
        decoding = self.profile.decoding
        return generate(
            model,
            self.tokenizer,
            prompts,
            steering,
            candidates=None if steering else decoding.candidates,
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            seed=seed,
            batch_size=self.batch_size,
            progress=False,
            observe=observe,
            value_prompts=value_prompts,
        )
