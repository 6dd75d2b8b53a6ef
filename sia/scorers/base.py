"""What a candidate is worth: the interface that decoding needs, and the scorers.

A `ValueModel` reads a value at the candidate itself. A `RewardScorer` asks a trajectory reward model about prefix + candidate + EOS
(steering every token with it is ARGS: Khanov, Burapacheep and Li, "ARGS: Alignment as reward-guided search", 2024). A
`RolloutScorer` lets a language model go on for some tokens first, as Transfer Q* does (Chakraborty et al., "Transfer Q Star:
Principled decoding for LLM alignment", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, Cache, PreTrainedModel

from sia import _sampling
from sia._inputs import eos_token_ids, pad_right
from sia._kv_cache import check_positions, input_device
from sia._prefix_cache import (
    CachedPrefixes,
    Forward,
    branches_like_whole_sequences,
    check_attention,
)
from sia.cost import Architecture, Meter

if TYPE_CHECKING:
    from sia.scorers.value_model import ValueModel


class Session(Protocol):
    """Values along one batch of responses. Rows are numbered as the prompts were, each prompt having `samples` of them."""

    meters: Sequence[Meter]  # what was computed for each row, by model

    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        """Values float32 `(n, K)` of candidate tokens `(n, K)` after the response tokens `(n, t)` of these rows `(n,)`, ascending."""

    def rate(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        """Values float32 `(n,)` of responses `(n, t)` as they stand, of which the first `lengths` `(n,)` ≥ 1 tokens count."""

    def continue_from(self, sources: Tensor) -> None:
        """Row i goes on from where row `sources[i]` stands; `(rows,)`."""


@runtime_checkable
class Scorer(Protocol):
    """Anything that can open a `Session` over prompts (token ids without padding), each of `samples` rows."""

    @property
    def vocabulary_size(self) -> int: ...

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> Session: ...


class CachedSession:
    """What sessions over cached prefixes share; they say how branches are read."""

    def __init__(self, prefixes: CachedPrefixes) -> None:
        self.prefixes, self.meters = prefixes, [prefixes.meter]

    @torch.inference_mode()
    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        return self.score_branches(
            rows, responses, candidates[:, :, None], torch.ones_like(candidates)
        )

    @torch.inference_mode()
    def continue_from(self, sources: Tensor) -> None:
        self.prefixes.continue_from(sources)


class ValueSession(CachedSession):
    """Values of a `ValueModel`, whose cache lags behind: one forward pass per call, whatever K."""

    def __init__(
        self,
        value_model: ValueModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        def forward(*, last: int, **inputs) -> Tensor:
            return value_model(**inputs)[:, -last:]

        super().__init__(
            CachedPrefixes(
                value_model.backbone,
                forward,
                value_model.head.weight,
                prompts,
                max_new_tokens,
                samples,
            )
        )

    @torch.inference_mode()
    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        """Values float32 `(n, K)` at the last tokens of branches `(n, K, m)`, of which the first `lengths` `(n, K)` ≥ 1 count."""
        return _at_branch_ends(self.prefixes, rows, responses, branches, lengths - 1)

    @torch.inference_mode()
    def rate(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        return self.prefixes.last(rows, responses, lengths)


def _at_branch_ends(
    prefixes: CachedPrefixes, rows: Tensor, responses: Tensor, branches: Tensor, ends: Tensor
) -> Tensor:
    """The model's output at token number `ends` `(n, K)` of branches `(n, K, m)`: `(n, K)`."""
    device = prefixes.cached.device
    depths, sees = _branch_shape(*branches.shape[1:], device)
    rows, responses, branches = rows.to(device), responses.to(device), branches.to(device)
    lengths = torch.full_like(rows, responses.shape[1])
    outputs = torch.empty(branches.shape, device=device)
    for group in prefixes.alike(rows, lengths, depths.numel()):
        found = prefixes.branch(
            rows[group], responses[group], lengths[group], branches[group].flatten(1), depths, sees
        )
        outputs[group] = found.view(-1, *branches.shape[1:])
    return outputs.gather(2, ends.to(device)[:, :, None]).squeeze(2)


