"""Costs of responses, of searches as if the samples of a prompt shared its prefill."""

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.engine.loading import language_model, reward_model, scorer_of
from benchmarks.spec.cells import Cell
from benchmarks.spec.methods import REWARD
from benchmarks.subjects.base import Subject
from sia import Generation, ValueModel
from sia.cost import Architecture, Cost, Meter
from sia.scorers.loading import output_size


def total_costs(
    subject: Subject, cell: Cell, prompts: list, samples: list[list[Generation]]
) -> list[Cost]:
    """Return the cost of all samples of each prompt together, as if they shared its prefill.

    `sia.best_of_n` lets them share it in every model but an encoder, which reads whole sequences.
    Where there are several samples, costs include the reward model's reading of the response.
    """
    if len(samples) == 1:
        return [response.cost for response in samples[0]]
    model, reward = language_model(subject, cell.model, cell.family), reward_model(subject, REWARD)
    models: dict[str, tuple[PreTrainedModel, nn.Module | None]] = {
        "model": (model.base_model, model.get_output_embeddings()),
        "reward": (reward.base_model, dict(reward.named_children()).get("score")),
    }
    if cell.gate != "never":
        scorer = cast(ValueModel, scorer_of(subject, cell.scorer, cell.family))
        models["value"] = (scorer.backbone, scorer.head)
    kinds = {"model": cell.model, "reward": REWARD, "value": cell.scorer}
    prefill = {}
    for name, (backbone, head) in models.items():
        ids = subject.encode(prompts, str(kinds[name]))
        # value and reward models share a prompt but for its last token, which each response reads
        shared = ids if name == "model" else [prompt[:-1] if head else [] for prompt in ids]
        prefill[name] = reading_costs(backbone, head, shared, with_output=name == "model")
    totals, value_has_read = [Cost()] * len(prompts), [False] * len(prompts)
    for number, responses in enumerate(samples):
        conversations = subject.conversations(prompts, responses, REWARD)
        read = reading_costs(*models["reward"], conversations)
        for i, response in enumerate(responses):
            tokens, flops = read[i]
            cost = response.cost + Cost(value_forwards=1, value_tokens=tokens, value_flops=flops)
            if number > 0:
                tokens, flops = prefill["model"][i]
                cost += Cost(model_forwards=-1, model_tokens=-tokens, model_flops=-flops)
                tokens, flops = prefill["reward"][i]
                cost += Cost(value_tokens=-tokens, value_flops=-flops)
            if cost.junctions > 0 and value_has_read[i]:
                tokens, flops = prefill["value"][i]
                cost += Cost(value_tokens=-tokens, value_flops=-flops)
            value_has_read[i] |= cost.junctions > 0
            totals[i] += cost
    return totals


def reading_costs(
    backbone: PreTrainedModel,
    head: nn.Module | None,
    sequences: list[list[int]],
    with_output: bool = True,
) -> list[tuple[int, float]]:
    """Return token positions and FLOPs of reading each sequence once.

    Args:
        backbone: The model without its head.
        head: Module that reads the output; None for an encoder, counted as `RewardScorer` does.
        sequences: Token ids.
        with_output: Whether to count the output head at the end of each sequence.
    """
    counted = nn.Linear(output_size(backbone), 1, device="meta") if head is None else head
    meter = Meter(Architecture.of(backbone, counted), len(sequences), "cpu")
    rows = torch.arange(len(sequences))
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    if head is None:  # every token sees every other
        for row, length in zip(rows.split(1), lengths.tolist(), strict=True):
            meter.count_branches(row, torch.full((1, length), length))
    else:
        outputs = torch.full_like(rows, int(with_output))
        meter.count(rows, torch.ones_like(rows), torch.zeros_like(rows), lengths, outputs)
    _, tokens, flops = meter.totals()
    return list(zip(tokens.tolist(), flops.tolist(), strict=True))
