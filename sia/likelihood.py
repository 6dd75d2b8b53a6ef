"""Exact log-likelihoods of given responses under a steered policy, token by token.

Where the gate opens a token has ln π* by the tilt of `sia.steering`, elsewhere ln π over the K
candidates, both at the given temperature; the chain rule adds them up. That is the distribution
which `generate` samples from if the generation config asks for nothing but a temperature: top-k,
top-p and penalties are not applied here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia import _sampling
from sia._checks import (
    check_inputs,
    check_readers,
    check_steering,
    check_values,
    vocabulary_size,
)
from sia._hidden_states import observe_hidden_states
from sia._inputs import check_sequences, eos_token_ids, pad_left, pad_right
from sia._kv_cache import (
    check_float64,
    check_model,
    check_positions,
    input_device,
    narrows_logits,
    rotary_switch,
)
from sia._modes import evaluation_mode
from sia._numbers import whole_number
from sia.gates import Never, Step
from sia.scorers.base import HiddenStateSession, close
from sia.signals import Attention, Divergence
from sia.steering import Steering, candidate_count, entropy, steer, step_signals

TokenIds = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of one response; all arrays have one entry per token.

    Attributes:
        log_probabilities: ln π(y_t | x, y_<t) under the steered policy, float32; −∞ for a token
            that is not among its K candidates.
        greedy: Whether each token is the most probable one, bool.
        steered: Whether the gate was open, bool.
    """

    log_probabilities: np.ndarray
    greedy: np.ndarray
    steered: np.ndarray

    @property
    def total(self) -> float:
        """Log-probability ln π of the whole response, in nats."""
        return float(self.log_probabilities.sum())


def log_likelihoods(
    model: PreTrainedModel,
    steering: Steering | None,
    prompts: TokenIds,
    responses: TokenIds,
    *,
    candidates: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    value_prompts: TokenIds | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Likelihood]:
    """Return the log-likelihood of each response under the steered policy, token by token.

    Args:
        model: The language model.
        steering: What to steer with, and when; None for the K candidates of the model alone.
        prompts: Token ids without padding.
        responses: Token ids without padding, one response for each prompt.
        candidates: K without a steering, 10 by default.
        temperature: Divides the logits after the tilt; above 0. Top-k, top-p and penalties of the
            generation config are not applied.
        seed: Seed of gates that have noise of their own.
        batch_size: Responses per forward pass.
        value_prompts: The prompts in the value model's own template; by default the same.
        tokenizer: Tokenizer of the language model, by whose chat template a reward model then reads
            responses as closed, as it does in `generate`.

    Raises:
        ValueError: For an empty prompt or response, a gate on attention, numbers out of range,
            vocabularies of different sizes.
        FloatingPointError: Where a value is NaN or infinite.
    """
    check_model(model)
    check_float64(model)
    value_prompts = prompts if value_prompts is None else value_prompts
    # a column of pandas, say, has labels that are no numbers of rows
    prompts, responses, value_prompts = map(list, (prompts, responses, value_prompts))
    count = candidate_count(steering, candidates)
    batch_size = whole_number("batch_size", batch_size, 1)
    seed = whole_number("seed", seed)
    gate = Never() if steering is None else steering.gate
    _sampling.check_temperature(temperature)
    if temperature == 0:
        raise ValueError("temperature must be above 0: a greedy policy has no likelihoods")
    if any(isinstance(signal, Attention | Divergence) for signal in gate.signals):
        raise ValueError(
            "log-likelihoods need a gate that looks at entropies, hidden states, positions or "
            f"noise, got {gate}"
        )
    # decoding never gives tokens that the scorer lacks
    shared = check_steering(model, steering, count, tokenizer)
    _check_examples(prompts, responses, value_prompts, vocabulary_size(model), shared)
    if steering is not None:
        further = None if tokenizer is None else tokenizer.eos_token_id
        ends = eos_token_ids(model.generation_config, further)
        steering = replace(steering, scorer=close(steering.scorer, tokenizer, ends))
    likelihoods: dict[int, Likelihood] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        columns = [[ids[i] for i in chunk] for ids in (prompts, responses, value_prompts)]
        with torch.inference_mode():
            batch = _Batch(model, steering, shared, count, seed, chunk, *columns)
            likelihoods.update(zip(chunk, batch.read(temperature), strict=True))
    return [likelihoods[i] for i in range(len(prompts))]


def _check_examples(
    prompts: TokenIds,
    responses: TokenIds,
    value_prompts: TokenIds,
    vocabulary: int,
    shared_vocabulary: int,
) -> None:
    if not len(prompts) == len(responses) == len(value_prompts):
        raise ValueError(
            f"prompts, responses and value_prompts must be as many, got {len(prompts)}, "
            f"{len(responses)} and {len(value_prompts)}"
        )
    check_sequences("prompt", prompts, vocabulary)
    check_sequences("response", responses, shared_vocabulary)


