"""The decoding loop. What drives it: `generate` for lists of prompts, `steered_generate` for transformers, `search` for the best of many.

One step: forward pass of the language model (cached) → K candidates and their entropy → gate → values of the candidates
where it opened → tilt → one token per row by Gumbel-max with keyed noise → finished rows leave the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia import _sampling
from sia._attention import Observer, observe
from sia._kv_cache import check_positions, preallocated_cache
from sia.cost import Architecture, Cost, Meter, costs
from sia.gates import Step
from sia.generation import Generation
from sia.scorers.base import Scorer, Session
from sia.signals import Attention, Entropy, Signal
from sia.steering import Steering, drop_improbable, entropy, kl_divergence, tilt

DEFAULT_CANDIDATES = 10  # K where there is no steering to name it
COMPACT_BELOW = (
    7 / 8
)  # rows leave the batch together, once this share of it is left: every leaving copies the cache

Process = Callable[
    [Tensor, Tensor], Tensor
]  # (token ids so far, scores over the vocabulary) → scores
Stop = Callable[[Tensor], Tensor]  # token ids so far → bool (rows,)
Stream = Callable[[Tensor], None]  # the newest tokens (rows,)


@dataclass
class Responses:
    """What decoding writes down: `(rows, max_new_tokens)` each, of which the first `lengths` columns count."""

    tokens: Tensor
    entropy: Tensor
    steered: Tensor
    base_token: Tensor
    kl: Tensor
    signals: dict[Signal, Tensor]
    lengths: Tensor  # (rows,)
    finished: Tensor  # (rows,), by a stop token

    @classmethod
    def empty(
        cls, rows: int, max_new_tokens: int, signals: Iterable[Signal], device: torch.device
    ) -> Responses:
        def blank(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        return cls(
            tokens=blank(torch.int64, max_new_tokens),
            entropy=blank(torch.float32, max_new_tokens),
            steered=blank(torch.bool, max_new_tokens),
            base_token=blank(torch.int64, max_new_tokens),
            kl=blank(torch.float32, max_new_tokens),
            signals={signal: blank(torch.float32, max_new_tokens) for signal in signals},
            lengths=blank(torch.int64),
            finished=blank(torch.bool),
        )

    def continue_from(self, sources: Tensor) -> None:
        """Row i becomes a copy of row `sources[i]`."""
        for name, value in vars(self).items():
            copied = (
                {signal: column[sources] for signal, column in value.items()}
                if name == "signals"
                else value[sources]
            )
            setattr(self, name, copied)

    def sequences(self, input_ids: Tensor, pad_token_id: int | None) -> Tensor:
        length = int(self.lengths.max())
        beyond = torch.arange(length, device=self.tokens.device) >= self.lengths[:, None]
        return torch.cat(
            [input_ids, self.tokens[:, :length].masked_fill(beyond, pad_token_id or 0)], dim=1
        )

    def generations(
        self, tokenizer: PreTrainedTokenizerBase | None, rows: Sequence[int], costs: Sequence[Cost]
    ) -> list[Generation]:
        """Of these rows. costs: of every row."""
        arrays = [
            x.cpu().numpy()
            for x in (self.tokens, self.entropy, self.steered, self.base_token, self.kl)
        ]
        signals = {signal: column.cpu().numpy() for signal, column in self.signals.items()}
        lengths, finished = self.lengths.tolist(), self.finished.tolist()
        generations = []
        for row in rows:
            tokens, *rest = (array[row, : lengths[row]].copy() for array in arrays)
            text = None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
            observed = {
                signal: column[row, : lengths[row]].copy() for signal, column in signals.items()
            }
            generations.append(
                Generation(
                    text, tokens, *rest, finished=finished[row], cost=costs[row], signals=observed
                )
            )
        return generations


class Decoding:
    """A batch of responses on their way: `run` goes on by some tokens, `continue_from` lets rows go on from others.

    input_ids, attention_mask: prompts `(prompts, length)`, padded on the left. Each has `samples` rows in succession, which share its
    prefill. row_keys: `(prompts,)`. value_prompts: token ids for the scorer. temperature: 0 is greedy.
    numbers: what to call the prompts in messages, their places in the caller's list.
    observe: signals to record besides those of the gate.
    process, stop, stream: logits processors, stopping criteria and streamer of the caller, if any. They see every row to the end, those
        that ended with `pad_token`, as in transformers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        steering: Steering | None,
        row_keys: Tensor,
        value_prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float,
        stop_tokens: Sequence[int],
        samples: int = 1,
        numbers: Sequence[int] | None = None,
        observe: Sequence[Signal] = (),
        process: Process | None = None,
        stop: Stop | None = None,
        stream: Stream | None = None,
        pad_token: int = 0,
    ) -> None:
        count, prompt_length = input_ids.shape
        self.numbers = range(count) if numbers is None else numbers
        check(
            model, input_ids, attention_mask, value_prompts, steering, max_new_tokens, self.numbers
        )
        self.model, self.steering, self.samples = model, steering, samples
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.process, self.stop, self.stream, self.pad_token = process, stop, stream, pad_token
        self.watched = bool(process or stop or stream)
        device, rows = input_ids.device, count * samples
        self.candidates = steering.candidates if steering else DEFAULT_CANDIDATES
        self.session: Session | None = None
        if steering and steering.scorer is not None:
            self.session = steering.scorer.start_session(value_prompts, max_new_tokens, samples)
        if (
            isinstance(observe, str)
            or not isinstance(observe, Sequence)
            or not all(isinstance(s, Signal) for s in observe)
        ):
            raise TypeError(
                f"observe must be a list of signals, such as [Attention()], got {observe!r}"
            )
        self.signals = sorted(
            {*observe, *(steering.gate.signals if self.session else ())}, key=repr
        )
        self.responses = Responses.empty(
            rows, max_new_tokens, (s for s in self.signals if s != Entropy()), device
        )
        self.stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
        self.prompt_lengths = attention_mask.sum(1).repeat_interleave(samples)
        self.padded = not bool(attention_mask.all())
        self.meter = Meter(
            Architecture.of(model.base_model, model.get_output_embeddings().weight), rows, device
        )
        self.junctions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cache = preallocated_cache(model.config, prompt_length + max_new_tokens)
        self.number = 0  # tokens that every row has, or had when it ended
        # by prompt until the first step has computed the prompts, from then on by row of the batch:
        self.prompts = input_ids
        self.input_ids, self.mask = (
            input_ids,
            torch.cat([attention_mask, attention_mask.new_ones(count, max_new_tokens)], dim=1),
        )
        self.current, self.positions = input_ids, (attention_mask.cumsum(1) - 1).clamp(min=0)
        # by row of the batch: which response it is, whether that goes on, its keys for every step, its signals of the last step
        self.rows = torch.arange(rows, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.all_keys = _sampling.step_keys(
            _sampling.sample_keys(row_keys, samples), max_new_tokens
        )
        self.all_gate_keys = _sampling.gate_keys(self.all_keys)
        self.keys, self.gate_keys = self.all_keys, self.all_gate_keys
        self.last = {
            signal: torch.full((rows,), math.nan, device=device) for signal in self.signals
        }

    def run(self, tokens: int) -> None:
        """Goes on by so many tokens at most, as long as there are responses that have not ended."""
        # inference mode saves a tenth of the time, but what the caller's functions get to see must be ordinary tensors
        with torch.no_grad() if self.watched else torch.inference_mode():
            self._run(tokens)

    def _run(self, tokens: int) -> None:
        end = min(self.number + tokens, self.max_new_tokens)
        begun, took_part = self.number, self.rows[self.alive]
        with observe(
            self.model, [signal for signal in self.signals if isinstance(signal, Attention)]
        ) as observer:
            while self.number < end and len(self.rows):
                self._step(observer)
        self.responses.lengths[self.rows[self.alive]] = self.number
        self._count(took_part, begun)

    @property
    def going(self) -> Tensor:
        """Rows that have neither ended nor run out of length, `(n,)`."""
        return self.rows[self.alive] if self.number < self.max_new_tokens else self.rows[:0]

    def continue_from(self, sources: Tensor, going: Tensor) -> None:
        """Row i goes on from where row `sources[i]` stands, where `going[i]`; both `(rows,)`. Noise stays with the row."""
        place = torch.zeros_like(sources)
        place[self.rows] = torch.arange(len(self.rows), device=sources.device)
        targets = going.nonzero().squeeze(1)
        self._keep(place[sources[targets]])
        self.rows, self.alive = targets, torch.ones_like(targets, dtype=torch.bool)
        self.keys, self.gate_keys = self.all_keys[targets], self.all_gate_keys[targets]
        self.responses.continue_from(sources)
        if self.session:
            self.session.reorder(sources)

    def generations(self, tokenizer: PreTrainedTokenizerBase | None) -> list[Generation]:
        return self.responses.generations(tokenizer, range(len(self.junctions)), self.costs())

    def costs(self, further: Sequence[Meter] = ()) -> list[Cost]:
        """Of each row, with what the `further` meters of scorers counted."""
        return costs(
            self.meter, [*(self.session.meters if self.session else ()), *further], self.junctions
        )

    def _step(self, observer: Observer | None) -> None:
        number, steering, responses = self.number, self.steering, self.responses
        logits = self._forward()
        base, candidates = logits.topk(self.candidates)  # (rows, K)
        uncertainty = entropy(base)
        signals = self._signals(logits, uncertainty, observer)
        if number == 0:
            logits, base, candidates, uncertainty, signals = self._fan_out(
                logits, base, candidates, uncertainty, signals
            )
        steered, kl, opened = base, None, None
        if self.session:
            step = Step(number, uncertainty, logits, self.gate_keys[:, number], signals, self.last)
            opened = steering.gate.opens(step) & self.alive
            where = opened.nonzero().squeeze(1)
            if len(where):
                rows = self.rows[where]
                values = self.session.score(
                    rows, responses.tokens[rows, :number], candidates[where]
                ).to(base.device)
                check_values(values, rows, self.numbers, self.samples, number)
                plain = base[where]
                tilted = drop_improbable(
                    tilt(plain, values, steering.beta), plain, steering.min_probability
                )
                steered = base.index_copy(0, where, tilted)
                kl = torch.zeros_like(uncertainty).index_copy_(
                    0, where, kl_divergence(tilted, plain)
                )
        noise = _sampling.step_gumbel(self.keys[:, number], candidates)
        base_token = self._pick(base, candidates, noise, logits.shape[1])
        token = (
            base_token
            if steered is base
            else self._pick(steered, candidates, noise, logits.shape[1])
        )
        if self.watched:
            token = token.where(self.alive, self.pad_token)
        self.last = signals
        # what is written for rows that have ended lies beyond their lengths; a slice writes twice as fast
        rows = slice(None) if len(self.rows) == len(responses.lengths) else self.rows
        responses.tokens[rows, number] = token
        responses.entropy[rows, number] = uncertainty
        responses.base_token[rows, number] = base_token
        if opened is not None:
            responses.steered[rows, number] = opened
        if kl is not None:
            responses.kl[rows, number] = kl
        for signal, column in responses.signals.items():
            column[rows, number] = signals[signal]
        if self.stream:
            self.stream(token)
        self.number += 1
        self.current, self.positions = token[:, None], self.positions[:, -1:] + 1
        self._leave(token)

    def _forward(self) -> Tensor:
        """Logits of the next token, float32 `(prompts or rows, vocabulary)`."""
        length = self.input_ids.shape[1] + self.number
        outputs = self.model(
            input_ids=self.current,
            attention_mask=self.mask[:, :length] if self.padded else None,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1].float()

    def _signals(
        self, logits: Tensor, uncertainty: Tensor, observer: Observer | None
    ) -> dict[Signal, Tensor]:
        signals: dict[Signal, Tensor] = observer.signals(self.positions[:, -1]) if observer else {}
        for signal in self.signals:
            if signal == Entropy():
                signals[signal] = uncertainty
            elif isinstance(signal, Entropy):
                signals[signal] = Categorical(logits=logits, validate_args=False).entropy()
        return signals

    def _fan_out(
        self,
        logits: Tensor,
        base: Tensor,
        candidates: Tensor,
        uncertainty: Tensor,
        signals: dict[Signal, Tensor],
    ) -> tuple:
        """After the prompts are computed: everything once for each sample of a prompt."""
        if self.samples == 1:
            return logits, base, candidates, uncertainty, signals
        self.cache.batch_repeat_interleave(self.samples)
        self.input_ids, self.mask, self.positions, *rest = (
            x.repeat_interleave(self.samples, 0)
            for x in (
                self.input_ids,
                self.mask,
                self.positions,
                logits,
                base,
                candidates,
                uncertainty,
            )
        )
        return *rest, {
            signal: values.repeat_interleave(self.samples) for signal, values in signals.items()
        }

    def _pick(self, scores: Tensor, candidates: Tensor, noise: Tensor, vocabulary: int) -> Tensor:
        """The sampled token of each row `(rows,)`, after the caller's logits processors, which see the whole vocabulary."""
        if self.process:
            everywhere = scores.new_full((len(scores), vocabulary), -math.inf).scatter(
                1, candidates, scores
            )
            scores = self.process(self._ids(self.number), everywhere).gather(1, candidates)
            if bool(((scores == -math.inf).all(1) & self.alive).any()):
                raise ValueError(
                    f"the logits processors ruled out all {scores.shape[1]} candidates of a row: ask for more candidates"
                )
        return candidates.gather(
            1, _sampling.choose(scores, noise, self.temperature)[:, None]
        ).squeeze(1)

    def _ids(self, tokens: int) -> Tensor:
        """Prompt and the first response tokens of the rows of the batch."""
        return torch.cat([self.input_ids, self.responses.tokens[self.rows, :tokens]], dim=1)

    def _leave(self, token: Tensor) -> None:
        """Notes which responses end with this token, and takes ended ones out of the batch once there are enough of them."""
        ended = (token[:, None] == self.stops).any(1) & self.alive
        done = ended | (self.stop(self._ids(self.number)) & self.alive) if self.stop else ended
        if bool(done.any()):
            self.responses.finished[self.rows[ended]] = True
            self.responses.lengths[self.rows[done]] = self.number
            self.alive = self.alive & ~done
            keep = self.alive.nonzero().squeeze(1)
            if len(keep) == 0 or (
                not self.watched and len(keep) <= COMPACT_BELOW * len(self.alive)
            ):
                self._keep(keep)

    def _keep(self, places: Tensor) -> None:
        """The batch goes on with the rows at these places of it."""
        if len(places):
            self.cache.batch_select_indices(places)
        self.rows, self.alive = self.rows[places], self.alive[places]
        self.keys, self.gate_keys = self.keys[places], self.gate_keys[places]
        self.current, self.positions = self.current[places], self.positions[places]
        self.mask, self.input_ids = self.mask[places], self.input_ids[places]
        self.last = {signal: values[places] for signal, values in self.last.items()}

    def _count(self, rows: Tensor, begun: int) -> None:
        """Counts what these rows took since they had `begun` tokens; a shared prompt is its first row's.

        Errors: FloatingPointError if the language model gave no numbers.
        """
        if len(rows) == 0:
            return
        responses, prompts, new = (
            self.responses,
            self.prompt_lengths[rows],
            self.responses.lengths[rows] - begun,
        )
        written = torch.arange(self.number - begun, device=rows.device) < new[:, None]
        wrong = (responses.entropy[rows, begun : self.number].isnan() & written).nonzero().tolist()
        if wrong:
            place, step = wrong[0]
            number = self.numbers[int(rows[place]) // self.samples]
            raise FloatingPointError(
                f"logits must be numbers, the language model gave NaN at step {begun + step} of prompt {number}"
            )
        self.junctions[rows] += (responses.steered[rows, begun : self.number] & written).sum(1)
        if begun > 0:
            start, forwards = prompts + begun - 1, new
        else:
            first = rows % self.samples == 0
            start, forwards = torch.where(first, 0, prompts), torch.where(first, new, new - 1)
        self.meter.count(rows, forwards, start, prompts + begun + new - 1, forwards)


def check(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    value_prompts: Sequence[Sequence[int]],
    steering: Steering | None,
    max_new_tokens: int,
    numbers: Sequence[int],
) -> None:
    """What can be wrong before the first step, each in one sentence."""
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"steering needs a decoder-only language model, got {type(model).__name__}"
        )
    if len(value_prompts) != len(input_ids):
        raise ValueError(
            f"value_prompts must be one per row: expected {len(input_ids)}, got {len(value_prompts)}"
        )
    if steering is not None and not isinstance(steering, Steering):
        raise TypeError(
            f"steering must be a Steering(scorer, gate, …), got {type(steering).__name__}"
        )
    lengths = attention_mask.sum(1).tolist()
    for number, length, value_prompt in zip(numbers, lengths, value_prompts, strict=True):
        if length == 0 or len(value_prompt) == 0:
            raise ValueError(f"a prompt needs at least one token, prompt {number} has none")
    if not bool(attention_mask[:, -1].all()):
        raise ValueError(
            'prompts must be padded on the left (tokenizer.padding_side = "left"), got padding on the right'
        )
    vocabulary = model.config.get_text_config().vocab_size
    for ids in (input_ids.flatten().tolist(), *value_prompts):
        for token in (min(ids), max(ids)):
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"token ids must be at least 0 and below the vocabulary of {vocabulary} tokens, got {token}"
                )
    check_positions(model, max(lengths) + max_new_tokens - 1)  # the last token is never fed
    candidates = steering.candidates if steering else DEFAULT_CANDIDATES
    if candidates > vocabulary:
        raise ValueError(
            f"candidates must be at most the vocabulary of {vocabulary} tokens, got {candidates}"
        )
    if steering and steering.scorer is not None:
        check_vocabulary(model, steering.scorer, "scorer")


def check_vocabulary(model: PreTrainedModel, scorer: Scorer, name: str) -> None:
    if not isinstance(scorer, Scorer):
        raise TypeError(
            f"{name} must be a RewardScorer, a ValueModel or the like, got {type(scorer).__name__}"
        )
    vocabulary = model.config.get_text_config().vocab_size
    if scorer.vocabulary_size != vocabulary:
        raise ValueError(
            f"model and {name} must share a vocabulary: the model has {vocabulary} tokens, the {name} {scorer.vocabulary_size}"
        )


def check_values(
    values: Tensor, rows: Tensor, numbers: Sequence[int], samples: int, step: int
) -> None:
    """NaN or infinite values would silently decide the token."""
    if not bool(values.isfinite().all()):
        wrong = int((~values.isfinite()).any(1).nonzero()[0, 0])
        raise FloatingPointError(
            f"values must be finite, got NaN or infinity at step {step} of prompt {numbers[int(rows[wrong]) // samples]}"
        )