@lru_cache(maxsize=64)
def _branch_shape(count: int, depth: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How far each token of `count` branches of `depth` tokens stands behind the prefix, and which of them each sees."""
    branch = torch.arange(count, device=device).repeat_interleave(depth)
    depths = torch.arange(depth, device=device).repeat(count)
    return depths, (branch[:, None] == branch) & (depths[:, None] >= depths)


class RewardScorer:
    """A trajectory reward model: what a response would be worth if it ended after the candidate.

    model: any `AutoModelForSequenceClassification` with one label. Decoder models keep the prefix in a cache; others (encoders) are
        given whole sequences.
    eos_token_id: ends a response; by default the one of the model's config. The reward is read there: at the last token, once
        (transformers itself reads one token earlier where the model pads with EOS).
    stop_tokens: by which else the language model ends a response; the reward model reads `eos_token_id` in their place.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eos_token_id: int | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        config = model.config.get_text_config()
        if model.config.num_labels != 1:
            raise ValueError(
                f"a reward model must have one label, {type(model).__name__} has {model.config.num_labels}"
            )
        if eos_token_id is None:
            eos_token_id = config.eos_token_id
        if not isinstance(eos_token_id, int):
            raise ValueError(
                f"a reward model needs one eos_token_id, its config has {eos_token_id!r}: name it as eos_token_id"
            )
        if not 0 <= eos_token_id < config.vocab_size:
            raise ValueError(
                f"eos_token_id must be below the vocabulary of {config.vocab_size} tokens, got {eos_token_id}"
            )
        self.model, self.eos_token_id = model.eval(), eos_token_id
        self.ends = sorted({eos_token_id, *stop_tokens})

    @classmethod
    def from_pretrained(cls, path: str | Path, eos_token_id: int | None = None, **options) -> Self:
        """Reads a local folder or Hub id; options as for transformers' own from_pretrained (dtype, device_map, revision, …).

        Errors: OSError if it is not there, ValueError for a checkpoint without its head: weights are never made up.
        """
        if not Path(path).is_dir() and str(path).count("/") != 1:
            raise FileNotFoundError(
                f"no reward model in {path}: there is no such folder, and a Hub id has the form owner/name"
            )
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path, output_loading_info=True, **options
            )
        except SafetensorError as error:
            raise ValueError(
                f"the reward model {path} cannot be read, a file is damaged or truncated: {error}"
            ) from error
        if loading["missing_keys"] or loading["mismatched_keys"]:
            missing = sorted(
                [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
            )
            raise ValueError(
                f"{path} is no reward model: expected all weights of {type(model).__name__}, {', '.join(missing)} missing"
            )
        return cls(model, eos_token_id)

    @property
    def vocabulary_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def caches(self) -> bool:
        """Whether prefixes can be kept: the reward is a linear reading, `score`, of a decoder whose attention follows masks."""
        if "score" not in dict(self.model.named_children()):
            return False
        check_attention(self.model)
        return branches_like_whole_sequences(self.model.base_model, self.read)

    def read(self, *, last: int, past_key_values: Cache | None, **inputs) -> Tensor:
        """Rewards `(n, last)`, float32, as if each of the last tokens ended its sequence."""
        outputs = self.model.base_model(
            **inputs, past_key_values=past_key_values, use_cache=past_key_values is not None
        )
        return self.model.score(outputs.last_hidden_state[:, -last:]).float().squeeze(-1)

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> CachedRewards | WholeRewards:
        return (CachedRewards if self.caches else WholeRewards)(
            self, prompts, max_new_tokens, samples
        )


class CachedRewards(CachedSession):
    """Rewards from a decoder model that keeps prefixes: candidates and their EOS are branches of one forward pass."""

    def __init__(
        self,
        scorer: RewardScorer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        model, self.eos = scorer.model, scorer.eos_token_id
        self.ends = torch.tensor(scorer.ends, device=input_device(model))
        super().__init__(
            CachedPrefixes(
                model.base_model,
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
        """Rewards `(n, K)` of branches `(n, K, m)`, of which the first `lengths` `(n, K)` ≥ 1 tokens count, each ended by EOS once."""
        last = branches.gather(2, lengths[:, :, None] - 1).squeeze(2)
        ends = torch.where(
            torch.isin(last, self.ends.to(last.device)), lengths - 1, lengths
        )  # where the EOS stands, or is put
        closed = torch.cat([branches, branches[:, :, -1:]], dim=2).scatter(
            2, ends[:, :, None], self.eos
        )
        return _at_branch_ends(self.prefixes, rows, responses, closed, ends)

    @torch.inference_mode()
    def rate(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        last = responses.gather(1, lengths[:, None] - 1).squeeze(1)
        ends = torch.where(torch.isin(last, self.ends.to(last.device)), lengths - 1, lengths)
        closed = torch.cat([responses, responses[:, -1:]], dim=1).scatter(
            1, ends[:, None], self.eos
        )
        rewards = self.prefixes.last(rows, closed, ends + 1)
        self.prefixes.shorten(
            rows, torch.where(last == self.eos, lengths, ends)
        )  # an EOS that was put there does not stay
        return rewards


class AutoregressiveScorer:
    """An autoregressive reward model π_r: a candidate is worth ln π_r(candidate | prompt, response so far).

    model: a language model, trained so that Σ_t ln π_r(y_t | x, y_<t) is the reward of a response. Steering with β at every token
    samples from π·π_r^β: GenARM, whose 1/β is ours. One forward pass over the prefix gives the values of all candidates.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    @property
    def vocabulary_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> AutoregressiveSession:
        return AutoregressiveSession(self.model, prompts, max_new_tokens, samples)


class AutoregressiveSession:
    """Log-probabilities at the end of cached prefixes; for whole responses, their sums."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        head = model.get_output_embeddings().weight
        self.prefixes = CachedPrefixes(
            model.base_model, logits_of(model), head, prompts, max_new_tokens, samples
        )
        self.meters = [self.prefixes.meter]
        self.sums = torch.zeros(
            len(self.prefixes.cached), max_new_tokens + 1, device=input_device(model)
        )  # of the first t tokens
        self.rated = torch.zeros_like(self.prefixes.cached)

    @torch.inference_mode()
    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        logits = self.prefixes.last(rows, responses, torch.full_like(rows, responses.shape[1]))
        return logits.log_softmax(-1).gather(1, candidates.to(logits.device))

    @torch.inference_mode()
    def rate(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        """ln π_r of the responses `(n, t)`: the sum over their first `lengths` tokens."""
        for step in range(int(self.rated[rows].min()), int(lengths.max())):
            due = (self.rated[rows] == step) & (step < lengths)
            asked, tokens = rows[due], responses[due, : step + 1]
            if len(asked):
                gained = self.score(asked, tokens[:, :step], tokens[:, step:]).squeeze(1)
                self.sums[asked, step + 1] = self.sums[asked, step] + gained
                self.rated[asked] = step + 1
        return self.sums[rows, lengths]

    @torch.inference_mode()
    def continue_from(self, sources: Tensor) -> None:
        self.prefixes.continue_from(sources)
        self.sums, self.rated = self.sums[sources], self.rated[sources]


def logits_of(model: PreTrainedModel) -> Forward:
    """A forward pass of a language model whose output is its logits, float32."""

    def forward(
        *,
        input_ids: Tensor,
        attention_mask,
        position_ids: Tensor,
        past_key_values: Cache | None,
        last: int,
    ) -> Tensor:
        logits = model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=past_key_values is not None, logits_to_keep=last,
        ).logits  # fmt: skip
        return logits[:, -last:].float()

    return forward


class WholeRewards:
    """Rewards from a model that reads whole sequences: nothing is kept, every candidate costs its full length."""

    BATCH = 64  # sequences at once

    def __init__(
        self,
        scorer: RewardScorer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        check_positions(scorer.model, max(len(prompt) for prompt in prompts) + max_new_tokens + 1)
        self.scorer = scorer
        self.prompts = [list(prompt) for prompt in prompts for _ in range(samples)]
        encoder = scorer.model.base_model
        head = torch.empty(1, scorer.model.config.get_text_config().hidden_size)
        self.meters = [
            Meter(Architecture.of(encoder, head), len(self.prompts), input_device(scorer.model))
        ]

    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        return self.score_branches(
            rows, responses, candidates[:, :, None], torch.ones_like(candidates)
        )

    def score_branches(
        self, rows: Tensor, responses: Tensor, branches: Tensor, lengths: Tensor
    ) -> Tensor:
        prefixes = responses.tolist()
        sequences = [
            [*prefixes[i], *branch[:length]]
            for i, (row, counts) in enumerate(zip(branches.tolist(), lengths.tolist(), strict=True))
            for branch, length in zip(row, counts, strict=True)
        ]
        return self._rewards(rows.repeat_interleave(branches.shape[1]), sequences).view(
            branches.shape[:2]
        )

    def rate(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        return self._rewards(
            rows,
            [
                row[:length]
                for row, length in zip(responses.tolist(), lengths.tolist(), strict=True)
            ],
        )

    def continue_from(self, sources: Tensor) -> None:
        pass

    @torch.inference_mode()
    def _rewards(self, rows: Tensor, responses: list[list[int]]) -> Tensor:
        model, eos, device = (
            self.scorer.model,
            self.scorer.eos_token_id,
            input_device(self.scorer.model),
        )
        sequences = [
            [*self.prompts[row], *response]
            for row, response in zip(rows.tolist(), responses, strict=True)
        ]
        sequences = [
            [*(sequence[:-1] if sequence[-1] in self.scorer.ends else sequence), eos]
            for sequence in sequences
        ]
        rewards = []
        for start in range(0, len(sequences), self.BATCH):
            part = sequences[start : start + self.BATCH]
            input_ids, mask = pad_right(
                part, device, model.config.get_text_config().pad_token_id or 0
            )
            rewards.append(
                model(input_ids=input_ids, attention_mask=mask).logits.float().squeeze(-1)
            )
        rows, nothing = rows.to(device), torch.zeros_like(rows, device=device)
        self.meters[0].count(rows, nothing + 1, nothing, nothing, nothing)
        for row, sequence in zip(
            rows.split(1), sequences, strict=True
        ):  # every token may see every other
            self.meters[0].count_branches(
                row, torch.full((1, len(sequence)), len(sequence), device=device)
            )
        return torch.cat(rewards)


class RolloutScorer:
    """Transfer Q*: a candidate is worth the reward of the response after `tokens` further tokens of a language model.

    model: goes on from each candidate; the base model as a rule. reward: a `RewardScorer`, or a `ValueModel` read at the last token.
    tokens: length n of a rollout, which ends early at EOS (the reward's, or the model's). temperature: 0 rolls out greedily.
    candidates: K of the rollouts. seed: of their noise, which depends on it, the prompt (and the sample of a search), the step
        and the candidate alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reward: RewardScorer | ValueModel,
        tokens: int,
        temperature: float = 1.0,
        candidates: int = 10,
        seed: int = 0,
    ) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"a rollout must have at least 1 token, got {tokens!r}")
        _sampling.check_temperature(temperature)
        if not isinstance(reward, Scorer):
            raise TypeError(
                f"reward must be a RewardScorer or a ValueModel, got {type(reward).__name__}"
            )
        vocabulary = model.config.get_text_config().vocab_size
        if not 1 <= candidates <= vocabulary:
            raise ValueError(
                f"candidates must be 1 to {vocabulary}, the vocabulary of the rollouts' model, got {candidates}"
            )
        if reward.vocabulary_size != vocabulary:
            raise ValueError(
                f"rollouts and reward must share a vocabulary: the model has {vocabulary} tokens, the reward {reward.vocabulary_size}"
            )
        self.model, self.reward, self.tokens = model, reward, tokens
        self.temperature, self.candidates, self.seed = temperature, candidates, seed

    @property
    def vocabulary_size(self) -> int:
        return self.reward.vocabulary_size

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, samples: int = 1
    ) -> RolloutSession:
        return RolloutSession(self, prompts, max_new_tokens, samples)


class RolloutSession:
    """The K candidates of a row are K branches over its one cached prefix, which grow by a token at a time."""

    def __init__(
        self,
        scorer: RolloutScorer,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        samples: int,
    ) -> None:
        self.scorer, model = scorer, scorer.model
        device = input_device(model)
        room = max_new_tokens + scorer.tokens
        self.prefixes = CachedPrefixes(
            model.base_model,
            logits_of(model),
            model.get_output_embeddings().weight,
            prompts,
            room,
            samples,
        )
        self.reward = scorer.reward.begin(prompts, room, samples)
        self.meters = [self.prefixes.meter, *self.reward.meters]
        end = scorer.reward.eos_token_id if isinstance(scorer.reward, RewardScorer) else None
        self.stops = torch.tensor(eos_token_ids(model.generation_config, end), device=device)
        keys = _sampling.prompt_keys(prompts, [scorer.seed] * len(prompts), device)
        self.keys = _sampling.sample_keys(keys, samples)

    @torch.inference_mode()
    def score(self, rows: Tensor, responses: Tensor, candidates: Tensor) -> Tensor:
        scorer, device = self.scorer, self.keys.device
        rows, responses, tokens = rows.to(device), responses.to(device), candidates.to(device)
        count, step = tokens.shape[1], responses.shape[1]
        keys = _sampling.mix(_sampling.mix(self.keys[rows], step)[:, None], tokens)  # (n, K)
        lengths = torch.ones_like(tokens)
        going = ~torch.isin(tokens, self.stops)
        branches = [tokens]
        logits = self.prefixes.branch(
            rows, responses, torch.full_like(rows, step), tokens, *_branch_shape(count, 1, device)
        )
        for depth in range(1, scorer.tokens + 1):
            base, options = logits.flatten(0, 1).topk(scorer.candidates)
            noise = _sampling.gumbel(keys.flatten(), depth, options)
            chosen = _sampling.choose(base, noise, scorer.temperature)
            tokens = options.gather(1, chosen[:, None]).view_as(tokens)
            branches.append(tokens)
            lengths = lengths + going
            going = going & ~torch.isin(tokens, self.stops)
            if depth == scorer.tokens or not bool(going.any()):
                break
            logits = self.prefixes.grow(tokens, depth)
        return self.reward.score_branches(rows, responses, torch.stack(branches, 2), lengths)

    def rate(self, rows: Tensor, responses: Tensor, lengths: Tensor) -> Tensor:
        return self.reward.rate(rows, responses, lengths)

    @torch.inference_mode()
    def continue_from(self, sources: Tensor) -> None:
        self.prefixes.continue_from(sources)
        self.reward.continue_from(sources)
