"""Lab models from scratch: language models, reward models, scores. Value models are trained by `sia.distill`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from benchmarks.spec.profile import ModelSize
from benchmarks.subjects.lab.linear import by_onednn
from benchmarks.subjects.lab.tokenizer import BOS, EOS, PAD
from sia._inputs import pad_right
from sia.training import epoch_batches, optimise

ARCHITECTURES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification),
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification),
}
WEIGHT_DECAY = 0.01
Progress = Callable[[int], None]


def new_language_model(family: str, size: ModelSize, vocabulary: int, seed: int) -> PreTrainedModel:
    """A model of this family with random weights drawn under `seed`."""
    config_class, model_class, _ = ARCHITECTURES[family]
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.hidden_size // size.heads,
        intermediate_size=size.feed_forward,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return by_onednn(model_class(config).eval())


def new_reward_model(base: PreTrainedModel, family: str) -> PreTrainedModel:
    """A sequence classifier with one label on a copy of the base's backbone; its head starts at zero."""
    labels = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}
    config = type(base.config).from_dict(base.config.to_dict() | labels | {"architectures": None})
    model = ARCHITECTURES[family][2](config)
    model.base_model.load_state_dict(base.base_model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return by_onednn(model.eval())


def train_language_model(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    response_only: bool,
    progress: Progress,
) -> None:
    """Next-token cross-entropy, over the prompts too unless `response_only`."""
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]

    def loss(indices: list[int]) -> Tensor:
        starts = [len(prompts[i]) if response_only else 0 for i in indices]
        return next_token_loss(model, [sequences[i] for i in indices], starts)

    batches = list(
        epoch_batches([len(s) for s in sequences], batch_size, epochs, random.Random(seed))
    )
    optimise(
        model,
        batches,
        loss,
        learning_rate,
        WEIGHT_DECAY,
        lambda indices: progress(sum(len(sequences[i]) for i in indices)),
    )


def pad_from(
    sequences: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """input_ids, padded on the right, and which tokens count: those from `starts` on, bool; both `(sequences, longest)`."""
    input_ids, tokens = pad_right(sequences, device)
    return input_ids, tokens.bool() & (
        torch.arange(input_ids.shape[1], device=device)
        >= torch.tensor(starts, device=device)[:, None]
    )


def next_token_loss(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> Tensor:
    """Mean negative log-likelihood, in nats, of the tokens from `starts` on."""
    input_ids, counted = pad_from(sequences, starts, "cpu")
    labels = input_ids.masked_fill(~counted, -100)[:, 1:]
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@torch.no_grad()
def heldout_loss(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> float:
    """Negative log-likelihood per response token, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(prompts), 256):
        pairs = list(zip(prompts[start : start + 256], responses[start : start + 256], strict=True))
        tokens = sum(len(r) for _, r in pairs)
        total += (
            next_token_loss(model, [[*p, *r] for p, r in pairs], [len(p) for p, _ in pairs]).item()
            * tokens
        )
        count += tokens
    return total / count


def train_reward_model(
    model: PreTrainedModel,
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> None:
    """Bradley–Terry (1952): −ln σ(r(chosen) − r(rejected)), over prompt and response."""

    def loss(indices: list[int]) -> Tensor:
        input_ids, _ = pad_right([chosen[i] for i in indices] + [rejected[i] for i in indices])
        rewards = model(input_ids=input_ids, use_cache=False).logits.squeeze(
            -1
        )  # read at the last token that is not padding
        return -functional.logsigmoid(rewards[: len(indices)] - rewards[len(indices) :]).mean()

    _optimise_pairs(
        model, loss, chosen, rejected, epochs, learning_rate, batch_size, seed, progress
    )


def train_autoregressive_reward(
    model: PreTrainedModel,
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    scale: float,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> None:
    """−ln σ(scale·(Σ ln π_r(chosen) − Σ ln π_r(rejected))), sums over the tokens from `starts` on (GenARM: Xu et al., 2025)."""

    def loss(indices: list[int]) -> Tensor:
        likelihoods = log_likelihoods(
            model,
            [chosen[i] for i in indices] + [rejected[i] for i in indices],
            [starts[i] for i in indices] * 2,
        )
        return -functional.logsigmoid(
            scale * (likelihoods[: len(indices)] - likelihoods[len(indices) :])
        ).mean()

    _optimise_pairs(
        model, loss, chosen, rejected, epochs, learning_rate, batch_size, seed, progress
    )


def _optimise_pairs(
    model: PreTrainedModel,
    loss: Callable[[list[int]], Tensor],
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    epochs: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> None:
    """Batches of pairs of like length, by a loss over their numbers."""
    lengths = [len(a) + len(b) for a, b in zip(chosen, rejected, strict=True)]
    batches = list(epoch_batches(lengths, batch_size, epochs, random.Random(seed)))
    optimise(
        model,
        batches,
        loss,
        learning_rate,
        WEIGHT_DECAY,
        lambda indices: progress(sum(lengths[i] for i in indices)),
    )


def log_likelihoods(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> Tensor:
    """Σ ln π(token) over the tokens of each sequence from `starts` on, in nats: `(sequences,)`."""
    input_ids, counted = pad_from(sequences, starts, model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none"
    ).view(len(sequences), -1)
    return -(losses * counted[:, 1:]).sum(1)


def positions_at_once(device: torch.device) -> int:
    """How many token positions to compute together: on a processor what its caches hold, which takes two thirds of the time of many."""
    return 2**11 if device.type == "cpu" else 2**15


def batches_by_length(
    lengths: Sequence[int], positions: int, rows: int = 256
) -> Iterator[list[int]]:
    """Numbers of sequences to compute together, by ascending length: at most `rows`, and so many token positions with padding."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[i] > positions):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def trajectory_rewards(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Reward of each prompt with its response, read at its last token, float64 `(sequences,)`."""
    rewards = np.zeros(len(sequences))
    for batch in batches_by_length(
        [len(sequence) for sequence in sequences], positions_at_once(model.device)
    ):
        input_ids, tokens = pad_right([sequences[i] for i in batch], model.device)
        # padding is on the right and attention is causal: no token sees it
        read = model.score(
            model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        ).squeeze(-1)
        rewards[batch] = (
            read.gather(1, tokens.sum(1, keepdim=True) - 1).squeeze(1).float().cpu().numpy()
        )
    return rewards


@torch.no_grad()
def sequence_log_likelihoods(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> np.ndarray:
    """`log_likelihoods` of many sequences, float64 `(sequences,)`."""
    found = np.zeros(len(sequences))
    logits_at_once = 2**28
    positions = min(
        positions_at_once(model.device), logits_at_once // model.config.get_text_config().vocab_size
    )
    for batch in batches_by_length([len(sequence) for sequence in sequences], positions):
        found[batch] = (
            log_likelihoods(model, [sequences[i] for i in batch], [starts[i] for i in batch])
            .cpu()
            .numpy()
        )
    return found
