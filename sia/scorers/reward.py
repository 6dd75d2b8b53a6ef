"""Trajectory reward models, asked about prefix + candidate + what closes a response.

The reward of a response, however it is read (candidates, partial responses, searches,
`scripts/annotate_rewards.py`): the model's logit at the last token of prompt, response without its
end token, and `closing`, which is the end token and whatever the chat template writes after it.
For a finished response that is `apply_chat_template` of the whole conversation, as model cards have
it, as long as the prompt is all that the template writes before the answer. Encoders read the same
tokens in their own way.

Steering every token with a reward model is ARGS (Khanov, Burapacheep and Li, "ARGS: Alignment as
reward-guided search", 2024).
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self, cast

from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typing_extensions import override

from sia._inputs import TEMPLATE_ERRORS
from sia._kv_cache import backbone_of
from sia._numbers import python_value
from sia.scorers.adapters import load_complete
from sia.scorers.closed import ClosedScorer, outside_backbone
from sia.scorers.loading import tokenizer_beside, unwrap

ANSWER = "seventeen zebras"  # no template has these words of its own


class RewardScorer(ClosedScorer):
    """A trajectory reward model: the reward of the response if it ended after the candidate.

    Decoder models keep the prefix in a cache; others (encoders) are given whole sequences. The
    reward is read at the last token of the closing (transformers itself reads one token earlier
    where the model pads with that token).

    Args:
        model: Any `AutoModelForSequenceClassification` with one label, also one wrapped by PEFT.
            The head of a decoder, `score`, may have several layers.
        eos_token_id: Ends a response; by default the one of the model's config.
        stop_tokens: Other tokens that end a response, besides those of the language model; the
            reward model reads the closing in their place.
        closing: What follows a response, as `closing_tokens(tokenizer)` reads it from a chat
            template. If nothing is named, `generate`, the searches and `SteeredGenerate` take it
            from their tokenizer; without one it is `eos_token_id` alone.

    Raises:
        ValueError: If the model has several labels or no single EOS within its vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_id: int | None = None,
        *,
        stop_tokens: Sequence[int] = (),
        closing: Sequence[int] | None = None,
    ) -> None:
        model = unwrap(model)
        config = model.config.get_text_config()
        if (labels := _label_count(model)) != 1:
            raise ValueError(
                f"a reward model must have one label, {type(model).__name__} has {labels}"
            )
        self.names_eos = eos_token_id is not None
        closing = None if closing is None else [python_value(token) for token in closing]
        if eos_token_id is None:
            eos_token_id = config.eos_token_id
            if closing and not isinstance(eos_token_id, int):
                eos_token_id = closing[0]
        eos_token_id = python_value(eos_token_id)
        if not isinstance(eos_token_id, int):
            raise ValueError(
                f"a reward model needs one eos_token_id, its config has {eos_token_id!r}: "
                "name it as eos_token_id"
            )
        if closing is not None and len(closing) == 0:
            raise ValueError("closing needs at least one token, that which ends a response")
        self.eos_token_id, self.names_closing = eos_token_id, closing is not None
        closing = [eos_token_id] if closing is None else closing
        own = eos_token_id if eos_token_id in closing else closing[0]
        for name, token in (("eos_token_id", eos_token_id), *(("closing", t) for t in closing)):
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"{name} must be below the vocabulary of {config.vocab_size} tokens, "
                    f"got {token}"
                )
        super().__init__(model, closing, {eos_token_id, own, *stop_tokens})

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        eos_token_id: int | None = None,
        *,
        stop_tokens: Sequence[int] = (),
        closing: Sequence[int] | None = None,
        **options: Any,
    ) -> Self:
        """Load a reward model, and its closing from the chat template beside it.

        Args:
            path: Local folder or Hub id.
            eos_token_id: Ends a response; by default the one of the model's config.
            stop_tokens: Same as in the class.
            closing: Same as in the class; by default that of the chat template at `path`.
            **options: For transformers' from_pretrained (dtype, device_map, revision, …).

        Raises:
            OSError: If it is not there.
            ValueError: If weights are damaged or missing, the head's too: none are made up.
        """
        model = load_complete(AutoModelForSequenceClassification, path, "reward model", options)
        tokenizer = tokenizer_beside(path, options)
        if closing is None and tokenizer is not None and tokenizer.chat_template:
            closing = closing_tokens(tokenizer)
        scorer = cls(model, eos_token_id, stop_tokens=stop_tokens, closing=closing)
        scorer.tokenizer = tokenizer
        return scorer

    @override
    def closed_by(
        self, tokenizer: PreTrainedTokenizerBase | None, stop_tokens: Collection[int] = ()
    ) -> Self:
        """Return the scorer with the closing of a tokenizer's template, unless it names its own.

        A template that ends responses in other tokens than `eos_token_id` of the caller changes no
        closing.
        """
        closed = super().closed_by(tokenizer, stop_tokens)
        if self.names_closing or tokenizer is None or not tokenizer.chat_template:
            return closed
        closing = closing_tokens(tokenizer)
        if self.names_eos and self.eos_token_id not in closing:
            return closed
        scorer = type(self)(
            self.model,
            self.eos_token_id if self.names_eos else None,
            stop_tokens=closed.end_tokens,
            closing=closing,
        )
        scorer.tokenizer = self.tokenizer
        return scorer

    @property
    @override
    def head(self) -> nn.Module | None:
        """The head of a decoder; that of an encoder is no reading of single tokens."""
        return dict(self.model.named_children()).get("score")

    @override
    def read(self, *, last: int, past_key_values: Cache | None, **inputs: Any) -> Tensor:
        outputs = backbone_of(self.model)(
            **inputs,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            return_dict=True,
        )
        rewards = cast(nn.Module, self.head)(outputs.last_hidden_state[:, -last:])
        # the last layer may be on another GPU than the first
        return rewards.float().squeeze(-1).to(inputs["input_ids"].device)


def closing_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    r"""Return what a chat template writes after a response ("<|im_end|>\n" in ChatML).

    Without a template, or one that writes nothing there, it is the tokenizer's EOS.

    Raises:
        ValueError: If the template fails or does not show the answer, or there is no EOS.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
        try:
            text = str(tokenizer.apply_chat_template(chat, tokenize=False))
        except TEMPLATE_ERRORS as error:
            raise ValueError(
                "the chat template of the tokenizer refuses a conversation of one question and "
                f"its answer, so name the closing of the reward model: {error}"
            ) from error
        head, answer, tail = text.rpartition(ANSWER)
        if not answer:
            raise ValueError(
                "the chat template of the tokenizer does not show the answer of a conversation, "
                "so name the closing of the reward model"
            )
        whole, before, alone = (
            tokenizer(part, add_special_tokens=False).input_ids
            for part in (text, head + answer, tail)
        )
        ids = whole[len(before) :] if whole[: len(before)] == before else alone
        if ids:
            return list(ids)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has neither a chat template nor an EOS token")
    return [tokenizer.eos_token_id]


def _label_count(model: PreTrainedModel) -> int | None:
    """Return how many numbers the head gives, whatever the config says."""
    parts = dict(model.named_children())
    heads = [parts["score"]] if "score" in parts else outside_backbone(model)
    linear = [m for head in heads for m in head.modules() if isinstance(m, nn.Linear)]
    return linear[-1].out_features if linear else model.config.num_labels
