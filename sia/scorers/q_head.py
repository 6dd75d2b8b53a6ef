"""Values of all candidates from the language model's own hidden state, without a second model.

Q(s, y) = u_y · f(h_s) + b_y, with the hidden state h_s that decoding computes anyway, a small
network f, and a vector u_y of low rank for every token. Distilled from the values of another scorer
(`sia.fit_q_head`). One pass gives the values of the whole vocabulary in FUDGE (Yang
and Klein, 2021), in the prefix scorer of controlled decoding (Mudgal et al., 2024) and in FaRMA
(Rashid et al., 2025) too.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from sia._checkpoints import read_checkpoint, refuse_other_content, write_checkpoint
from sia._model_identity import ModelIdentity
from sia.cost import Meter
from sia.scorers.base import HiddenStateSession, Scorer
from sia.scorers.candidate_values import CandidateValues

Q_HEAD_FILE = "q_head"


class QHead(Scorer):
    """Scorer that reads the language model's own hidden state; others are refused.

    Args:
        values: The head.
        model: The language model that it was fitted to.
    """

    values_responses = False

    def __init__(self, values: CandidateValues, model: ModelIdentity) -> None:
        self.values, self.model = values.eval().requires_grad_(False), model

    @property
    @override
    def vocabulary_size(self) -> int:
        return self.values.sizes["vocabulary"]

    @override
    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> "QHeadSession":
        return QHeadSession(self, len(prompts) * samples)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the head into a folder: weights (safetensors), sizes and model (JSON)."""
        settings = {"sizes": self.values.sizes, "model": asdict(self.model)}
        write_checkpoint(path, Q_HEAD_FILE, self.values.state_dict(), settings)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        subfolder: str = "",
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Read what `save_pretrained` wrote.

        Args:
            path: Local folder or Hub id.
            subfolder: Folder within `path`.
            revision: Revision of the Hub repository.
            device: Device of the language model.

        Raises:
            FileNotFoundError: If there is no such folder or a file is missing.
            ValueError: If a file is damaged or of other content.
        """
        weights, settings = read_checkpoint(path, Q_HEAD_FILE, subfolder, revision)
        with refuse_other_content(path, Q_HEAD_FILE):
            values = CandidateValues.from_weights(weights, settings["sizes"])
            return cls(values.to(device), ModelIdentity.from_settings(**settings["model"]))


class QHeadSession(HiddenStateSession):
    """Values along one batch of responses, from the hidden states of each step."""

    def __init__(self, head: QHead, rows: int) -> None:
        self.head, self.hidden = head, torch.empty(0)
        self.device = head.values.linear.weight.device
        self.meters = [Meter(head.values.architecture, rows, self.device)]

    @override
    def check_model(self, model: PreTrainedModel) -> None:
        self.head.model.check(model, "Q-head")

    @override
    def observe(self, hidden: Tensor) -> None:
        self.hidden = hidden

    @override
    @torch.inference_mode()
    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        rows = rows.to(self.device)
        once, none = torch.ones_like(rows), torch.zeros_like(rows)
        self.meters[0].count(rows, none, none, once, once)
        return self.head.values(self.hidden.to(self.device), candidates.to(self.device))

    @override
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError(
            "a Q-head values candidates from the language model's hidden state, it cannot value "
            "whole responses: expected a reward model or value model"
        )

    @override
    def reorder(self, sources: Tensor) -> None:
        """Nothing is kept from step to step."""
