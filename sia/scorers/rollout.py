"""Candidates valued by rollouts of a language model, as in Transfer Q*.

Chakraborty et al., "Transfer Q Star: Principled decoding for LLM alignment", 2024.
"""

from collections.abc import Collection, Sequence
from copy import copy
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from sia import _sampling
from sia._inputs import eos_token_ids
from sia._kv_cache import backbone_of, input_device
from sia._numbers import whole_number
from sia._prefix_cache import CachedPrefixes, logits_forward
from sia.scorers.base import Scorer, Session, branch_layout, shared_vocabulary
from sia.scorers.closed import ClosedScorer
from sia.scorers.loading import unwrap_decoder
from sia.scorers.value_model import ValueModel


class RolloutScorer(Scorer):
    """The reward of the response after a candidate and some further tokens of a language model.

    The noise of a rollout depends on the seed, the prompt (and the sample of a search), the step
    and the candidate alone.

    Args:
        model: Continues each candidate; the base model as a rule.
        reward: Values the result: a `RewardScorer` or a process reward model, or a `ValueModel`
            read at the last token.
        tokens: Length of a rollout, which ends early at EOS (the reward's, that of `model`, or of
            the language model).
        temperature: Temperature of the rollouts; 0 is greedy.
        candidates: Number of most probable tokens that a rollout samples from (K).
        seed: Seed of the rollouts' noise.

    Raises:
        ValueError: If a number is out of range or the vocabularies differ.
        TypeError: If `reward` is no scorer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reward: ClosedScorer | ValueModel,
        tokens: int,
        *,
        temperature: float = 1.0,
        candidates: int = 10,
        seed: int = 0,
    ) -> None:
        tokens, seed = whole_number("tokens", tokens, 1), whole_number("seed", seed)
        candidates = whole_number("candidates", candidates)
        _sampling.check_temperature(temperature)
        if not isinstance(reward, ClosedScorer | ValueModel):
            raise TypeError(
                f"reward must be a RewardScorer or a ValueModel, got {type(reward).__name__}"
            )
        model = unwrap_decoder(model)
        own = model.config.get_text_config().vocab_size
        vocabulary = shared_vocabulary([own, reward.vocabulary_size])
        if not 1 <= candidates <= vocabulary:
            raise ValueError(
                f"candidates must be 1 to {vocabulary}, the vocabulary of the rollouts' model, "
                f"got {candidates}"
            )
        self.model, self.reward, self.tokens = model, reward, tokens
        self.tokenizer = reward.tokenizer
        self.temperature, self.candidates, self.seed = temperature, candidates, seed
        self._vocabulary = vocabulary
        self.stop_tokens: list[int] = []  # of the language model

    @override
    def closed_by(
        self, tokenizer: PreTrainedTokenizerBase | None, stop_tokens: Collection[int] = ()
    ) -> Self:
        closed = copy(self)
        closed.reward = self.reward.closed_by(tokenizer, stop_tokens)
        closed.stop_tokens = sorted({*self.stop_tokens, *stop_tokens})
        return closed

    @property
    @override
    def vocabulary_size(self) -> int:
        return self._vocabulary

    @override
    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> "RolloutSession":
        return RolloutSession(self, prompts, max_new_tokens, samples)


class RolloutSession(Session):
    """Rollouts of the K candidates of a row: branches over one prefix that grow token by token."""

    def __init__(
        self,
        scorer: RolloutScorer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        self.scorer, model = scorer, scorer.model
        device = input_device(model)
        longest = max_new_tokens + scorer.tokens
        self.prefixes = CachedPrefixes(
            model,
            backbone_of(model),
            logits_forward(model),
            model.get_output_embeddings(),
            prompts,
            longest,
            samples,
        )
        self.reward = scorer.reward.start_session(prompts, longest, samples)
        self.meters = [self.prefixes.meter, *self.reward.meters]
        ends = scorer.reward.end_tokens if isinstance(scorer.reward, ClosedScorer) else ()
        own = eos_token_ids(model.generation_config)
        stops = sorted({*own, *ends, *scorer.stop_tokens})
        self.stops = torch.tensor(stops, dtype=torch.int64, device=device)
        keys = _sampling.prompt_keys(prompts, [scorer.seed] * len(prompts), device)
        self.keys = _sampling.sample_keys(keys, samples)

    @override
    @torch.inference_mode()
    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        device = self.keys.device
        rows, responses = rows.to(device), responses.to(device)
        branches, lengths = self._roll_out(rows, responses, candidates.to(device))
        return self.reward.score_branches(rows, responses, branches, lengths)

    def _roll_out(self, rows: Tensor, responses: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return candidates with their continuations, `(n, K, m)`, and their lengths `(n, K)`."""
        scorer = self.scorer
        count, step = tokens.shape[1], responses.shape[1]
        keys = _sampling.mix(_sampling.mix(self.keys[rows], step)[:, None], tokens)  # (n, K)
        lengths = torch.ones_like(tokens)
        going = ~torch.isin(tokens, self.stops)
        branches = [tokens]
        layout = branch_layout(count, 1, self.keys.device)
        logits = self.prefixes.branch(rows, responses, torch.full_like(rows, step), tokens, *layout)
        for depth in range(1, scorer.tokens + 1):
            shared = logits.flatten(0, 1)[:, : scorer.vocabulary_size]
            base, options = shared.topk(scorer.candidates)
            noise = _sampling.gumbel(keys.flatten(), depth, options)
            chosen = _sampling.choose(base, noise, scorer.temperature)
            tokens = options.gather(1, chosen[:, None]).view_as(tokens)
            branches.append(tokens)
            lengths = lengths + going
            going = going & ~torch.isin(tokens, self.stops)
            if depth == scorer.tokens or not bool(going.any()):
                break
            logits = self.prefixes.grow(tokens, depth)
        return torch.stack(branches, 2), lengths

    @override
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        return self.reward.score_responses(rows, responses, lengths)

    @override
    @torch.inference_mode()
    def reorder(self, sources: Tensor) -> None:
        self.prefixes.reorder(sources)
        self.reward.reorder(sources)
