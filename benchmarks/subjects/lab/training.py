"""Losses and training loops of the lab's models; value models are trained by `sia.distill`."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from benchmarks.subjects.scoring import log_likelihoods, pad_from
from sia._inputs import pad_right
from sia.training import epoch_batches, optimise

WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Optimisation:
    """Settings of one training.

    Attributes:
        epochs: Passes over the data.
        learning_rate: Peak of the schedule.
        batch_size: Sequences, or pairs, of a step.
        seed: Seed of the order of batches.
        progress: Called after each step with the number of tokens that it learned from.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int
    progress: Callable[[int], None]

    def run(
        self, model: PreTrainedModel, lengths: Sequence[int], loss: Callable[[list[int]], Tensor]
    ) -> None:
        """Minimise a loss of indices, in batches of like length."""
        rng = random.Random(self.seed)
        batches = list(epoch_batches(lengths, self.batch_size, self.epochs, rng))

        def report(indices: list[int]) -> None:
            self.progress(sum(lengths[i] for i in indices))

        optimise(model, batches, loss, self.learning_rate, WEIGHT_DECAY, report)


def train_language_model(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    settings: Optimisation,
    *,
    response_only: bool,
) -> None:
    """Minimise next-token cross-entropy, over the prompts too unless `response_only`."""
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]

    def loss(indices: list[int]) -> Tensor:
        starts = [len(prompts[i]) if response_only else 0 for i in indices]
        return next_token_loss(model, [sequences[i] for i in indices], starts)

    settings.run(model, [len(sequence) for sequence in sequences], loss)


def next_token_loss(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> Tensor:
    """Return the mean negative log-likelihood, in nats, of the tokens from `starts` on."""
    input_ids, counted = pad_from(sequences, starts, "cpu")
    labels = input_ids.masked_fill(~counted, -100)[:, 1:]
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@torch.no_grad()
def heldout_loss(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> float:
    """Return the negative log-likelihood per response token, in nats."""
    total, count = 0.0, 0
    for start in range(0, len(prompts), 256):
        pairs = list(zip(prompts[start : start + 256], responses[start : start + 256], strict=True))
        tokens = sum(len(r) for _, r in pairs)
        loss = next_token_loss(model, [[*p, *r] for p, r in pairs], [len(p) for p, _ in pairs])
        total += loss.item() * tokens
        count += tokens
    return total / count


def train_reward_model(
    model: PreTrainedModel,
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    settings: Optimisation,
) -> None:
    """Minimise −ln σ(r(chosen) − r(rejected)) over whole sequences (Bradley and Terry, 1952)."""

    def loss(indices: list[int]) -> Tensor:
        input_ids, _ = pad_right([chosen[i] for i in indices] + [rejected[i] for i in indices])
        # the classifier reads at the last token that is not padding
        rewards = model(input_ids=input_ids, use_cache=False).logits.squeeze(-1)
        return -functional.logsigmoid(rewards[: len(indices)] - rewards[len(indices) :]).mean()

    settings.run(model, _pair_lengths(chosen, rejected), loss)


def train_autoregressive_reward(
    model: PreTrainedModel,
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    starts: Sequence[int],
    scale: float,
    settings: Optimisation,
) -> None:
    """Minimise −ln σ(scale·(Σ ln π_r(chosen) − Σ ln π_r(rejected))) (GenARM: Xu et al., 2025).

    Sums are over the tokens from `starts` on.
    """

    def loss(indices: list[int]) -> Tensor:
        sequences = [chosen[i] for i in indices] + [rejected[i] for i in indices]
        likelihoods = log_likelihoods(model, sequences, [starts[i] for i in indices] * 2)
        margins = likelihoods[: len(indices)] - likelihoods[len(indices) :]
        return -functional.logsigmoid(scale * margins).mean()

    settings.run(model, _pair_lengths(chosen, rejected), loss)


def _pair_lengths(chosen: Sequence[Sequence[int]], rejected: Sequence[Sequence[int]]) -> list[int]:
    return [len(a) + len(b) for a, b in zip(chosen, rejected, strict=True)]
