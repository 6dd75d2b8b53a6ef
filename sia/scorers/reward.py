"""Trajectory reward models, asked about prefix + candidate + EOS.

Steering every token with one is ARGS (Khanov, Burapacheep and Li, "ARGS: Alignment as
reward-guided search", 2024).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Cache, PreTrainedModel
from typing_extensions import override

from sia._inputs import pad_right
from sia._kv_cache import backbone_of, check_positions, input_device
from sia._modes import evaluation_mode
from sia._prefix_cache import CachedPrefixes, check_attention, supports_tree_attention
from sia.cost import Architecture, Meter
from sia.scorers.base import BranchSession, CachedSession, Scorer

BATCH = 64  # whole sequences that a model reads at once


class RewardScorer(Scorer):
    """A trajectory reward model: the reward of the response if it ended after the candidate.

    Decoder models keep the prefix in a cache; others (encoders) are given whole sequences. The
    reward is read at the last token, which is EOS, once (transformers itself reads one token
    earlier where the model pads with EOS).

    Args:
        model: Any `AutoModelForSequenceClassification` with one label.
        eos_token_id: Ends a response; by default the one of the model's config.
        stop_tokens: Other tokens by which the language model ends a response; the reward model
            reads `eos_token_id` in their place.

    Raises:
        ValueError: If the model has several labels or no single EOS within its vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_id: int | None = None,
        *,
        stop_tokens: Sequence[int] = (),
    ) -> None:
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
        if missing := sorted([*loading["missing_keys"], *mismatched]):
            raise ValueError(
                f"{path} is no reward model: expected all weights of {type(model).__name__}, "
                f"{', '.join(missing)} missing"
            )
        return cls(model, eos_token_id)

    @property
    @override
    def vocabulary_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def supports_caching(self) -> bool:
        """True if prefixes can be kept in a cache.

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

    @override
    def start_session(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> "CachedRewards | WholeRewards":
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
        model, self.eos = scorer.model, scorer.eos_token_id
        self.end_tokens = torch.tensor(scorer.end_tokens, device=input_device(model))
        super().__init__(
            CachedPrefixes(
                backbone_of(model),
                scorer.read,
                model.score,
                prompts,
                max_new_tokens + 1,
                samples,
            )
        )

    @override
    @torch.inference_mode()
    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        closed, ends = self._close(branches, lengths)
        return self.read_branches(rows, responses, closed, ends)

    @override
    @torch.inference_mode()
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        closed, ends = self._close(responses, lengths)
        rewards = self.prefixes.last(rows, closed, ends + 1)
        # an EOS that was put there does not stay
        own_eos = _last_tokens(responses, lengths) == self.eos
        self.prefixes.shorten(rows, torch.where(own_eos, lengths, ends))
        return rewards

    def _close(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return `tokens` `(…, m + 1)` with EOS in place, and where it stands `(…)`."""
        ended = torch.isin(_last_tokens(tokens, lengths), self.end_tokens.to(tokens.device))
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
        model = scorer.model
        check_positions(model, max(len(prompt) for prompt in prompts) + max_new_tokens + 1)
        self.scorer = scorer
        self.prompts = [prompt for prompt in prompts for _ in range(samples)]
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, device="meta")
        architecture = Architecture.of(backbone_of(model), head)
        self.meters = [Meter(architecture, len(self.prompts), input_device(model))]

    @override
    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        count = branches.shape[1]
        prefixes = responses[:, None].expand(-1, count, -1)
        whole = torch.cat([prefixes, branches], dim=2).flatten(0, 1)
        whole_lengths = responses.shape[1] + lengths.flatten()
        rewards = self.score_responses(rows.repeat_interleave(count), whole, whole_lengths)
        return rewards.view(-1, count)

    @override
    @torch.inference_mode()
    def score_responses(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        scorer, device = self.scorer, input_device(self.scorer.model)
        padding = scorer.model.config.get_text_config().pad_token_id or 0
        sequences = []
        for row, response, length in zip(
            rows.tolist(), responses.tolist(), lengths.tolist(), strict=True
        ):
            ended = response[length - 1] in scorer.end_tokens  # its reader gets EOS in place of it
            kept = response[: length - ended]
            sequences.append([*self.prompts[row], *kept, scorer.eos_token_id])
        rewards = []
        for start in range(0, len(sequences), BATCH):
            input_ids, mask = pad_right(sequences[start : start + BATCH], device, padding)
            with evaluation_mode(scorer.model):
                logits = scorer.model(input_ids=input_ids, attention_mask=mask).logits
            rewards.append(logits.float().squeeze(-1))
        self._count(rows.to(device), [len(sequence) for sequence in sequences])
        return torch.cat(rewards)

    @override
    def reorder(self, sources: Tensor) -> None:
        """Do nothing: no state is kept between calls."""

    def _count(self, rows: Tensor, lengths: list[int]) -> None:
        """Count one forward pass per sequence, in which every token may see every other."""
        zeros = torch.zeros_like(rows)
        self.meters[0].count(rows, zeros + 1, zeros, zeros, zeros)
        for row, length in zip(rows.split(1), lengths, strict=True):
            contexts = torch.full((1, length), length, device=rows.device)
            self.meters[0].count_branches(row, contexts)
