"""Trajectory reward models, asked about prefix + candidate + EOS.

Steering every token with one is ARGS (Khanov, Burapacheep and Li, "ARGS: Alignment as
reward-guided search", 2024).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Cache, PreTrainedModel

from sia._inputs import pad_right
from sia._kv_cache import backbone_of, check_positions, input_device
from sia._prefix_cache import CachedPrefixes, check_attention, supports_tree_attention
from sia.cost import Architecture, Meter
from sia.scorers.base import BranchSession, CachedSession

BATCH = 64  # whole sequences that a model reads at once


class RewardScorer:
    """A trajectory reward model: the reward of the response if it ended after the candidate.

    Decoder models keep the prefix in a cache; others (encoders) are given whole sequences. The
    reward is read at the last token, which is EOS, once (transformers itself reads one token
    earlier where the model pads with EOS).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_id: int | None = None,
        *,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        """Wrap a model.

        Args:
            model: Any `AutoModelForSequenceClassification` with one label.
            eos_token_id: Ends a response; by default the one of the model's config.
            stop_tokens: Other tokens by which the language model ends a response; the reward model
                reads `eos_token_id` in their place.

        Raises:
            ValueError: If the model has several labels or no single EOS within its vocabulary.
        """
        config = model.config.get_text_config()
        if model.config.num_labels != 1:
            raise ValueError(
                f"a reward model must have one label, {type(model).__name__} has "
                f"{model.config.num_labels}"
            )
        if eos_token_id is None:
            eos_token_id = config.eos_token_id
        if not isinstance(eos_token_id, int):
            raise ValueError(
                f"a reward model needs one eos_token_id, its config has {eos_token_id!r}: "
                "name it as eos_token_id"
            )
        if not 0 <= eos_token_id < config.vocab_size:
            raise ValueError(
                f"eos_token_id must be below the vocabulary of {config.vocab_size} tokens, "
                f"got {eos_token_id}"
            )
        self.model, self.eos_token_id = model.eval(), eos_token_id
        self.end_tokens = sorted({eos_token_id, *stop_tokens})

    @classmethod
    def from_pretrained(
        cls, path: str | Path, eos_token_id: int | None = None, **options: Any
    ) -> Self:
        """Load a reward model.

        Args:
            path: Local folder or Hub id.
            eos_token_id: Ends a response; by default the one of the model's config.
            **options: For transformers' from_pretrained (dtype, device_map, revision, …).

        Raises:
            OSError: If it is not there.
            ValueError: If weights are damaged or missing, the head's too: none are made up.
        """
        if not Path(path).is_dir() and str(path).count("/") != 1:
            raise FileNotFoundError(
                f"no reward model in {path}: there is no such folder, "
                "and a Hub id has the form owner/name"
            )
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path, output_loading_info=True, **options
            )
        except SafetensorError as error:
            raise ValueError(
                f"the reward model {path} cannot be read, a file is damaged or truncated: {error}"
            ) from error
        mismatched = [key for key, *_ in loading["mismatched_keys"]]
        missing = sorted([*loading["missing_keys"], *mismatched])
        if missing:
            raise ValueError(
                f"{path} is no reward model: expected all weights of {type(model).__name__}, "
                f"{', '.join(missing)} missing"
            )
        return cls(model, eos_token_id)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that the model knows."""
        return self.model.config.get_text_config().vocab_size

    @property
    def supports_caching(self) -> bool:
        """Whether prefixes can be kept in a cache.

        They can if the reward is a linear reading, `score`, of a decoder that follows masks.
        """
        if "score" not in dict(self.model.named_children()):
            return False
        check_attention(self.model)
        return supports_tree_attention(backbone_of(self.model), self.read)

    def read(self, *, last: int, past_key_values: Cache | None, **inputs: Any) -> Tensor:
        """Return rewards as if each of the last `last` tokens ended its sequence.

        Returns:
            Rewards, float32 `(n, last)`.
        """
        outputs = backbone_of(self.model)(
            **inputs, past_key_values=past_key_values, use_cache=past_key_values is not None
        )
        return self.model.score(outputs.last_hidden_state[:, -last:]).float().squeeze(-1)

    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> "CachedRewards | WholeRewards":
        """Open a session (`Scorer.start_session`)."""
        session = CachedRewards if self.supports_caching else WholeRewards
        return session(self, prompts, max_new_tokens, samples)


class CachedRewards(CachedSession):
    """Rewards of a decoder that keeps prefixes: candidates and their EOS are branches."""

    def __init__(
        self,
        scorer: RewardScorer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        """Open a session; see `Scorer.start_session`."""
        model, self.eos = scorer.model, scorer.eos_token_id
        self.end_tokens = torch.tensor(scorer.end_tokens, device=input_device(model))
        super().__init__(
            CachedPrefixes(
                backbone_of(model),
                scorer.read,
                model.score.weight,
                prompts,
                max_new_tokens + 1,
                samples,
            )
        )

    @torch.inference_mode()
    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        """Return the rewards of branches, each ended by EOS once (`BranchSession`)."""
        closed, ends = self._close(branches, lengths)
        return self.read_branches(rows, responses, closed, ends)

    @torch.inference_mode()
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        """Return the rewards of responses, each ended by EOS once (`Session`)."""
        closed, ends = self._close(responses, lengths)
        rewards = self.prefixes.last(rows, closed, ends + 1)
        # an EOS that was put there does not stay
        own_eos = _last_tokens(responses, lengths) == self.eos
        self.prefixes.shorten(rows, torch.where(own_eos, lengths, ends))
        return rewards

    def _close(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return `tokens` `(…, m + 1)` with EOS in place, and where it stands `(…)`."""
        last = _last_tokens(tokens, lengths)
        ended = torch.isin(last, self.end_tokens.to(last.device))
        ends = torch.where(ended, lengths - 1, lengths)
        room = torch.cat([tokens, tokens[..., -1:]], dim=-1)
        return room.scatter(-1, ends[..., None], self.eos), ends


