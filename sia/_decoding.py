"""The decoding loop, driven by `generate`, by `SteeredGenerate` and by the searches.

One step: forward pass of the language model (cached) → logits processors → K candidates and their
entropy → gate → values of the candidates where it opens → tilt → warpers → one token per row by
Gumbel-max with keyed noise → finished rows leave the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sia import _sampling
from sia._attention import Observer, observe_attention
from sia._checks import (
    check_inputs,
    check_readers,
    check_steering,
    check_values,
    vocabulary_size,
)
from sia._hidden_states import HiddenStates, observe_hidden_states
from sia._hooks import Hooks
from sia._kv_cache import (
    backbone_of,
    check_extended,
    narrows_logits,
    preallocated_cache,
    rotary_switch,
)
from sia._modes import evaluation_mode
from sia._padding import follows_padding
from sia._responses import Responses
from sia.cost import Architecture, Cost, Meter, costs
from sia.gates import Step
from sia.generation import Generation
from sia.scorers.base import HiddenStateSession, Session, close
from sia.signals import Attention, Divergence, Entropy, Signal
from sia.steering import (
    Steering,
    candidate_count,
    divergence,
    entropy,
    kl_divergence,
    steer,
    step_signals,
)

# Finished rows leave the batch once at most this share of it is active: leaving copies the cache.
COMPACT_BELOW = 7 / 8


@dataclass(frozen=True)
class Prediction:
    """The language model's prediction of the next token, after logits processors, unsteered.

    Attributes:
        logits: Logits of the whole vocabulary, float32 `(rows, vocabulary)`.
        base_logits: Logits of the K candidates in descending order, `(rows, K)`; −∞ where
            processors left fewer than K.
        candidates: Their token ids, `(rows, K)`.
        entropy: Over the candidates in nats, `(rows,)`.
        signals: Signals that are observed, `(rows,)` each.
        hidden: Last hidden states `(rows, hidden)`, None where nothing reads them.
    """

    logits: Tensor
    base_logits: Tensor
    candidates: Tensor
    entropy: Tensor
    signals: dict[Signal, Tensor]
    hidden: Tensor | None


class Decoding:
    """A batch of responses on their way: `run` extends them, `reorder` continues some from others.

    Args:
        model: The language model.
        input_ids: Prompts padded on the left, `(prompts, length)`. Each has `samples` rows in
            succession, which share its prefill.
        attention_mask: 1 for the tokens of the prompts, `(prompts, length)`.
        prompt_keys: Keys of the noise, `(prompts,)`.
        value_prompts: The prompts as the scorer reads them, token ids without padding.
        max_new_tokens: Longest response.
        stop_tokens: Tokens that end a response.
        steering: None to sample from the K candidates of the model alone.
        candidates: K without a steering, 10 by default.
        samples: Number of responses to each prompt.
        prompt_indices: Numbers of the prompts in the caller's list, for messages.
        observe: Signals to record besides those of the gate.
        hooks: Functions of the caller, and the temperature.
        tokenizer: Tokenizer of the model, if there is one.
        vocabulary: Number of tokens that responses may have; None for all that model and scorer
            share.
        record_states: Called at every step with row numbers, responses so far, hidden states, base
            logits of the candidates, candidates and their values, `(n, …)` each, of the rows that
            go on; needs the signal `Divergence`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        prompt_keys: Tensor,
        value_prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_tokens: Sequence[int],
        steering: Steering | None = None,
        candidates: int | None = None,
        samples: int = 1,
        prompt_indices: Sequence[int] | None = None,
        observe: Sequence[Signal] = (),
        hooks: Hooks | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vocabulary: int | None = None,
        record_states: Callable[..., None] | None = None,
    ) -> None:
        count, prompt_length = input_ids.shape
        device, rows = input_ids.device, count * samples
        self.candidates = candidate_count(steering, candidates)
        self.prompt_indices = range(count) if prompt_indices is None else prompt_indices
        shared = check_steering(model, steering, self.candidates, tokenizer)
        value_vocabulary = steering.scorer.vocabulary_size if steering else vocabulary_size(model)
        check_inputs(
            model,
            input_ids,
            attention_mask,
            value_prompts,
            value_vocabulary,
            self.prompt_indices,
            max_new_tokens,
        )
        self.vocabulary = shared if vocabulary is None else min(shared, vocabulary)
        self.hooks, self.record_states = hooks or Hooks(), record_states
        own = vocabulary_size(model)
        if beyond := [token for token in stop_tokens if self.vocabulary <= token < own]:
            raise ValueError(
                f"tokens that end a response must be below the {self.vocabulary} tokens that model "
                f"and scorer share, got {beyond}"
            )
        # some checkpoints have -1, or a token without an embedding
        self.pad_token = self.hooks.pad_token if self.hooks.pad_token in range(own) else 0
        # whether fewer than K candidates may be possible
        self.restricted = bool(self.hooks.process) or self.vocabulary < own
        self.model, self.steering, self.samples = model, steering, samples
        self.max_new_tokens = max_new_tokens
        self.session: Session | None = None
        if steering is not None:
            scorer = close(steering.scorer, tokenizer, stop_tokens)
            self.session = scorer.start_session(value_prompts, max_new_tokens, samples)
        self.signals = observed_signals(observe, steering)
        reads_hidden = check_readers(model, self.signals, self.session)
        self.reads_hidden = reads_hidden or record_states is not None
        recorded = [signal for signal in self.signals if signal != Entropy()]
        self.responses = Responses.empty(rows, max_new_tokens, recorded, device)
        self.stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
        self.prompt_lengths = attention_mask.sum(1).repeat_interleave(samples)
        self.narrowed = {"logits_to_keep": 1} if narrows_logits(model) else {}
        self.padded = not bool(attention_mask.all())
        if self.padded and not follows_padding(model):
            raise ValueError(
                f"{type(model).__name__} counts padding as positions: give it prompts of one length"
            )
        head = model.get_output_embeddings()
        self.meter = Meter(Architecture.of(backbone_of(model), head), rows, device)
        self.junctions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cache = preallocated_cache(model.config, prompt_length + max_new_tokens)
        lengths = self.prompt_lengths
        self.switch = rotary_switch(model, int(lengths.min()), int(lengths.max()) + max_new_tokens)
        if self.switch is not None and self.padded:
            raise ValueError(
                f"{type(model).__name__} uses other rotary frequencies beyond {self.switch} "
                "tokens: where responses may come to that, the prompts of a batch must be of one "
                f"length, got {int(lengths.min())} to {int(lengths.max())} tokens"
            )
        self.step = 0  # number of tokens that every row has, or had when it ended
        # keys of every step, by row
        self.keys = _sampling.step_keys(_sampling.sample_keys(prompt_keys, samples), max_new_tokens)
        self.gate_keys = _sampling.gate_keys(self.keys)
        # by prompt until the first step has computed the prompts, from then on by row of the batch:
        self.prompts = self.current = self.processed_prompts = self.stopping_prompts = input_ids
        if self.hooks.padding is not None:
            real = attention_mask == 1
            self.processed_prompts = input_ids.where(real, self.hooks.padding)
            if stop_tokens:  # stopping criteria read texts: no stop string begins with an end
                self.stopping_prompts = input_ids.where(real, self.stops[0])
        self.mask = pad(attention_mask, (0, max_new_tokens), value=1)
        self.positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        # by row of the batch: which response, whether it goes on, and its signals one step before
        self.rows = torch.arange(rows, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        unknown = torch.full((rows,), torch.nan, dtype=torch.float32, device=device)
        self.previous = dict.fromkeys(self.signals, unknown)

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
        mode = torch.no_grad() if self.hooks.see_rows else torch.inference_mode()
        with (
            mode,
            evaluation_mode(self.model.modules()),
            observe_attention(self.model, attentions) as observer,
            observe_hidden_states(self.model, self.reads_hidden) as hidden,
        ):
            while self.step < end and len(self.rows):
                self._extend(observer, hidden)
            self.responses.lengths[self.rows[self.alive]] = self.step
            steps = torch.arange(start, self.step, device=rows.device)
            generated = steps < self.responses.lengths[rows, None]
            self._check_logits(rows, start, generated)
            self._count(rows, start, generated)

    def reorder(self, sources: Tensor, active: Tensor) -> None:
        """Continue row i from row `sources[i]` where `active[i]`; noise stays with the row.

        Args:
            sources: Row numbers, `(rows,)`.
            active: bool, `(rows,)`.
        """
        place = torch.zeros_like(sources)
        place[self.rows] = torch.arange(len(self.rows), device=sources.device)
        # hooks see ended rows too
        targets = self.rows if self.hooks.see_rows else active.nonzero().squeeze(1)
        self._select_rows(place[sources[targets]])
        self.rows, self.alive = targets, active[targets]
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

    def _extend(self, observer: Observer | None, hidden: HiddenStates | None) -> None:
        """Make one step: the next token of every row of the batch."""
        prediction = self._forward(observer, hidden)
        everywhere = self._steer_everywhere(prediction)
        opened = self._gate(prediction)
        steered, kl = self._steer(prediction, opened, everywhere)
        noise = _sampling.step_gumbel(self.keys[self.rows, self.step], prediction.candidates)
        base_token = token = self._pick(prediction, prediction.base_logits, noise)
        if steered is not prediction.base_logits:
            token = self._pick(prediction, steered, noise)
        if self.hooks.see_rows:
            token = token.where(self.alive, self.pad_token)
        self._record(prediction, token, base_token, opened, kl)
        if self.hooks.stream:
            self.hooks.stream(token)
        self.previous = prediction.signals
        self.step += 1
        self.current, self.positions = token[:, None], self.positions[:, -1:] + 1
        self._finish_rows(token)

    def _forward(self, observer: Observer | None, observed: HiddenStates | None) -> Prediction:
        """Run the language model on the newest tokens: at first of prompts, then of rows."""
        length = self.prompts.shape[1] + self.step
        if self.switch is not None and self.step > 0 and length == self.switch + 1:
            self._start_over()
        outputs = self.model(
            input_ids=self.current,
            attention_mask=self.mask[:, :length] if self.padded else None,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **self.narrowed,
        )
        if self.step == 0:
            check_extended(self.cache, self.model, length)
        logits = outputs.logits[:, -1].float()
        signals = {} if observer is None else observer.signals(self.positions[:, -1])
        # output embeddings may lie on another device
        hidden = None if observed is None else observed.newest.to(logits.device)
        if self.step == 0 and self.samples > 1:  # the samples of a prompt share its first pass
            self.cache.batch_repeat_interleave(self.samples)
            self.mask = self.mask.repeat_interleave(self.samples, 0)
            self.positions = self.positions.repeat_interleave(self.samples, 0)
            logits = logits.repeat_interleave(self.samples, 0)
            signals = {name: x.repeat_interleave(self.samples) for name, x in signals.items()}
            hidden = None if hidden is None else hidden.repeat_interleave(self.samples, 0)
        if self.hooks.process:
            logits = self.hooks.process(self._ids(self.processed_prompts), logits)
        if self.restricted:
            logits = self._possible(logits)
        base_logits, candidates = _sampling.top_candidates(logits, self.candidates)
        uncertainty = entropy(base_logits)
        signals |= step_signals(self.signals, logits, uncertainty, hidden)
        return Prediction(logits, base_logits, candidates, uncertainty, signals, hidden)

    def _start_over(self) -> None:
        """Let the next forward pass compute all tokens so far anew."""
        self.current = self._ids(self.prompts)
        length = self.current.shape[1]
        self.cache = preallocated_cache(self.model.config, length + self.max_new_tokens - self.step)
        positions = torch.arange(length, device=self.current.device)
        self.positions = positions.expand(len(self.rows), -1)
        rows = self.rows[self.alive]
        zeros = torch.zeros_like(rows)
        self.meter.count(rows, zeros, zeros, zeros + length - 1, zeros)

    def _gate(self, prediction: Prediction) -> Tensor | None:
        """Return where the gate opens, bool `(rows,)`; None without steering."""
        if self.steering is None:
            return None
        step = Step(
            self.step,
            prediction.entropy,
            prediction.logits,
            self.gate_keys[self.rows, self.step],
            prediction.signals,
            self.previous,
        )
        return self.steering.gate.opens(step) & self.alive

    def _steer_everywhere(self, prediction: Prediction) -> Tensor | None:
        """Steer every active row ahead of the gate, if a signal or recorder needs the divergence.

        Returns:
            The steered logits `(rows, K)`, for use where the gate opens. The divergence is added to
            the signals of the prediction.
        """
        if Divergence() not in self.signals or self.steering is None:
            return None
        places = self.alive.nonzero().squeeze(1)
        base, values = prediction.base_logits, self._values(prediction, places)
        steered = base.index_copy(0, places, steer(base[places], values, self.steering))
        prediction.signals[Divergence()] = divergence(base, steered)
        if self.record_states and prediction.hidden is not None:
            rows, columns = self.rows[places], (prediction.hidden, base, prediction.candidates)
            prefixes = self.responses.tokens[rows, : self.step]
            self.record_states(rows, prefixes, *(column[places] for column in columns), values)
        return steered

    def _steer(
        self, prediction: Prediction, opened: Tensor | None, everywhere: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits to sample from `(rows, K)` and their KL from the base `(rows,)`.

        The logits are the very tensor `base_logits`, and the KL is None, if no row is steered.

        Args:
            prediction: Prediction of the language model.
            opened: Where the gate opens, `(rows,)`.
            everywhere: The tilt of every row `(rows, K)`, if it is known already.
        """
        if self.steering is None or opened is None:
            return prediction.base_logits, None
        places = opened.nonzero().squeeze(1)
        if len(places) == 0:
            return prediction.base_logits, None
        base = prediction.base_logits[places]
        if everywhere is None:
            tilted = steer(base, self._values(prediction, places), self.steering)
        else:
            tilted = everywhere[places]
        steered = prediction.base_logits.index_copy(0, places, tilted)
        kl = torch.zeros_like(prediction.entropy)
        return steered, kl.index_copy_(0, places, kl_divergence(tilted, base))

    def _values(self, prediction: Prediction, places: Tensor) -> Tensor:
        """Return the values of the candidates of the rows at `places`, `(n, K)`."""
        assert self.session is not None
        rows, candidates = self.rows[places], prediction.candidates[places]
        if isinstance(self.session, HiddenStateSession) and prediction.hidden is not None:
            self.session.observe(prediction.hidden[places])
        if self.restricted:  # the scorer may not know impossible candidates: ask about the first
            possible = prediction.base_logits[places] > -torch.inf
            candidates = candidates.where(possible, candidates[:, :1])
        prefixes = self.responses.tokens[rows, : self.step]
        values = self.session.score(rows, prefixes, candidates).to(prediction.base_logits)
        check_values(values, candidates, rows, self.prompt_indices, self.samples, self.step)
        return values

    def _pick(self, prediction: Prediction, scores: Tensor, noise: Tensor) -> Tensor:
        """Sample a token of each row `(rows,)` from the logits of the candidates `(rows, K)`."""
        if self.hooks.warp:
            scores = self.hooks.warp(None, scores)
        candidates = prediction.candidates
        if self.hooks.temperature == 0:
            return _sampling.greedy_token(scores, candidates)
        chosen = _sampling.choose(scores, noise, self.hooks.temperature)
        return candidates.gather(1, chosen[:, None]).squeeze(1)

    def _possible(self, logits: Tensor) -> Tensor:
        """Return the logits, −∞ for tokens beyond the shared vocabulary.

        Raises:
            ValueError: If no token is left to a row.
        """
        logits = _sampling.without_tokens_from(logits, self.vocabulary)
        stuck = (logits == -torch.inf).all(1) & self.alive
        if bool(stuck.any()):
            prompt = self.prompt_indices[int(self.rows[stuck][0]) // self.samples]
            raise ValueError(
                f"logits processors must leave a token, they ruled out all {self.vocabulary} "
                f"at step {self.step} of prompt {prompt}"
            )
        return logits

    def _ids(self, prompts: Tensor) -> Tensor:
        """Return prompts and responses so far of the rows of the batch; prompts: by prompt."""
        prompts = prompts[self.rows // self.samples]
        return torch.cat([prompts, self.responses.tokens[self.rows, : self.step]], dim=1)

    def _record(
        self,
        prediction: Prediction,
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
        responses.entropy[rows, step] = prediction.entropy
        responses.base_token[rows, step] = base_token
        if opened is not None:
            responses.steered[rows, step] = opened
        if kl is not None:
            responses.kl[rows, step] = kl
        for signal, column in responses.signals.items():
            column[rows, step] = prediction.signals[signal]

    def _finish_rows(self, token: Tensor) -> None:
        """Note which responses end with this token, and drop ended ones once they are many."""
        ended = (token[:, None] == self.stops).any(1) & self.alive
        stopped = (
            self.hooks.stop(self._ids(self.stopping_prompts)) & self.alive
            if self.hooks.stop
            else ended
        )
        done = ended | stopped
        if not bool(done.any()):
            return
        self.responses.finished[self.rows[ended]] = True
        self.responses.lengths[self.rows[done]] = self.step
        self.alive = self.alive & ~done
        keep = self.alive.nonzero().squeeze(1)
        most = 0 if self.hooks.see_rows else COMPACT_BELOW * len(self.alive)  # hooks see ended rows
        if len(keep) <= most:
            self._select_rows(keep)

    def _select_rows(self, places: Tensor) -> None:
        """Continue with the rows at these places of the batch."""
        if len(places):
            self.cache.batch_select_indices(places)
        self.rows, self.alive = self.rows[places], self.alive[places]
        self.current, self.positions = self.current[places], self.positions[places]
        self.mask = self.mask[places]
        self.previous = {signal: values[places] for signal, values in self.previous.items()}

    def _check_logits(self, rows: Tensor, start: int, generated: Tensor) -> None:
        """Raise FloatingPointError if logits became NaN or infinite in the steps since `start`.

        Args:
            rows: Row numbers `(n,)`.
            start: First step to check.
            generated: True where a row generated a token, bool `(n, steps)`.
        """
        wrong = self.responses.entropy[rows, start : self.step].isnan() & generated
        if bool(wrong.any()):
            place, step = wrong.nonzero()[0].tolist()
            prompt = self.prompt_indices[int(rows[place]) // self.samples]
            source = "model or a logits processor" if self.hooks.process else "model"
            raise FloatingPointError(
                f"logits must be numbers, the language {source} gave NaN or infinity "
                f"at step {start + step} of prompt {prompt}"
            )

    def _count(self, rows: Tensor, start: int, generated: Tensor) -> None:
        """Count the cost of these rows since step `start`; a shared prompt is its first row's."""
        lengths, prompts = self.responses.lengths[rows], self.prompt_lengths[rows]
        steered = self.responses.steered[rows, start : self.step] & generated
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
    if steering is None and Divergence() in observe:
        raise ValueError("the signal Divergence() measures a steering, so it needs one, got none")
    return sorted({*observe, *(steering.gate.signals if steering else ())}, key=repr)
