"""The decoding loop, driven by `generate`, by `SteeredGenerate` and by the searches.

One step: forward pass of the language model (cached) → K candidates and their entropy → gate →
values of the candidates where it opens → tilt → one token per row by Gumbel-max with keyed noise →
finished rows leave the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia import _sampling
from sia._attention import Observer, observe_attention
from sia._checks import check_inputs, check_steering, check_values
from sia._kv_cache import backbone_of, preallocated_cache
from sia._responses import Responses
from sia.cost import Architecture, Cost, Meter, costs
from sia.gates import Step
from sia.generation import Generation
from sia.scorers.base import Session
from sia.signals import Attention, Entropy, Signal
from sia.steering import (
    Steering,
    candidate_count,
    entropy,
    kl_divergence,
    signal_entropy,
    steer,
)

# Ended rows leave once at most this share of the batch goes on, for leaving copies the cache.
COMPACT_BELOW = 7 / 8


@dataclass(frozen=True)
class Hooks:
    """Functions of the caller that take part in every step, if any.

    They see every row to the end, ended ones with `pad_token`, as in transformers.

    Attributes:
        process: Logits processors: token ids so far `(rows, length)` and scores
            `(rows, vocabulary)` in, scores out.
        stop: Stopping criteria: token ids so far in, bool `(rows,)` out.
        stream: Receives the newest tokens, `(rows,)`.
        pad_token: Token of rows that have ended.
    """

    process: Callable[..., Tensor] | None = None
    stop: Callable[[Tensor], Tensor] | None = None
    stream: Callable[[Tensor], None] | None = None
    pad_token: int = 0

    @property
    def used(self) -> bool:
        return any((self.process, self.stop, self.stream))


@dataclass(frozen=True)
class Outlook:
    """The language model's view of the next token, before steering.

    Attributes:
        logits: Of the whole vocabulary, float32 `(rows, vocabulary)`.
        base: Logits of the K candidates in descending order, `(rows, K)`.
        candidates: Their token ids, `(rows, K)`.
        entropy: Over the candidates in nats, `(rows,)`.
        signals: Those that are observed, `(rows,)` each.
    """

    logits: Tensor
    base: Tensor
    candidates: Tensor
    entropy: Tensor
    signals: dict[Signal, Tensor]


class Decoding:
    """A batch of responses on their way: `run` extends them, `reorder` continues some from others.

    Args:
        model: The language model.
        input_ids: Prompts padded on the left, `(prompts, length)`. Each has `samples` rows in
            succession, which share its prefill.
        attention_mask: 1 for the tokens of the prompts, `(prompts, length)`.
        row_keys: Keys of the noise, `(prompts,)`.
        value_prompts: The prompts as the scorer reads them, token ids without padding.
        max_new_tokens: Longest response.
        temperature: Divides the logits after the tilt; 0 is greedy.
        stop_tokens: Tokens that end a response.
        steering: None to sample from the K candidates of the model alone.
        candidates: K without a steering, 10 by default.
        samples: Number of responses to each prompt.
        prompt_indices: Numbers of the prompts in the caller's list, for messages.
        observe: Signals to record besides those of the gate.
        hooks: Functions of the caller.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        row_keys: Tensor,
        value_prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        stop_tokens: Sequence[int],
        steering: Steering | None = None,
        candidates: int | None = None,
        samples: int = 1,
        prompt_indices: Sequence[int] | None = None,
        observe: Sequence[Signal] = (),
        hooks: Hooks | None = None,
    ) -> None:
        count, prompt_length = input_ids.shape
        device, rows = input_ids.device, count * samples
        self.candidates = candidate_count(steering, candidates)
        self.prompt_indices = range(count) if prompt_indices is None else prompt_indices
        check_inputs(
            model, input_ids, attention_mask, value_prompts, self.prompt_indices, max_new_tokens
        )
        check_steering(model, steering, self.candidates)
        self.model, self.steering, self.samples = model, steering, samples
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.hooks = hooks or Hooks()
        self.session: Session | None = None
        if steering is not None:
            self.session = steering.scorer.start_session(value_prompts, max_new_tokens, samples)
        self.signals = observed_signals(observe, steering)
        recorded = [signal for signal in self.signals if signal != Entropy()]
        self.responses = Responses.empty(rows, max_new_tokens, recorded, device)
        self.stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
        self.prompt_lengths = attention_mask.sum(1).repeat_interleave(samples)
        self.padded = not bool(attention_mask.all())
        head = model.get_output_embeddings().weight
        self.meter = Meter(Architecture.of(backbone_of(model), head), rows, device)
        self.junctions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cache = preallocated_cache(model.config, prompt_length + max_new_tokens)
        self.step = 0  # number of tokens that every row has, or had when it ended
        # keys of every step, by row
        self.keys = _sampling.step_keys(_sampling.sample_keys(row_keys, samples), max_new_tokens)
        self.gate_keys = _sampling.gate_keys(self.keys)
        # by prompt until the first step has computed the prompts, from then on by row of the batch:
        self.prompts = self.current = input_ids
        self.mask = pad(attention_mask, (0, max_new_tokens), value=1)
        self.positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        # by row of the batch: which response, whether it goes on, and its signals one step before
        self.rows = torch.arange(rows, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.previous = dict.fromkeys(self.signals, torch.full((rows,), torch.nan, device=device))

    @property
    def active_rows(self) -> Tensor:
        """Rows that have neither ended nor run out of length, `(n,)`."""
        return self.rows[self.alive] if self.step < self.max_new_tokens else self.rows[:0]

    def run(self, tokens: int) -> None:
        """Extend the active responses by at most `tokens` tokens."""
        end = min(self.step + tokens, self.max_new_tokens)
        start, rows = self.step, self.rows[self.alive]
        attentions = [signal for signal in self.signals if isinstance(signal, Attention)]
        # inference mode saves a tenth of the time, but hooks must get to see ordinary tensors
        mode = torch.no_grad() if self.hooks.used else torch.inference_mode()
        with mode, observe_attention(self.model, attentions) as observer:
            while self.step < end and len(self.rows):
                self._extend(observer)
            self.responses.lengths[self.rows[self.alive]] = self.step
            steps = torch.arange(start, self.step, device=rows.device)
            written = steps < self.responses.lengths[rows, None]
            self._check_logits(rows, start, written)
            self._count(rows, start, written)

    def reorder(self, sources: Tensor, active: Tensor) -> None:
        """Continue row i from row `sources[i]` where `active[i]`; noise stays with the row.

        Args:
            sources: Row numbers, `(rows,)`.
            active: bool, `(rows,)`.
        """
        place = torch.zeros_like(sources)
        place[self.rows] = torch.arange(len(self.rows), device=sources.device)
        targets = active.nonzero().squeeze(1)
        self._keep(place[sources[targets]])
        self.rows, self.alive = targets, torch.ones_like(targets, dtype=torch.bool)
        self.responses.reorder(sources)
        if self.session is not None:
            self.session.reorder(sources)

    def generations(self, tokenizer: PreTrainedTokenizerBase | None) -> list[Generation]:
        """Return a `Generation` for each row, without text if there is no tokenizer."""
        return self.responses.generations(tokenizer, range(len(self.junctions)), self.costs())

    def costs(self, further: Sequence[Meter] = ()) -> list[Cost]:
        """Return the cost of each row, with the counts of `further` meters of scorers."""
        meters = [] if self.session is None else self.session.meters
        return costs(self.meter, [*meters, *further], self.junctions)

    def _extend(self, observer: Observer | None) -> None:
        """Make one step: the next token of every row of the batch."""
        outlook = self._look_ahead(observer)
        opened = self._gate(outlook)
        steered, kl = self._steer(outlook, opened)
        noise = _sampling.step_gumbel(self.keys[self.rows, self.step], outlook.candidates)
        base_token = token = self._pick(outlook, outlook.base, noise)
        if steered is not outlook.base:
            token = self._pick(outlook, steered, noise)
        if self.hooks.used:
            token = token.where(self.alive, self.hooks.pad_token)
        self._record(outlook, token, base_token, opened, kl)
        if self.hooks.stream:
            self.hooks.stream(token)
        self.previous = outlook.signals
        self.step += 1
        self.current, self.positions = token[:, None], self.positions[:, -1:] + 1
        self._leave(token)

    def _look_ahead(self, observer: Observer | None) -> Outlook:
        """Run the language model on the newest tokens: at first of prompts, then of rows."""
        length = self.prompts.shape[1] + self.step
        outputs = self.model(
            input_ids=self.current,
            attention_mask=self.mask[:, :length] if self.padded else None,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = outputs.logits[:, -1].float()
        signals = {} if observer is None else observer.signals(self.positions[:, -1])
        if self.step == 0 and self.samples > 1:  # the samples of a prompt share its first pass
            self.cache.batch_repeat_interleave(self.samples)
            self.mask = self.mask.repeat_interleave(self.samples, 0)
            self.positions = self.positions.repeat_interleave(self.samples, 0)
            logits = logits.repeat_interleave(self.samples, 0)
            signals = {name: x.repeat_interleave(self.samples) for name, x in signals.items()}
        base, candidates = logits.topk(self.candidates)
        uncertainty = entropy(base)
        for signal in self.signals:
            if isinstance(signal, Entropy):
                signals[signal] = signal_entropy(signal, logits, uncertainty)
        return Outlook(logits, base, candidates, uncertainty, signals)

    def _gate(self, outlook: Outlook) -> Tensor | None:
        """Return where the gate opens, bool `(rows,)`; None without steering."""
        if self.steering is None:
            return None
        step = Step(
            self.step,
            outlook.entropy,
            outlook.logits,
            self.gate_keys[self.rows, self.step],
            outlook.signals,
            self.previous,
        )
        return self.steering.gate.opens(step) & self.alive

    def _steer(self, outlook: Outlook, opened: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the logits to sample from `(rows, K)` and their KL from the base `(rows,)`.

        The logits are the very tensor `outlook.base`, and the KL is None, if no row is steered.
        """
        if self.steering is None or self.session is None or opened is None:
            return outlook.base, None
        places = opened.nonzero().squeeze(1)
        if len(places) == 0:
            return outlook.base, None
        rows, base = self.rows[places], outlook.base[places]
        prefixes = self.responses.tokens[rows, : self.step]
        values = self.session.score(rows, prefixes, outlook.candidates[places]).to(base.device)
        check_values(values, rows, self.prompt_indices, self.samples, self.step)
        tilted = steer(base, values, self.steering)
        steered = outlook.base.index_copy(0, places, tilted)
        kl = torch.zeros_like(outlook.entropy)
        return steered, kl.index_copy_(0, places, kl_divergence(tilted, base))

    def _pick(self, outlook: Outlook, scores: Tensor, noise: Tensor) -> Tensor:
        """Sample a token of each row `(rows,)` from the scores of the candidates `(rows, K)`.

        Logits processors of the caller come first; they see the whole vocabulary.
        """
        candidates = outlook.candidates
        if self.hooks.process:
            impossible = scores.new_full(outlook.logits.shape, -torch.inf)
            everywhere = impossible.scatter(1, candidates, scores)
            scores = self.hooks.process(self._ids(), everywhere).gather(1, candidates)
            if bool(((scores == -torch.inf).all(1) & self.alive).any()):
                raise ValueError(
                    f"the logits processors ruled out all {scores.shape[1]} candidates of a row: "
                    "ask for more candidates"
                )
        chosen = _sampling.choose(scores, noise, self.temperature)
        return candidates.gather(1, chosen[:, None]).squeeze(1)

    def _ids(self) -> Tensor:
        """Return prompts and responses so far of the rows of the batch."""
        prompts = self.prompts[self.rows // self.samples]
        return torch.cat([prompts, self.responses.tokens[self.rows, : self.step]], dim=1)

    def _record(
        self,
        outlook: Outlook,
        token: Tensor,
        base_token: Tensor,
        opened: Tensor | None,
        kl: Tensor | None,
    ) -> None:
        """Write this step down; what is written for rows that have ended lies beyond their end."""
        responses, step = self.responses, self.step
        # a slice writes twice as fast
        rows = slice(None) if len(self.rows) == len(responses.lengths) else self.rows
        responses.tokens[rows, step] = token
        responses.entropy[rows, step] = outlook.entropy
        responses.base_token[rows, step] = base_token
        if opened is not None:
            responses.steered[rows, step] = opened
        if kl is not None:
            responses.kl[rows, step] = kl
        for signal, column in responses.signals.items():
            column[rows, step] = outlook.signals[signal]

    def _leave(self, token: Tensor) -> None:
        """Note which responses end with this token, and drop ended ones once they are many."""
        ended = (token[:, None] == self.stops).any(1) & self.alive
        stopped = self.hooks.stop(self._ids()) & self.alive if self.hooks.stop else ended
        done = ended | stopped
        if not bool(done.any()):
            return
        self.responses.finished[self.rows[ended]] = True
        self.responses.lengths[self.rows[done]] = self.step
        self.alive = self.alive & ~done
        keep = self.alive.nonzero().squeeze(1)
        most = 0 if self.hooks.used else COMPACT_BELOW * len(self.alive)  # hooks see ended rows
        if len(keep) <= most:
            self._keep(keep)

    def _keep(self, places: Tensor) -> None:
        """Continue with the rows at these places of the batch."""
        if len(places):
            self.cache.batch_select_indices(places)
        self.rows, self.alive = self.rows[places], self.alive[places]
        self.current, self.positions = self.current[places], self.positions[places]
        self.mask = self.mask[places]
        self.previous = {signal: values[places] for signal, values in self.previous.items()}

    def _check_logits(self, rows: Tensor, start: int, written: Tensor) -> None:
        """Raise FloatingPointError if the language model gave NaN since step `start`.

        written: Tokens that rows have since, bool `(n, steps)`.
        """
        wrong = self.responses.entropy[rows, start : self.step].isnan() & written
        if bool(wrong.any()):
            place, step = wrong.nonzero()[0].tolist()
            prompt = self.prompt_indices[int(rows[place]) // self.samples]
            raise FloatingPointError(
                "logits must be numbers, the language model gave NaN "
                f"at step {start + step} of prompt {prompt}"
            )

    def _count(self, rows: Tensor, start: int, written: Tensor) -> None:
        """Count the cost of these rows since step `start`; a shared prompt is its first row's."""
        lengths, prompts = self.responses.lengths[rows], self.prompt_lengths[rows]
        steered = self.responses.steered[rows, start : self.step] & written
        self.junctions[rows] += steered.sum(1)
        forwards, begin = lengths - start, prompts + start - 1
        if start == 0:
            first = rows % self.samples == 0
            forwards = torch.where(first, forwards, forwards - 1)
            begin = torch.where(first, 0, prompts)
        self.meter.count(rows, forwards, begin, prompts + lengths - 1, forwards)


def observed_signals(observe: Sequence[Signal], steering: Steering | None) -> list[Signal]:
    """Return the signals to compute at each step: of the gate, and those in `observe`."""
    if not isinstance(observe, Sequence) or not all(isinstance(s, Signal) for s in observe):
        raise TypeError(
            f"observe must be a list of signals, such as [Attention()], got {observe!r}"
        )
    return sorted({*observe, *(steering.gate.signals if steering else ())}, key=repr)