def _last_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return token number `lengths` − 1 of each sequence. tokens: `(…, m)`, lengths: `(…)`."""
    return tokens.gather(-1, lengths[..., None] - 1).squeeze(-1)


class WholeRewards(BranchSession):
    """Rewards of a model that reads whole sequences: every candidate costs its full length."""

    def __init__(
        self,
        scorer: RewardScorer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        """Open a session; see `Scorer.start_session`."""
        model = scorer.model
        check_positions(model, max(len(prompt) for prompt in prompts) + max_new_tokens + 1)
        self.scorer = scorer
        self.prompts = [list(prompt) for prompt in prompts for _ in range(samples)]
        head = torch.empty(1, model.config.get_text_config().hidden_size)
        architecture = Architecture.of(backbone_of(model), head)
        self.meters = [Meter(architecture, len(self.prompts), input_device(model))]

    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        """Return the rewards of branches, each ended by EOS once (`BranchSession`)."""
        count = branches.shape[1]
        sequences = [
            [*prefix, *branch[:length]]
            for prefix, row, counts in zip(
                responses.tolist(), branches.tolist(), lengths.tolist(), strict=True
            )
            for branch, length in zip(row, counts, strict=True)
        ]
        return self._rewards(rows.repeat_interleave(count), sequences).view(-1, count)

    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        """Return the rewards of responses, each ended by EOS once (`Session`)."""
        pairs = zip(responses.tolist(), lengths.tolist(), strict=True)
        return self._rewards(rows, [tokens[:length] for tokens, length in pairs])

    def reorder(self, sources: Tensor) -> None:
        """Do nothing: no state is kept between calls."""

    @torch.inference_mode()
    def _rewards(self, rows: Tensor, responses: list[list[int]]) -> Tensor:
        """Return the rewards `(n,)` of responses of these rows `(n,)`."""
        model, device = self.scorer.model, input_device(self.scorer.model)
        padding = model.config.get_text_config().pad_token_id or 0
        sequences = [
            self._close([*self.prompts[row], *response])
            for row, response in zip(rows.tolist(), responses, strict=True)
        ]
        rewards = []
        for start in range(0, len(sequences), BATCH):
            input_ids, mask = pad_right(sequences[start : start + BATCH], device, padding)
            logits = model(input_ids=input_ids, attention_mask=mask).logits
            rewards.append(logits.float().squeeze(-1))
        self._count(rows.to(device), [len(sequence) for sequence in sequences])
        return torch.cat(rewards)

    def _close(self, sequence: list[int]) -> list[int]:
        """Return the sequence with EOS at its end, in place of a token that ends it."""
        ended = sequence[-1] in self.scorer.end_tokens
        return [*(sequence[:-1] if ended else sequence), self.scorer.eos_token_id]

    def _count(self, rows: Tensor, lengths: list[int]) -> None:
        """Count one forward pass per sequence, in which every token may see every other."""
        zeros = torch.zeros_like(rows)
        self.meters[0].count(rows, zeros + 1, zeros, zeros, zeros)
        for row, length in zip(rows.split(1), lengths, strict=True):
            contexts = torch.full((1, length), length, device=rows.device)
            self.meters[0].count_branches(row, contexts)
