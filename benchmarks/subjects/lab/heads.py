"""Junction gate, Q-head and vocabulary head, fitted to a base model and a value model.

All lie in one folder, and in a folder inside a junction gate that was shown no unseen topic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.runtime import workers
from benchmarks.spec.cells import OBJECTIVES
from benchmarks.spec.model_kinds import BASE, ModelKind, value_kind
from benchmarks.subjects.lab.items import Prompt
from benchmarks.subjects.lab.replicate import UNSEEN, Replicate
from benchmarks.subjects.lab.tokenizer import encode_prompts
from sia import JunctionGate, QHead, ValueModel, VocabularyValueModel
from sia.fitting import fit_vocabulary_value_model, train_junction_gate, train_q_head
from sia.states import States, collect_states

SHARE = 0.1  # of the training prompts, whose responses are learned from
MOST_STATES = 100_000  # were all responses as long as can be; about 40,000 as they are
SECONDS_PER_PROMPT = 0.1  # estimated, of one core


@dataclass(frozen=True)
class Heads:
    """All that is fitted to a base model and a value model.

    Attributes:
        gate: Junction gate, fitted to all topics.
        unseen: Junction gate that was not shown the replicate's unseen topics.
        q_head: Reads the base model's hidden state.
        vocabulary: Reads that of the value model.
    """

    gate: JunctionGate
    unseen: JunctionGate
    q_head: QHead
    vocabulary: VocabularyValueModel

    def save_pretrained(self, folder: Path) -> None:
        """Write all of it; no two have a file in common."""
        for fitted in (self.gate, self.q_head, self.vocabulary):
            fitted.save_pretrained(folder)
        self.unseen.save_pretrained(folder / UNSEEN)


def fit_heads(replicate: Replicate, kind: ModelKind, family: str) -> Heads:
    """Fit all to the values of a loss, on responses to some of the training prompts."""
    seed = replicate.seed(str(kind), family)
    prompts = prompts_to_fit(replicate)
    model, value_model, options = _teachers(replicate, kind.loss, family)
    options |= {"seed": seed, "max_states": MOST_STATES}
    ids = encode_prompts(replicate.tokenizer, prompts)
    states = collect_states(model, replicate.tokenizer, value_model, ids, **options)
    seen = torch.tensor([p.item.topic not in replicate.unseen_topics for p in prompts])
    heads = Heads(
        train_junction_gate(model, value_model, states, seed=seed).gate,
        train_junction_gate(model, value_model, states[seen[states.prompts]], seed=seed).gate,
        train_q_head(model, value_model, states, seed=seed).scorer,
        fit_vocabulary_value_model(model, replicate.tokenizer, value_model, ids, **options).scorer,
    )
    workers.report(SECONDS_PER_PROMPT * len(prompts))
    return heads


def prompts_to_fit(replicate: Replicate) -> list[Prompt]:
    """Return the first training prompts of each objective."""
    each = len(replicate.prompts["training"]) // len(OBJECTIVES)
    count = max(2, round(SHARE * each))
    return [p for i, p in enumerate(replicate.prompts["training"]) if i % each < count]


def heldout_states(
    replicate: Replicate, loss: str, family: str, prompts: Sequence[Sequence[int]]
) -> tuple[States, States]:
    """Return states on prompts, with the base model's hidden states and with the value model's."""
    model, value_model, options = _teachers(replicate, loss, family)
    unit = (model, replicate.tokenizer, value_model, prompts)
    return collect_states(*unit, **options), collect_states(
        *unit, backbone=value_model.backbone, **options
    )


def _teachers(
    replicate: Replicate, loss: str, family: str
) -> tuple[PreTrainedModel, ValueModel, dict]:
    """Return the base model, the value model of a loss, and the options of their responses."""
    decoding = replicate.profile.decoding
    model = replicate.language_model(str(BASE), family)
    model.name_or_path = f"{BASE} of {family}"  # what is fitted to it names it, not this machine
    options = {
        "candidates": decoding.candidates,
        "max_new_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "batch_size": decoding.batch_size,
        "progress": False,
    }
    return model, replicate.value_model(str(value_kind(loss)), family), options
