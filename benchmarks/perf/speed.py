"""How fast `sia` decodes: `python -m benchmarks.perf.speed` (or `make speed`) writes results/speed.csv and its provenance.

Everything is a ratio of two times, taken in turns within one process, so that a drifting machine changes both. Models have
random weights: their outputs mean nothing, their cost is real. `benchmarks.perf.architectures` does the same with the architectures of
Qwen3 and Llama, on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.analysis.tables import RESULTS, circumstances, sha256
from benchmarks.perf.published_loop import published_loop
from benchmarks.runtime.command_line import Parser
from benchmarks.runtime.files import write_text
from benchmarks.runtime.fingerprints import MODELS, code_digest
from benchmarks.runtime.workers import available_cores
from benchmarks.subjects.lab.models import ARCHITECTURES as FAMILIES
from sia import (
    AttentionGate,
    EveryToken,
    RandomGate,
    Steering,
    ValueModel,
    generate,
    steered_generate,
)

PROMPT, CANDIDATES, RUNS = 24, 10, 7
SMALL = {
    "vocab_size": 1024, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64,
    "intermediate_size": 768, "tie_word_embeddings": True, "initializer_range": 0.05,
}  # fmt: skip

Run = Callable[[int], object]  # of a seed: every round has its own, and so its own junctions


@dataclass(frozen=True)
class Models:
    """A language model, a value model of the same size, and a tokenizer without an end: every response has its full length."""

    language: PreTrainedModel
    value: ValueModel
    tokenizer: PreTrainedTokenizerFast
    prompt_tokens: int = PROMPT

    @property
    def device(self) -> torch.device:
        return self.language.device

    def prompts(self, batch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(batch)
        return torch.randint(
            3, self.language.config.vocab_size, (batch, self.prompt_tokens), generator=generator
        ).tolist()


def random_models(
    settings: dict, device: str = "cpu", dtype: torch.dtype = torch.float32, family: str = "qwen3"
) -> Models:
    def language_model(seed: int) -> PreTrainedModel:
        config_class, model_class, _ = FAMILIES[family]
        config = config_class(
            **settings, eos_token_id=None, bos_token_id=None, pad_token_id=0, dtype=dtype
        )
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            model = model_class(config).eval().to(dtype)
        model.generation_config.eos_token_id = None
        return model

    value = ValueModel.from_backbone(language_model(1))
    torch.nn.init.normal_(
        value.head.weight, generator=torch.Generator(device).manual_seed(0), std=0.1
    )
    words = {f"w{i}": i for i in range(settings["vocab_size"])}
    return Models(
        language_model(0),
        value.eval(),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0"))),
    )


def plain(models: Models, batch: int, tokens: int, candidates: int = CANDIDATES) -> Run:
    ids = torch.tensor(models.prompts(batch), device=models.device)
    mask, language = torch.ones_like(ids), models.language
    return lambda seed: language.generate(
        ids, attention_mask=mask, do_sample=True, top_k=candidates, max_new_tokens=tokens
    )


def ours(models: Models, batch: int, tokens: int, steering: Steering | None) -> Run:
    prompts = models.prompts(batch)
    options = {"max_new_tokens": tokens, "batch_size": batch, "progress": False}
    return lambda seed: generate(
        models.language, models.tokenizer, prompts, steering, seed=seed, **options
    )


def through_transformers(models: Models, batch: int, tokens: int, steering: Steering | None) -> Run:
    ids = torch.tensor(models.prompts(batch), device=models.device)
    mask, language = torch.ones_like(ids), models.language
    options = {
        "custom_generate": steered_generate,
        "steering": steering,
        "do_sample": True,
        "max_new_tokens": tokens,
    }
    return lambda seed: language.generate(ids, attention_mask=mask, seed=seed, **options)


def published(models: Models, tokens: int, gate: RandomGate) -> Run:
    eager = copy.deepcopy(models.language)
    eager.set_attn_implementation("eager")
    prompt = models.prompts(1)[0]
    return lambda seed: published_loop(
        eager, models.value, prompt, gate, 1.0, CANDIDATES, tokens, seed
    )


def seconds(call: Run, seed: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(seed)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(calls: Sequence[Run], device: torch.device, runs: int, bar: tqdm) -> list[list[float]]:
    """Seconds of each call in each round, after one round that does not count."""
    times = []
    for round_ in range(runs + 1):
        times.append([seconds(call, round_, device) for call in calls])
        bar.update()
        bar.set_postfix_str(" ".join(f"{t:.2f}s" for t in times[round_]))
    return [list(column) for column in zip(*times[1:], strict=True)]


def row(
    name: str, values: Sequence[float], goal: str = "", **settings: object
) -> dict[str, object]:
    """A row of the table: the median over the runs, and their range."""
    numbers = {"estimate": statistics.median(values), "low": min(values), "high": max(values)}
    return {
        "model": "", "batch": "", "new_tokens": "", "ratio": "", **settings, "measure": name,
        **{key: round(value, 3) for key, value in numbers.items()}, "runs": len(values), "goal": goal,
    }  # fmt: skip


def against(baseline: Sequence[float], times: Sequence[float]) -> list[float]:
    return [t / b for t, b in zip(times, baseline, strict=True)]


def small_models(
    runs: int, shape: dict = SMALL, batches: Sequence[int] = (1, 64), tokens: int = 128
) -> list[dict[str, object]]:
    """Times on CPU. tokens: of the usual response; the published loop makes twice, the test of length four times as many."""
    found, models = [], random_models(shape)
    name = f"qwen3-{sum(p.numel() for p in models.language.parameters()) / 1e6:.1f}M"
    sparse, dense = Steering(models.value, RandomGate(0.2)), Steering(models.value, EveryToken())
    watching = Steering(
        models.value, AttentionGate(threshold=11.0)
    )  # the signal is below 10: it never opens
    device = models.device
    goals = {(1, "off"): "≤ 1.0", (64, "off"): "≤ 1.0", (1, 0.2): "≤ 1.3", (64, 0.2): "≤ 3.0"}
    with tqdm(total=(2 + len(batches)) * (runs + 1), desc="speed", unit="round", disable=None) as bar:
        for batch in batches:
            calls = {
                "generate": plain(models, batch, tokens),
                "off": ours(models, batch, tokens, None),
                "off, through transformers": through_transformers(models, batch, tokens, None),
                0.2: ours(models, batch, tokens, sparse),
                "attention watched": ours(models, batch, tokens, watching),
            } | ({1.0: ours(models, batch, tokens, dense)} if batch == 1 else {})
            times = dict(zip(calls, in_turns(list(calls.values()), device, runs, bar), strict=True))
            base = times.pop("generate")
            found.append(
                row("seconds of model.generate", base, model=name, batch=batch, new_tokens=tokens)
            )
            for kind, taken in times.items():
                ratio, label = (0, kind) if isinstance(kind, str) else (kind, "steered")
                settings = {"model": name, "batch": batch, "new_tokens": tokens, "ratio": ratio}
                found.append(
                    row(
                        f"time: {label} / model.generate",
                        against(base, taken),
                        goals.get((batch, kind), ""),
                        **settings,
                    )
                )
        settings = {"model": name, "batch": 1, "ratio": 0.2}
        slow, fast = in_turns(
            [published(models, 2 * tokens, sparse.gate), ours(models, 1, 2 * tokens, sparse)],
            device,
            runs,
            bar,
        )
        found.append(
            row(
                "time: published cost structure / steered",
                against(fast, slow),
                "≥ 10",
                new_tokens=2 * tokens,
                **settings,
            )
        )
        lengths = (tokens, 4 * tokens)
        calls = [
            *(plain(models, 1, n) for n in lengths),
            *(ours(models, 1, n, sparse) for n in lengths),
        ]
        plain_short, plain_long, short, long = in_turns(calls, device, runs, bar)
        growth = [
            (d / c) / (b / a)
            for a, b, c, d in zip(plain_short, plain_long, short, long, strict=True)
        ]
        label = f"time per token at {lengths[1]} / at {lengths[0]}, over that of model.generate"
        found.append(row(label, growth, "≤ 1.2", new_tokens=lengths[1], **settings))
        passes = [forwards_per_junction(models, sparse, tokens)]
        found.append(
            row(
                "value forward passes per junction step", passes, "1", new_tokens=tokens, **settings
            )
        )
    return found


def memory_rows(name: str, runs: int) -> list[dict[str, object]]:
    """Peak memory beyond that of a program without a model, in fresh processes: the models' weights are part of it."""
    rounds = [
        peak_memory(("import", "plain", "off", "steered"))
        for _ in tqdm(range(runs), desc="memory", unit="round", disable=None)
    ]
    base = [memory["plain"] - memory["import"] for memory in rounds]
    found = []
    for kind, goal in (("off", ""), ("steered", "≤ 2.2")):
        settings = {
            "model": name,
            "batch": 64,
            "new_tokens": 128,
            "ratio": 0.2 if kind == "steered" else 0,
        }
        taken = [memory[kind] - memory["import"] for memory in rounds]
        found.append(
            row(f"peak memory: {kind} / model.generate", against(base, taken), goal, **settings)
        )
    return found


