"""Autoregressive reward models, which value a candidate by its log-probability (GenARM)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from sia._kv_cache import backbone_of, input_device
from sia._prefix_cache import CachedPrefixes, logits_forward
from sia.scorers.base import Scorer, Session
from sia.scorers.loading import unwrap_decoder


class AutoregressiveScorer(Scorer):
    """Values ln π_r(candidate | prompt, response so far) of an autoregressive reward model π_r.

    Steering with β at every token samples from π·π_r^β: GenARM (Xu et al., "GenARM: Reward guided
    generation with autoregressive reward model", 2025), whose 1/β is ours. One forward pass over
    the prefix gives the values of all candidates.

    Args:
        model: Trained so that Σ_t ln π_r(y_t | x, y_<t) is the reward of a response; also one
            wrapped by PEFT.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = unwrap_decoder(model)

    @property
    @override
    def vocabulary_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @override
    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> "AutoregressiveSession":
        return AutoregressiveSession(self.model, prompts, max_new_tokens, samples)


class AutoregressiveSession(Session):
    """Log-probabilities at the end of cached prefixes; for whole responses, their sums."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        self.prefixes = CachedPrefixes(
            model,
            backbone_of(model),
            logits_forward(model),
            model.get_output_embeddings(),
            prompts,
            max_new_tokens,
            samples,
        )
        self.meters = [self.prefixes.meter]
        # sums[row, t]: ln π_r of the first t tokens, known up to t = summed[row]
        self.sums = torch.zeros(
            len(self.prefixes.cached),
            max_new_tokens + 1,
            dtype=torch.float32,
            device=input_device(model),
        )
        self.summed = torch.zeros_like(self.prefixes.cached)

    @override
    @torch.inference_mode()
    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        logits = self.prefixes.last(rows, responses, torch.full_like(rows, responses.shape[1]))
        return logits.log_softmax(-1).gather(1, candidates.to(logits.device))

    @override
    @torch.inference_mode()
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        device = self.sums.device
        rows, responses, lengths = rows.to(device), responses.to(device), lengths.to(device)
        for step in range(int(self.summed[rows].min()), int(lengths.max())):
            due = (self.summed[rows] == step) & (step < lengths)
            due_rows, tokens = rows[due], responses[due, : step + 1]
            if len(due_rows):
                gain = self.score(due_rows, tokens[:, :step], tokens[:, step:]).squeeze(1)
                self.sums[due_rows, step + 1] = self.sums[due_rows, step] + gain.to(device)
                self.summed[due_rows] = step + 1
        return self.sums[rows, lengths]

    @override
    @torch.inference_mode()
    def reorder(self, sources: Tensor) -> None:
        self.prefixes.reorder(sources)
        sources = sources.to(self.sums.device)
        self.sums, self.summed = self.sums[sources], self.summed[sources]
