"""lm-eval's model `sia`: a language model that responds under steering, evaluated like any other.

sia-eval run --model sia --model_args pretrained=MODEL,value_model=VALUES,gate=entropy,threshold=1.0,beta=1.0 --tasks TASK

Generation is steered. Log-likelihoods are refused, or (`loglikelihood=steered`) those of the steered policy, under which a token that is
not among the K candidates is impossible; those of the base model are never passed off as "sia". The settings stand in the results'
config, and lm-eval's response cache keeps a table for each of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter
from pathlib import Path
from uuid import uuid4

from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sia import Gate, Steering, ValueModel, steered_generate
from sia.gates import GATES
from sia.likelihood import log_likelihoods
from sia.scorers.base import Scorer


def make_gate(name: str, threshold: float, ratio: float, tokens: int) -> Gate:
    """threshold: of the entropy and attention gates. ratio: of the random gate. tokens: of the position gate."""
    if name not in GATES:
        raise ValueError(f"unknown gate {name!r}, expected one of: {', '.join(GATES)}")
    settings = {"threshold": threshold, "ratio": ratio, "tokens": tokens}
    gate_class = GATES[name]
    return gate_class.from_setting(settings.get(gate_class.setting, 0.0))


@register_model("sia")
class SIA(HFLM):
    """pretrained and all other arguments: as of lm-eval's `hf`.

    value_model: local path or Hub id of a `ValueModel` (at value_revision, in value_subfolder), or a scorer; backbone: of one in the
    published layout that does not name it.
    gate: one of GATES; threshold, ratio, tokens: of the gates that have them. beta, candidates, min_probability: as of `Steering`.
    seed: of the sampling noise (greedy decoding has none). loglikelihood: "refuse" or "steered".
    """

    def __init__(
        self,
        pretrained: str,
        value_model: str | Path | Scorer | None = None,
        backbone: str | None = None,
        value_subfolder: str = "",
        value_revision: str | None = None,
        gate: str = "entropy",
        threshold: float = 1.0,
        ratio: float = 0.2,
        tokens: int = 20,
        beta: float = 1.0,
        candidates: int = 10,
        min_probability: float = 0.0,
        seed: int = 0,
        loglikelihood: str = "refuse",
        **options,
    ) -> None:
        made = make_gate(gate, threshold, ratio, tokens)
        if loglikelihood not in ("refuse", "steered"):
            raise ValueError(f'loglikelihood must be "refuse" or "steered", got {loglikelihood!r}')
        if value_model is None and gate != "never":
            raise ValueError(
                "model sia needs value_model, the path or Hub id of a value model (or gate=never)"
            )
        super().__init__(pretrained=pretrained, **options)
        # a model in memory has no name that another run would know it by
        named = (
            str(value_model)
            if isinstance(value_model, (str, Path))
            else f"{type(value_model).__name__} in memory, {uuid4()}"
        )
        if isinstance(value_model, (str, Path)):
            place = {"subfolder": value_subfolder, "revision": value_revision}
            value_model = ValueModel.from_pretrained(
                value_model, backbone, dtype=self.model.dtype, device_map=str(self.device), **place
            )
        self.candidates = candidates if value_model is None else None
        self.steering = None
        if value_model is not None:
            self.steering = Steering(
                value_model,
                made,
                math.inf if beta in ("inf", math.inf) else beta,
                candidates=candidates,
                min_probability=min_probability,
            )
        self.noise_seed, self.asked_likelihood = seed, loglikelihood
        self.settings = {
            "pretrained": self.pretrained if isinstance(pretrained, str) else type(pretrained).__name__,
            "value_model": named if value_model is not None else "",
            "value_subfolder": value_subfolder, "value_revision": value_revision,
            "gate": repr(made), "beta": str(beta), "candidates": candidates, "min_probability": min_probability, "seed": seed,
            "loglikelihood": loglikelihood,
        }  # fmt: skip

    @property
    def digest(self) -> str:
        """Of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def get_model_info(self) -> dict:
        """What lm-eval writes into the results' config."""
        return super().get_model_info() | {"sia": self.settings | {"digest": self.digest}}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """lm-eval's cache knows requests by their text alone: responses under other steering lie in another table of its file."""
        super().set_cache_hook(cache_hook)
        store = cache_hook.dbdict
        if store is not None:
            store.tablename = f"sia_{self.digest}"
            store.conn.execute(
                f'CREATE TABLE IF NOT EXISTS "{store.tablename}" (key TEXT PRIMARY KEY, value BLOB)'
            )
            store.conn.commit()

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self.asked: Counter[tuple[int, ...]] = Counter()
        return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context, max_length: int, stop: list[str], **generation_kwargs):
        seeds = []
        for row, mask in zip(
            context.tolist(), generation_kwargs["attention_mask"].tolist(), strict=True
        ):
            prompt = tuple(token for token, there in zip(row, mask, strict=True) if there)
            seeds.append(
                self.noise_seed + self.asked[prompt]
            )  # a prompt that is repeated gets further samples
            self.asked[prompt] += 1
        steered = {
            "custom_generate": steered_generate,
            "steering": self.steering,
            "candidates": self.candidates,
            "seed": seeds,
        }
        return super()._model_generate(context, max_length, stop, **steered, **generation_kwargs)

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.asked_likelihood == "refuse":
            raise NotImplementedError(
                "model sia refuses log-likelihoods: under steering, tokens that are not among the K candidates are impossible. Ask for "
                "loglikelihood=steered to get those of the steered policy, or evaluate the base model as lm-eval's hf"
            )
        contexts = [context or [self.prefix_token_id] for _, context, _ in requests]
        batch_size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        found = log_likelihoods(
            self.model,
            self.steering,
            contexts,
            [continuation for *_, continuation in requests],
            candidates=self.candidates,
            seed=self.noise_seed,
            batch_size=batch_size,
        )
        impossible = sum(math.isinf(likelihood.total) for likelihood in found)
        if impossible:
            raise ValueError(
                f"{impossible} of {len(found)} continuations have tokens that are not among the {self.settings['candidates']} candidates: "
                f"under steering they are impossible, and answers that are would tie. Ask for more candidates (at most "
                f"{self.model.config.get_text_config().vocab_size}), or evaluate the base model as lm-eval's hf"
            )
        return [(likelihood.total, bool(likelihood.greedy.all())) for likelihood in found]


def main() -> None:
    """lm-eval's own command line, which knows the model `sia` once this file is imported. Exit code 2 for bad input."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (ValueError, TypeError, NotImplementedError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
