"""Decoding states of a language model with the values that a scorer gives to their candidates.

They are what a `JunctionGate` and a `QHead` are fitted to: states of unsteered and of densely
steered responses, for steering changes which states are visited.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia._checks import check_prompts
from sia._modes import learning_mode
from sia._numbers import seeded_generator, whole_number
from sia._prefix_cache import CachedPrefixes
from sia.batch import Prompts, batches, read_prompts, read_template, start_decoding
from sia.gates import EveryToken, Never
from sia.scorers.base import Scorer
from sia.scorers.vocabulary_value_model import hidden_prefixes
from sia.signals import Divergence
from sia.steering import DEFAULT_CANDIDATES, Steering, divergence, entropy, steer

MAX_STATES = 200_000


def share_of(count: int, share: float) -> int:
    """Return how many of `count` a share stands for, at least one."""
    return max(1, round(share * count))


@dataclass(frozen=True)
class States:
    """States, that is positions in responses at which a next token is chosen, all on the CPU.

    Attributes:
        hidden: The language model's last hidden states, in its dtype, `(n, hidden)`.
        logits: Base logits of the K candidates, float32 `(n, K)`.
        candidates: Their token ids, `(n, K)`.
        values: Their values, float32 `(n, K)`.
        prompts: Number of the prompt of each state, `(n,)`; equal prompts have one number.
    """

    hidden: Tensor
    logits: Tensor
    candidates: Tensor
    values: Tensor
    prompts: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> Self:
        """Return some of the states."""
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Concatenate states, in order."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(cls))
        return cls(*(torch.cat(column) for column in columns))

    @property
    def entropy(self) -> Tensor:
        """Entropy over the candidates in nats, `(n,)`."""
        return entropy(self.logits)

    def divergence(self, steering: Steering) -> Tensor:
        """Return KL(π‖π*) in nats, `(n,)`: β times the regret of no steering (Lemma 2.1)."""
        return divergence(self.logits, steer(self.logits, self.values, steering))

    def shifted(self, steering: Steering, generator: torch.Generator) -> Tensor:
        """Return whether steering changes the sampled token, bool `(n,)`.

        Args:
            steering: The tilt.
            generator: Draws the noise that both tokens are sampled with.
        """
        uniform = torch.rand(self.logits.shape, generator=generator).clamp_(min=1e-20)
        noise = -(-uniform.log()).log()
        steered = steer(self.logits, self.values, steering)
        return (self.logits + noise).argmax(-1) != (steered + noise).argmax(-1)

    def dense_steering(self, scorer: Scorer, beta: float) -> Steering:
        """Return the steering of every token that has as many candidates as these states."""
        return Steering(scorer, EveryToken(), beta, candidates=self.candidates.shape[1])

    def split(self, share: float, generator: torch.Generator) -> tuple[Self, Self]:
        """Return the states of most prompts, and those of a random `share` of the prompts."""
        prompts = torch.unique(self.prompts)
        order = prompts[torch.randperm(len(prompts), generator=generator)]
        held_out = torch.isin(self.prompts, order[: share_of(len(order), share)])
        if (left := int((~held_out).sum())) < 2:
            raise ValueError(
                "at least two states are needed to learn from: too few states or prompts were "
                f"kept, got {left}"
            )
        return self[~held_out], self[held_out]


@learning_mode()
def collect_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    prompts: Prompts,
    *,
    beta: float = 1.0,
    candidates: int = DEFAULT_CANDIDATES,
    max_new_tokens: int = 128,
    temperature: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    value_prompts: Prompts | None = None,
    backbone: PreTrainedModel | None = None,
    max_states: int = MAX_STATES,
    progress: bool = True,
) -> States:
    """Return the states of one unsteered and one densely steered response to each prompt.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        scorer: Values the candidates.
        prompts: Same as in `generate`.
        beta: Strength of the densely steered responses.
        candidates: K.
        max_new_tokens: Longest response.
        temperature: Temperature of both responses; None: that of the model's `generation_config`.
        seed: Seed of both responses, and of the choice among too many states.
        batch_size: Number of responses that are decoded together.
        value_prompts: The prompts in the scorer's own template; by default the same token ids.
        backbone: Model without head whose hidden states are kept, those of the scorer's prompts;
            by default the language model's.
        max_states: About the largest number of states, chosen at random from all.
        progress: Whether to show progress bars.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    max_states = whole_number("max_states", max_states, 1)
    ids = read_prompts(model, tokenizer, prompts)
    value_ids = read_template(model, tokenizer, value_prompts, "value", ids, scorer)
    numbers = prompt_numbers(ids, value_ids)
    if len(numbers.unique()) < 2:
        raise ValueError(
            "some prompts are held out, so at least two different ones are needed, "
            f"got {len(numbers.unique())}"
        )
    seed, batch_size = whole_number("seed", seed), whole_number("batch_size", batch_size, 1)
    generator = seeded_generator(seed)
    keep = max_states / (2 * len(ids) * max_new_tokens)
    parts: list[States] = []
    steerings = [
        Steering(scorer, gate, beta, candidates=candidates) for gate in (Never(), EveryToken())
    ]
    check_prompts(model, tokenizer, ids, value_ids, steerings[0], None, max_new_tokens)
    for steering in steerings:
        description = f"responses, steering: {steering.gate.label}"
        for indices in batches(model, ids, max_new_tokens, batch_size, description, progress):
            prefixes = None
            if backbone is not None:
                prompts_of_batch = [value_ids[i] for i in indices]
                prefixes = hidden_prefixes(
                    backbone, nn.Identity(), prompts_of_batch, max_new_tokens
                )
            recorder = Recorder(parts, numbers[indices], keep, generator, prefixes)
            start_decoding(
                model,
                tokenizer,
                ids,
                value_ids,
                indices,
                [seed] * len(ids),
                steering=steering,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                observe=[Divergence()],
                record_states=recorder,
            ).run(max_new_tokens)
    return States.join(parts)


def prompt_numbers(*templates: Sequence[Sequence[int]]) -> Tensor:
    """Return for each prompt the number of the first one that is equal in all templates.

    Copies of a prompt have one number, so that none is held out while another is learned from.
    """
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    prompts = (tuple(map(tuple, forms)) for forms in zip(*templates, strict=True))
    return torch.tensor([first.setdefault(prompt, i) for i, prompt in enumerate(prompts)])


@dataclass(frozen=True)
class Recorder:
    """Keeps the states of a batch of responses, step by step.

    Attributes:
        states: Grows with every step.
        prompts: Numbers of the prompts of the batch, `(rows,)`.
        keep: Share of the states to keep; 1 or more for all.
        generator: Chooses them.
        prefixes: Model whose hidden states are kept; None for the language model's.
    """

    states: list[States]
    prompts: Tensor
    keep: float
    generator: torch.Generator
    prefixes: CachedPrefixes | None

    def __call__(self, rows: Tensor, responses: Tensor, hidden: Tensor, *columns: Tensor) -> None:
        """Keep one step; see `Decoding` for the arguments."""
        if self.prefixes is not None:
            lengths = torch.full_like(rows, responses.shape[1])
            hidden = self.prefixes.last(rows, responses, lengths)
        logits, candidates, values = (column.cpu() for column in columns)
        prompts = self.prompts[rows.cpu()]
        states = States(hidden.cpu(), logits, candidates, values, prompts)
        chosen = torch.rand(len(states), generator=self.generator) < self.keep
        self.states.append(states[chosen])