def forwards_per_junction(models: Models, steering: Steering, tokens: int) -> float:
    calls = []
    hook = models.value.backbone.register_forward_hook(lambda *_: calls.append(1))
    (generation,) = ours(models, 1, tokens, steering)(0)
    hook.remove()
    return len(calls) / generation.cost.junctions


def peak_memory(kinds: Sequence[str]) -> dict[str, float]:
    """Largest resident memory, in MiB, of a fresh process each; "import" has no model at all."""
    peaks = {}
    for kind in kinds:
        command = [sys.executable, "-m", "benchmarks.perf.speed", "--peak-memory", kind]
        peaks[kind] = float(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
    return peaks


def use_memory(kind: str) -> float:
    if kind != "import":
        models = random_models(SMALL)
        if kind == "plain":
            models = Models(
                models.language, None, models.tokenizer
            )  # the value model is no part of plain decoding
            plain(models, 64, 128)(0)
        else:
            ours(
                models,
                64,
                128,
                Steering(models.value, RandomGate(0.2)) if kind == "steered" else None,
            )(0)
    # of this program alone: what getrusage tells includes the parent from before the start
    peak = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(peak.split()[1]) / 1024


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values={"ratio": [""]})


def markdown(table: pd.DataFrame) -> str:
    """The table as docs/library.md shows it."""
    lines = [
        "| what, against what | batch | new tokens | median | range | goal |",
        "|---|---|---|---|---|---|",
    ]
    for _, r in table.iterrows():
        label = f"{r.measure} ({r.ratio:.0%} of tokens)" if "steered" in r.measure else r.measure
        span = f"{r.low:.2f} to {r.high:.2f}" if r.runs > 1 else ""
        lines.append(
            f"| {label} | {r.batch} | {r.new_tokens} | {r.estimate:.2f} | {span} | {r.goal} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks.perf.speed",
        description="measure decoding speed into results/speed.csv",
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=RUNS,
        help=f"counted rounds of each comparison (default: {RUNS})",
    )
    parser.add_argument(
        "--peak-memory", choices=("import", "plain", "off", "steered"), help=argparse.SUPPRESS
    )
    options = parser.parse_args(arguments)
    if options.runs < 1:
        print(f"error: runs must be at least 1, got {options.runs}", file=sys.stderr)
        return 2
    torch.set_num_threads(available_cores())
    if options.peak_memory:
        print(use_memory(options.peak_memory))
        return 0
    start = time.monotonic()
    rows = small_models(options.runs)
    rows += memory_rows(rows[0]["model"], min(options.runs, 5))
    table = pd.DataFrame(rows)
    path = RESULTS / "speed.csv"
    write_text(path, table.to_csv(index=False))
    provenance = {
        **circumstances("benchmarks.perf.speed"),
        "code_digest": code_digest(MODELS),
        "threads": torch.get_num_threads(),
        "wall_seconds": round(time.monotonic() - start, 1),
        "sha256": {path.name: sha256(path)},
    }
    write_text(path.with_suffix(".json"), json.dumps(provenance, indent=2, sort_keys=True) + "\n")
    print(markdown(read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
