"""Process reward models: the probability that a step is good, read after it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Cache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from typing_extensions import override

from sia._inputs import eos_token_ids
from sia._kv_cache import backbone_of
from sia._numbers import whole_number
from sia._prefix_cache import logits_forward
from sia.scorers.adapters import load_complete
from sia.scorers.closed import ClosedScorer, outside_backbone
from sia.scorers.loading import unwrap, unwrap_decoder


class ProcessRewardScorer(ClosedScorer):
    """A token classifier as process reward model: the probability of the good label.

    The response up to the candidate counts as a step: the probability is read at the last of
    `step_tokens` after it or, without any, at the candidate. TRL's PRMTrainer trains such models
    (Uesato et al., "Solving math word problems with process- and outcome-based feedback", 2022;
    Lightman et al., "Let's verify step by step", 2023); Qwen2.5-Math-PRM reads at "<extra_0>".

    Args:
        model: Any `AutoModelForTokenClassification`, also one wrapped by PEFT.
        step_tokens: Tokens that mark the end of a step.
        good_label: Number of the label.
        end_tokens: Tokens that end a response, in whose place `step_tokens` stand; by default
            those of the model's config.

    Raises:
        ValueError: For fewer than two labels, and a label or tokens that the model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        step_tokens: Sequence[int] = (),
        *,
        good_label: int = 1,
        end_tokens: Iterable[int] | None = None,
    ) -> None:
        model = unwrap(model)
        steps = _own_tokens(model, "step_tokens", step_tokens)
        super().__init__(
            model, steps, _end_tokens(model, end_tokens, model.config.get_text_config())
        )
        labels, good_label = model.config.num_labels or 0, whole_number("good_label", good_label)
        if labels < 2:
            raise ValueError(
                f"a process reward model must have at least two labels, {type(model).__name__} "
                f"has {labels}"
            )
        if not 0 <= good_label < labels:
            raise ValueError(
                f"good_label must be 0 to {labels - 1} for this model, got {good_label}"
            )
        self.good_label = good_label

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        step_tokens: Sequence[int] = (),
        *,
        good_label: int = 1,
        **options: Any,
    ) -> Self:
        """Load a process reward model; a checkpoint without its head is refused.

        Args:
            path: Local folder or Hub id.
            step_tokens: Same as in the class.
            good_label: Same as in the class.
            **options: For transformers' from_pretrained (dtype, device_map, revision, …).

        Raises:
            OSError: If it is not there.
            ValueError: If weights are damaged or missing.
        """
        kind = AutoModelForTokenClassification
        model = load_complete(kind, path, "process reward model", options)
        return cls(model, step_tokens, good_label=good_label)

    @property
    @override
    def head(self) -> nn.Module:
        return self._outside_backbone[-1]

    @property
    @override
    def supports_caching(self) -> bool:
        """True if prefixes can be cached, and nothing lies between backbone and head."""
        return len(self._outside_backbone) == 1 and super().supports_caching

    @property
    def _outside_backbone(self) -> list[nn.Module]:
        """The head, and what changes its input."""
        parts = outside_backbone(self.model)
        return [part for part in parts if not isinstance(part, nn.Dropout)]

    @override
    def read(self, *, last: int, past_key_values: Cache | None, **inputs: Any) -> Tensor:
        if past_key_values is None:  # of whole sequences
            logits = self.model(**inputs, return_dict=True).logits[:, -last:]
        else:  # not every class hands positions on
            outputs = backbone_of(self.model)(
                **inputs, past_key_values=past_key_values, use_cache=True, return_dict=True
            )
            logits = self.head(outputs.last_hidden_state[:, -last:])
        # the last layer may be on another GPU than the first
        probabilities = logits.float().softmax(-1)[..., self.good_label]
        return probabilities.to(inputs["input_ids"].device)


class StepTokenScorer(ClosedScorer):
    """A language model as process reward model: the softmax of two tokens after a step.

    The response up to the candidate counts as a step; `step_tokens` follow it, and the
    model's next token says whether it is good. Math-Shepherd: step token "ки", good "+", bad "-"
    (Wang et al., "Math-Shepherd: Verify and reinforce LLMs step-by-step without human
    annotations", 2024). Models that are asked in a further turn have that turn as `step_tokens`.

    Args:
        model: The language model, also one wrapped by PEFT.
        step_tokens: Tokens that mark the end of a step, at the last of which it is read.
        good: Token for a good step.
        bad: Token for a bad step.
        end_tokens: Tokens that end a response, in whose place `step_tokens` stand; by default
            those of the model.

    Raises:
        ValueError: For tokens that the model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        step_tokens: Sequence[int],
        good: int,
        bad: int,
        *,
        end_tokens: Iterable[int] | None = None,
    ) -> None:
        model = unwrap_decoder(model)
        steps = _own_tokens(model, "step_tokens", step_tokens)
        (good,), (bad,) = _own_tokens(model, "good", [good]), _own_tokens(model, "bad", [bad])
        if len(steps) == 0 or good == bad:
            raise ValueError(
                "a step needs at least one token behind it, and a good and a bad token, "
                f"got step_tokens={steps}, good={good}, bad={bad}"
            )
        super().__init__(model, steps, _end_tokens(model, end_tokens, model.generation_config))
        self.good, self.bad = good, bad
        self._logits = logits_forward(model)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, step_tokens: Sequence[int], good: int, bad: int, **options: Any
    ) -> Self:
        """Load a process reward model; a checkpoint without its head is refused.

        Args:
            path: Local folder or Hub id.
            step_tokens: Same as in the class.
            good: Same as in the class.
            bad: Same as in the class.
            **options: For transformers' from_pretrained (dtype, device_map, revision, …).

        Raises:
            OSError: If it is not there.
            ValueError: If weights are damaged or missing.
        """
        model = load_complete(AutoModelForCausalLM, path, "process reward model", options)
        return cls(model, step_tokens, good, bad)

    @property
    @override
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @override
    def read(self, *, last: int, past_key_values: Cache | None, **inputs: Any) -> Tensor:
        logits = self._logits(last=last, past_key_values=past_key_values, **inputs)
        return (logits[..., self.good] - logits[..., self.bad]).sigmoid()


def _own_tokens(model: PreTrainedModel, name: str, tokens: Iterable[int]) -> list[int]:
    """Return tokens of the caller as Python numbers, after checking that the model has them."""
    vocabulary = model.config.get_text_config().vocab_size
    numbers = [whole_number(name, token) for token in tokens]
    for number in numbers:
        if not 0 <= number < vocabulary:
            raise ValueError(
                f"{name} must be at least 0 and below the vocabulary of {vocabulary} tokens, "
                f"got {number}"
            )
    return numbers


def _end_tokens(
    model: PreTrainedModel,
    tokens: Iterable[int] | None,
    config: GenerationConfig | PreTrainedConfig,
) -> list[int]:
    """Return the end tokens of the caller, checked, or those of the config for None."""
    # a config's own may lie beyond the vocabulary: no response ever has them
    return eos_token_ids(config) if tokens is None else _own_tokens(model, "end_tokens", tokens)
