"""What the lab's replicates and the models of the Hub have in common as subjects of measurement."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.spec.profile import Profile
from sia import Generation, Never, Steering, generate
from sia.signals import Signal


class Subject:
    """Has a profile, a tokenizer of its language models, and a batch size; responds by them."""

    profile: Profile
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    def respond(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seed: int | Sequence[int],
        steering: Steering | None = None,
        observe: Sequence[Signal] = (),
        value_prompts: Sequence[Sequence[int]] | None = None,
    ) -> list[Generation]:
        """A response to each prompt by the profile's decoding settings; unsteered by default."""
        decoding = self.profile.decoding
        return generate(
            model,
            self.tokenizer,
            prompts,
            steering or Steering(None, Never(), candidates=decoding.candidates),
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            seed=seed,
            batch_size=self.batch_size,
            progress=False,
            observe=observe,
            value_prompts=value_prompts,
        )
