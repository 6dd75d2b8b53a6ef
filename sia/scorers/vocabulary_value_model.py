"""A value model that values the whole vocabulary in one plain cached pass.

A `ValueModel` reads each candidate as a token of its own. Here the value of every candidate comes
from the state before it, by a head of low rank (`sia.scorers.candidate_values`), distilled from the
value model on whose backbone it sits (`sia.fit_vocabulary_value_model`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from typing_extensions import override

from sia._checkpoints import (
    local_folder,
    output_folder,
    read_checkpoint,
    refuse_other_content,
    write_checkpoint,
)
from sia._kv_cache import input_device
from sia._prefix_cache import CachedPrefixes
from sia.scorers.base import Scorer, Session
from sia.scorers.candidate_values import CandidateValues
from sia.scorers.loading import (
    HEADS,
    cast_buffers,
    check_reproducible,
    load_backbone,
    refuse_other_head,
    restore_buffers,
    split_buffers,
    tokenizer_beside,
)

HEAD_FILE = HEADS["vocabulary head"].removesuffix(".json")


class VocabularyValueModel(Scorer):
    """A backbone of its own, and a head that values candidates from the state before them.

    Args:
        backbone: A transformers model without its head.
        values: The head.
    """

    values_responses = False

    def __init__(self, backbone: PreTrainedModel, values: CandidateValues) -> None:
        self.backbone, self.values = backbone, values.eval().requires_grad_(False)

    @property
    @override
    def vocabulary_size(self) -> int:
        return self.values.sizes["vocabulary"]

    @override
    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> "VocabularySession":
        return VocabularySession(self, prompts, max_new_tokens, samples)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the backbone as transformers does, and the head beside it (safetensors).

        The tokenizer, if it is known, is written too.

        Raises:
            ValueError: Before anything is written, if the backbone could not be brought back, or
                the folder holds a value model.
        """
        check_reproducible(self.backbone)
        folder = output_folder(path, "vocabulary head")
        refuse_other_head(folder, "vocabulary head")
        self.backbone.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        weights = self.values.state_dict() | cast_buffers(self.backbone)
        write_checkpoint(path, HEAD_FILE, weights, {"sizes": self.values.sizes})

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, subfolder: str = "", revision: str | None = None, **options: Any
    ) -> Self:
        """Read what `save_pretrained` wrote.

        Args:
            path: Local folder or Hub id.
            subfolder: Folder within `path`.
            revision: Revision of the Hub repository.
            **options: For transformers' from_pretrained (dtype, device_map, …).

        Raises:
            FileNotFoundError: If there is no such folder or a file is missing.
            ValueError: If a file is damaged or of other content.
        """
        folder = local_folder(path, "vocabulary head", subfolder, revision, options)
        state, settings = read_checkpoint(folder, HEAD_FILE)
        weights, buffers = split_buffers(state)
        with refuse_other_content(folder, HEAD_FILE):
            values = CandidateValues.from_weights(weights, settings["sizes"])
        backbone = load_backbone(folder, options)
        restore_buffers(backbone, buffers)
        model = cls(backbone, values.to(input_device(backbone)))
        model.tokenizer = tokenizer_beside(folder, {})
        return model


class VocabularySession(Session):
    """Values along a batch of responses; each call runs one pass over the tokens not cached yet."""

    def __init__(
        self,
        model: VocabularyValueModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        self.values = model.values
        self.prefixes = hidden_prefixes(
            model.backbone, model.values, prompts, max_new_tokens, samples
        )
        self.meters = [self.prefixes.meter]

    @override
    @torch.inference_mode()
    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        lengths = torch.full_like(rows, responses.shape[1])
        hidden = self.prefixes.last(rows, responses, lengths)
        return self.values(hidden, candidates.to(hidden.device))

    @override
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError(
            "a VocabularyValueModel values candidates from the state before them, it cannot value "
            "whole responses: expected a reward model or value model"
        )

    @override
    @torch.inference_mode()
    def reorder(self, sources: Tensor) -> None:
        self.prefixes.reorder(sources)


def hidden_prefixes(
    backbone: PreTrainedModel,
    head: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    samples: int = 1,
) -> CachedPrefixes:
    """Return prefixes whose output is the last hidden states, `(n, hidden)`.

    Args:
        backbone: A transformers model without its head.
        head: Reads the output, for the count of FLOPs.
        prompts: Token ids without padding.
        max_new_tokens: Longest continuation.
        samples: Rows per prompt, in succession.
    """

    def forward(*, last: int, past_key_values: Cache | None, **inputs: Any) -> Tensor:
        outputs = backbone(
            **inputs,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            return_dict=True,
        )
        return outputs.last_hidden_state[:, -last:].to(inputs["input_ids"].device)

    return CachedPrefixes(
        backbone, backbone, forward, head, prompts, max_new_tokens, samples, branching=False
    )
