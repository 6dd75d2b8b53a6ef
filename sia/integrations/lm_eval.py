r"""lm-eval's model `sia`: a language model that responds under steering, evaluated like any other.

    sia-eval run --model sia --tasks TASK \
        --model_args pretrained=MODEL,value_model=VALUES,gate=entropy,threshold=1.0,beta=1.0

Generation is steered. Log-likelihoods are refused or, with `loglikelihood=steered`, those of the
steered policy, under which a token that is not among the K candidates is impossible; those of the
base model are never passed off as "sia". The results' config holds the settings, and lm-eval's
response cache keeps a table for each of them.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils.memory import clear_device_cache
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

import sia
from sia._checkpoints import expand_home, local_folder, reading
from sia._memory import ran_out_of_memory
from sia._numbers import python_value, whole_number
from sia._offloading import with_weights
from sia.batch import generate
from sia.gates import GATES, EveryToken, Gate, JunctionGate, Never
from sia.integrations.transformers import SteeredGenerate, count_before, taken_stop_strings
from sia.likelihood import Likelihood, log_likelihoods
from sia.scorers import QHead, Scorer, ValueModel, VocabularyValueModel
from sia.scorers.loading import unwrap
from sia.scorers.q_head import Q_HEAD_FILE
from sia.scorers.vocabulary_value_model import HEAD_FILE as VOCABULARY_HEAD_FILE
from sia.steering import Steering

Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation
DEFAULTS = {"threshold": 1.0, "ratio": 0.2, "tokens": 20}  # settings of gates
# arguments of lm-eval's `hf` that change no response
HARDWARE = {"device", "batch_size", "max_batch_size", "parallelize", "offload_folder"}


def make_gate(name: str, **settings: float | None) -> Gate:
    """Build the gate of this name from the setting that it has, by default the one of DEFAULTS.

    Args:
        name: Key of `sia.gates.GATES`.
        **settings: "threshold", "ratio" and "tokens"; None for what is not given.
    """
    if name not in GATES:
        raise ValueError(f"unknown gate {name!r}, expected one of: {', '.join(GATES)}")
    setting = GATES[name].setting
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given.keys() - {setting}:
        raise ValueError(f"the gate {name} has no {key}, got {key}={given[key]!r}")
    return GATES[name].from_setting((DEFAULTS | given).get(setting, math.nan))


@register_model("sia")
class SIA(HFLM):
    """lm-eval's `hf` model under steering.

    Args:
        pretrained: The language model, as of lm-eval's `hf`.
        value_model: Local path or Hub id of a `ValueModel`, `VocabularyValueModel` or `QHead`, or a
            scorer in memory.
        backbone: Backbone of a value model in the published layout that does not name its own.
        value_subfolder: Folder of the value model within its repository.
        value_revision: Its revision on the Hub.
        gate: Name of a gate in `sia.gates.GATES`, by default "entropy".
        junction_gate: Local path or Hub id of a `JunctionGate`, in place of `gate`.
        threshold: Setting of the entropy and attention gates, 1.0 by default.
        ratio: Setting of the random gate, 0.2 by default.
        tokens: Setting of the position gate, 20 by default.
        beta: Same as in `Steering`; "inf" for the values alone.
        candidates: K, steered or not.
        min_probability: Same as in `Steering`.
        seed: Seed of the sampling noise (greedy decoding has none).
        loglikelihood: "refuse" or "steered".
        **options: All other arguments of lm-eval's `hf`.
    """

    def __init__(
        self,
        pretrained: str,
        value_model: str | Path | Scorer | None = None,
        *,
        backbone: str | None = None,
        value_subfolder: str = "",
        value_revision: str | None = None,
        gate: str | None = None,
        junction_gate: str | Path | None = None,
        threshold: float | None = None,
        ratio: float | None = None,
        tokens: int | None = None,
        beta: float | str = 1.0,
        candidates: int = 10,
        min_probability: float = 0.0,
        seed: int = 0,
        loglikelihood: str = "refuse",
        **options: Any,
    ) -> None:
        settings = {"threshold": threshold, "ratio": ratio, "tokens": tokens}
        if junction_gate is None:
            opener = make_gate("entropy" if gate is None else gate, **settings)
        else:
            for name, value in {"gate": gate, **settings}.items():
                if value is not None:
                    raise ValueError(f"junction_gate stands in place of {name}, got both")
            opener = JunctionGate.from_pretrained(junction_gate)
        if loglikelihood not in ("refuse", "steered"):
            raise ValueError(f'loglikelihood must be "refuse" or "steered", got {loglikelihood!r}')
        if value_model is None and opener != Never():
            raise ValueError(
                "model sia needs value_model, the path or Hub id of a value model (or gate=never)"
            )
        beta = strength(beta)
        check_softmax_dtype(options)
        check_dtype(options.get("dtype", "auto"))
        if isinstance(pretrained, str):
            pretrained = expand_home(pretrained)
            check_device(options.get("device", "cuda"))
        with reading(f"the language model {pretrained}"):
            super().__init__(pretrained=pretrained, **options)
        if self.backend != "causal":
            raise ValueError(
                "model sia steers decoder-only language models, got an encoder-decoder"
            )
        if options.get("peft"):
            unwrap(self.model)  # refuses adapters that lie outside the model
        self.noise_seed = whole_number("seed", seed)
        self.loglikelihood_mode = loglikelihood
        self.settings = {
            "pretrained": (
                self.pretrained if isinstance(pretrained, str) else type(pretrained).__name__
            ),
            "options": {name: str(options[name]) for name in sorted(options.keys() - HARDWARE)},
            "generation_config": str(self.model.generation_config.to_diff_dict()),
            "version": sia.__version__,
            "value_model": describe(value_model),
            "backbone": None if backbone is None else str(backbone),
            "value_subfolder": value_subfolder,
            "value_revision": value_revision,
            "gate": repr(opener),
            "beta": str(beta),
            "candidates": python_value(candidates),
            "min_probability": python_value(min_probability),
            "seed": self.noise_seed,
            "loglikelihood": loglikelihood,
        }
        self.steering: Steering | None = None
        self.candidates: int | None = candidates
        if isinstance(value_model, str | Path):
            value_model = load_scorer(
                value_model,
                backbone,
                value_subfolder,
                value_revision,
                dtype=self.model.dtype,
                device_map="auto" if options.get("parallelize") else str(self.device),
            )
        if value_model is not None:
            self.candidates = None  # a steering has its own
            self.steering = Steering(
                value_model,
                opener,
                beta,
                candidates=candidates,
                min_probability=min_probability,
            )

    @cached_property
    def digest(self) -> str:
        """Digest of the settings and of all weights, whatever the paths hold today."""
        content = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        modules: list[nn.Module] = [self.model]
        scorer = None if self.steering is None else self.steering.scorer
        if isinstance(scorer, ValueModel):
            modules.append(scorer)
        elif isinstance(scorer, QHead):
            modules.append(scorer.values)
        elif isinstance(scorer, VocabularyValueModel):
            modules += [scorer.backbone, scorer.values]
        for model in modules:
            for part in model.modules():
                if isinstance(part, PreTrainedModel):
                    content.update(part.config.to_json_string().encode())
            for name, value in model.state_dict().items():
                content.update(name.encode())
                owner, _, own_name = name.rpartition(".")
                module = model.get_submodule(owner)
                with with_weights(module):  # that are offloaded
                    offloaded = isinstance(value, Tensor) and value.is_meta
                    _hash(content, getattr(module, own_name).detach() if offloaded else value)
        return content.hexdigest()[:16]

    def get_model_info(self) -> dict[str, Any]:
        """Return the part of the results' config that describes the model."""
        return super().get_model_info() | {"sia": self.settings | {"digest": self.digest}}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Give the responses of these settings a table of their own in lm-eval's cache.

        The cache knows requests by their text alone.
        """
        super().set_cache_hook(cache_hook)
        if (store := cache_hook.dbdict) is not None:
            store.tablename = f"sia_{self.digest}"
            store.conn.execute(
                f'CREATE TABLE IF NOT EXISTS "{store.tablename}" (key TEXT PRIMARY KEY, value BLOB)'
            )
            store.conn.commit()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Respond to requests; a prompt that is repeated gets further samples."""
        for request in requests:
            tokens = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if tokens >= self.max_length:
                raise ValueError(
                    "max_length must be above the max_gen_toks of the task, "
                    f"{tokens}, got {self.max_length}"
                )
        self.repeats: Counter[tuple[int, ...]] = Counter()
        usual: Any = self.batch_size
        if usual == "auto":
            prompts = self._longest_first(requests)
            trial = partial(self._try_generation, prompts)
            self.batch_size_per_gpu = self._fitting_batch_size(len(prompts), trial)
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = usual

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        seeds = [
            self.noise_seed + count_before(self.repeats, row[mask.bool()].tolist())
            for row, mask in zip(context, options["attention_mask"], strict=True)
        ]
        config: Any = self.model.generation_config
        of_checkpoint, config.max_new_tokens = config.max_new_tokens, None
        try:  # the task's number counts, as max_length
            with taken_stop_strings(config) as texts:
                decode = SteeredGenerate(
                    self.steering,
                    candidates=self.candidates,
                    seed=seeds,
                    tokenizer=self.tokenizer,
                    stop_strings=texts,
                )
                return super()._model_generate(
                    context, max_length, stop, custom_generate=decode, **options
                )
        finally:
            config.max_new_tokens = of_checkpoint

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        if self.loglikelihood_mode == "refuse":
            raise NotImplementedError(
                "model sia refuses log-likelihoods: under steering, tokens that are not among the "
                "K candidates are impossible. Ask for loglikelihood=steered to get those of the "
                "steered policy, or evaluate the base model as lm-eval's hf"
            )
        pairs = self._fit(requests)

        def score(pairs: Sequence[Pair], batch_size: int) -> list[Likelihood]:
            contexts, continuations = zip(*pairs, strict=True)
            with self._precision():
                return log_likelihoods(
                    self.model,
                    self.steering,
                    contexts,
                    continuations,
                    candidates=self.candidates,
                    seed=self.noise_seed,
                    batch_size=batch_size,
                    tokenizer=self.tokenizer,
                )

        batch_size: Any = self.batch_size
        if batch_size == "auto":
            longest = sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1]))
            batch_size = self._fitting_batch_size(
                len(pairs), lambda rows: score(longest[:rows], rows)
            )
        likelihoods = score(pairs, int(batch_size))
        if impossible := sum(math.isinf(likelihood.total) for likelihood in likelihoods):
            raise ValueError(
                f"{impossible} of {len(likelihoods)} continuations have tokens that are not among "
                f"the {self.settings['candidates']} candidates: under steering they are "
                "impossible, and answers that are would tie. Ask for more candidates (at most "
                f"{self.model.config.get_text_config().vocab_size}), or evaluate the base model "
                "as lm-eval's hf"
            )
        answers = [(likelihood.total, bool(likelihood.greedy.all())) for likelihood in likelihoods]
        for (request, *_), answer in zip(requests, answers, strict=True):
            if request is not None:  # of parts of a rolling likelihood
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def _fit(self, requests: list[tuple[Any, list[int], list[int]]]) -> list[Pair]:
        """Return contexts, cut on the left as those of lm-eval's `hf`, with continuations."""
        pairs = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation must fit into max_length={self.max_length} tokens, "
                    f"got one of {len(continuation)}"
                )
            room = self.max_length + 1 - len(continuation)  # the last token is never read
            pairs.append(((context or [self.prefix_token_id])[-room:], continuation))
        return pairs

    def _precision(self) -> AbstractContextManager[Any]:
        mixed = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None)

    def _longest_first(self, requests: list[Instance]) -> list[list[int]]:
        """Return prompts as long as they are with the longest response, the longest first."""
        prompts = []
        for text, options in (request.args for request in requests):
            tokens = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            ids = self.tok_encode(text)[-max(1, self.max_length - tokens) :]
            ids = ids or [self.prefix_token_id]
            length = min(len(ids) + tokens, self.max_length) - 1
            prompts.append((ids * (length // len(ids) + 1))[:length])
        return sorted(prompts, key=len, reverse=True)

    def _try_generation(self, prompts: list[list[int]], batch_size: int) -> None:
        """Take the last step of the longest responses, steered, with the memory that it needs."""
        steering = self.steering
        if steering is not None:
            steering = replace(steering, gate=steering.gate | EveryToken())
        with self._precision():
            generate(
                self.model,
                self.tokenizer,
                prompts[:batch_size],
                steering,
                candidates=self.candidates,
                max_new_tokens=1,
                temperature=0.0,
                batch_size=batch_size,
                progress=False,
            )

    def _fitting_batch_size(self, requests: int, trial: Callable[[int], object]) -> int:
        """Return the largest halving of max_batch_size whose trial does not run out of memory."""
        batch_size = max(1, min(self.max_batch_size, requests))
        while not fits_into_memory(trial, batch_size):
            clear_device_cache(garbage_collection=True)
            if batch_size == 1:
                raise ValueError(
                    "out of memory with a single response: batch_size=auto finds none that fits. "
                    "Lower max_length, or load the models in another dtype (dtype=bfloat16)"
                )
            batch_size //= 2
        print(f"batch_size=auto: {batch_size} rows fit", file=sys.stderr)
        return batch_size

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Leave the choice to `_fitting_batch_size`, which knows value model and requests.

        lm-eval's own tries batches of the language model's whole context, 40,960 tokens of Qwen3.
        """
        return int(self.max_batch_size)


def fits_into_memory(trial: Callable[[int], object], batch_size: int) -> bool:
    """Return whether the trial of a batch size ends without running out of memory."""
    try:
        trial(batch_size)
    except (RuntimeError, MemoryError) as error:
        if ran_out_of_memory(error):
            return False
        raise
    return True


def check_device(device: str | None) -> None:
    """Raise ValueError for lm-eval's device "cuda" where torch finds none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA here: expected another device, such as cpu, got cuda")


def check_softmax_dtype(options: dict[str, Any]) -> None:
    """Raise ValueError for an lm-eval `softmax_dtype` other than float32, the only one here."""
    softmax = options.get("softmax_dtype")
    if softmax not in (None, "float32", torch.float32):
        raise ValueError(f"model sia computes its softmax in float32, got softmax_dtype={softmax}")


def check_dtype(dtype: str | torch.dtype) -> None:
    """Raise ValueError for a name of a dtype that torch does not have; "auto" is the model's."""
    known = dtype == "auto" or isinstance(vars(torch).get(str(dtype)), torch.dtype)
    if not (known or isinstance(dtype, torch.dtype)):
        raise ValueError(f"dtype must be auto or one of torch (float32, bfloat16, …), got {dtype}")


def load_scorer(
    path: str | Path,
    backbone: str | None,
    subfolder: str,
    revision: str | None,
    **options: Any,
) -> Scorer:
    """Load a value model, a vocabulary head or a Q-head, whichever the folder holds.

    Args:
        path: Local folder or Hub id.
        backbone: Backbone of a value model that does not name its own.
        subfolder: Folder within `path`.
        revision: Revision of the Hub repository.
        **options: For transformers' from_pretrained; must have `device_map`.
    """
    folder = local_folder(path, "value model", subfolder, revision, options)
    if (folder / f"{Q_HEAD_FILE}.json").is_file():
        device = options["device_map"]
        return QHead.from_pretrained(folder, device="cuda" if device == "auto" else device)
    if (folder / f"{VOCABULARY_HEAD_FILE}.json").is_file():
        return VocabularyValueModel.from_pretrained(folder, **options)
    return ValueModel.from_pretrained(
        path, backbone, subfolder=subfolder, revision=revision, **options
    )


def _hash(content: Any, value: Any) -> None:
    """Add a value of a state dict to a hash: tensors, and packed weights, which are tuples."""
    content.update(type(value).__name__.encode())
    if isinstance(value, tuple | list):
        for each in value:
            _hash(content, each)
    elif isinstance(value, Tensor):
        content.update(f"{value.dtype} {tuple(value.shape)}".encode())
        exact = value.dequantize() if value.is_quantized else value
        data = exact.detach().cpu().contiguous().reshape(-1)
        content.update(data.view(torch.uint8).numpy().tobytes())
    else:
        content.update(repr(value).encode())


def strength(beta: float | str) -> float:
    """Return β as a number, also from the text that a command line gives."""
    try:
        return float(beta)
    except (TypeError, ValueError):
        raise ValueError(f'beta must be a number or "inf", got {beta!r}') from None


def describe(value_model: str | Path | Scorer | None) -> str:
    """Return a name for the settings; a scorer in memory has none that another run would know."""
    if value_model is None:
        return ""
    if isinstance(value_model, str | Path):
        return str(value_model)
    return f"{type(value_model).__name__} in memory, {uuid4()}"


def main() -> None:
    """Run lm-eval's own command line, with the model `sia`.

    Exit code 2 for bad input, 130 when interrupted.
    """
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (
        ValueError, TypeError, NotImplementedError, ArithmeticError, OSError, TemplateError
    ) as error:  # fmt: skip
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        print("error: out of memory, use a smaller --batch_size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\ninterrupted: with --use_cache the same command goes on from there", file=sys.stderr
        )
        sys.exit(130)


if __name__ == "__main__":
    main()