def _read(model: PreTrainedModel, input_ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits, and the hidden states that they are read from, at the positions `kept`."""
    # what the output embeddings read is narrowed to `kept` too
    with evaluation_mode(model.modules()), observe_hidden_states(model, read=True) as states:
        narrows = narrows_logits(model)
        narrowed = {"logits_to_keep": kept} if narrows else {}
        logits = model(input_ids=input_ids, use_cache=False, return_dict=True, **narrowed).logits
    assert states is not None
    assert states.latest is not None
    hidden = states.latest.to(logits.device)  # output embeddings may lie on another one
    return (logits, hidden) if narrows else (logits[:, kept], hidden[:, kept])


class _Batch:
    """Responses that are read together, step by step, after one forward pass of the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        steering: Steering | None,
        vocabulary: int,
        candidates: int,
        seed: int,
        prompt_indices: Sequence[int],
        prompts: TokenIds,
        responses: TokenIds,
        value_prompts: TokenIds,
    ) -> None:
        device = input_device(model)
        self.steering, self.candidates, self.prompt_indices = steering, candidates, prompt_indices
        self.gate = Never() if steering is None else steering.gate
        self.lengths = [len(response) for response in responses]
        self.tokens, self.written = pad_right(responses, device)
        rows, longest = self.tokens.shape
        self.vocabulary = vocabulary  # tokens that model and scorer share
        value_vocabulary = steering.scorer.vocabulary_size if steering else vocabulary_size(model)
        check_inputs(
            model,
            *pad_left(prompts, device),
            value_prompts,
            value_vocabulary,
            prompt_indices,
            1,
        )
        # padding is on the right and attention is causal: no token sees it, and no mask is needed
        pairs = [  # nothing is read at the last token
            [*prompt, *response[:-1]] for prompt, response in zip(prompts, responses, strict=True)
        ]
        input_ids, _ = pad_right(pairs, device)
        check_positions(model, input_ids.shape[1])
        starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
        first = int(starts.min()) - 1  # the first position that predicts a response token
        kept = torch.arange(first, input_ids.shape[1], device=device)
        self.logits, self.hidden = _read(model, input_ids, kept)
        switch = rotary_switch(model, first + 1, input_ids.shape[1])
        if switch is not None:  # longer sequences change the frequencies of earlier tokens too
            early = switch - first
            self.logits[:, :early], self.hidden[:, :early] = _read(
                model, input_ids[:, :switch], kept[:early]
            )
        self.first_column = starts - 1 - first  # of the logits of each row
        self.session = (
            None if steering is None else steering.scorer.start_session(value_prompts, longest)
        )
        check_readers(model, self.gate.signals, self.session)
        prompt_keys = _sampling.prompt_keys(prompts, [seed] * rows, device)
        self.keys = _sampling.gate_keys(_sampling.step_keys(prompt_keys, longest))
        self.previous = {
            signal: torch.full((rows,), torch.nan, dtype=torch.float32, device=device)
            for signal in self.gate.signals
        }
        self.log_probabilities = torch.full(
            (rows, longest), torch.nan, dtype=torch.float32, device=device
        )
        self.greedy = torch.zeros(rows, longest, dtype=torch.bool, device=device)
        self.steered = torch.zeros_like(self.greedy)

    def read(self, temperature: float) -> list[Likelihood]:
        """Return the likelihood of each response."""
        for step in range(self.tokens.shape[1]):
            self._read_step(step, temperature)
        columns = (self.log_probabilities, self.greedy, self.steered)
        arrays = [column.cpu().numpy() for column in columns]
        return [
            Likelihood(*(array[row, :length] for array in arrays))
            for row, length in enumerate(self.lengths)
        ]

    def _read_step(self, step: int, temperature: float) -> None:
        """Read token number `step` of the responses that have one."""
        rows = self.written[:, step].nonzero().squeeze(1)
        columns = self.first_column[rows] + step
        logits = self.logits[rows, columns].float()
        logits = _sampling.without_tokens_from(logits, self.vocabulary)
        hidden = self.hidden[rows, columns]
        scores, candidates = _sampling.top_candidates(logits, self.candidates)
        opened = self._gate(step, rows, logits, scores, hidden)
        if isinstance(self.session, HiddenStateSession):
            self.session.observe(hidden[opened])
        scores = self._steer(step, rows, opened, scores, candidates)
        tokens = self.tokens[rows, step]
        target = candidates == tokens[:, None]  # (n, K)
        log_probabilities = (scores / temperature).log_softmax(-1)
        of_target = log_probabilities.where(target, 0.0).sum(1)
        self.log_probabilities[rows, step] = torch.where(target.any(1), of_target, -torch.inf)
        self.greedy[rows, step] = _sampling.greedy_token(scores, candidates) == tokens
        self.steered[rows, step] = opened

    def _gate(
        self, step: int, rows: Tensor, logits: Tensor, scores: Tensor, hidden: Tensor
    ) -> Tensor:
        """Return where the gate opens, bool `(n,)`."""
        uncertainty = entropy(scores)
        signals = step_signals(self.gate.signals, logits, uncertainty, hidden)
        previous = {signal: values[rows] for signal, values in self.previous.items()}
        opened = self.gate.opens(
            Step(step, uncertainty, logits, self.keys[rows, step], signals, previous)
        )
        for signal, values in signals.items():
            self.previous[signal][rows] = values
        return opened

    def _steer(
        self, step: int, rows: Tensor, opened: Tensor, scores: Tensor, candidates: Tensor
    ) -> Tensor:
        """Return the scores of the candidates, `(n, K)`, steered where the gate opens."""
        places = opened.nonzero().squeeze(1)
        if self.steering is None or self.session is None or len(places) == 0:
            return scores
        rows, candidates = rows[places], candidates[places]
        values = self.session.score(rows, self.tokens[rows, :step], candidates).to(scores)
        check_values(values, candidates, rows, self.prompt_indices, 1, step)
        return scores.index_copy(0, places, steer(scores[places], values, self.steering))
