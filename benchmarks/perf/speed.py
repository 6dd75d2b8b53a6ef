"""Decoding speed of `sia`: `make speed` writes results/speed.csv and docs/performance.md.

Everything is a ratio of two times, taken in turns within one process. Models have random weights.
`benchmarks.perf.architectures` does the same with the architectures of Qwen3 and Llama.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.analysis.tables import RESULTS
from benchmarks.perf.random_models import (
    CANDIDATES,
    Models,
    published_run,
    random_junction_gate,
    random_models,
    random_q_head,
    sia_run,
    transformers_run,
)
from benchmarks.perf.timing import in_turns, ratios, write_provenance
from benchmarks.runtime.command_line import Parser
from benchmarks.runtime.files import read_json, write_text
from benchmarks.runtime.fingerprints import ROOT
from benchmarks.runtime.workers import available_cores
from sia import AttentionGate, EveryToken, RandomGate, Steering, steered_generate

ROUNDS = 5
SMALL = {
    "family": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "intermediate_size": 768,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
OVER_PLAIN = ("time_junction_gate", "time_q_head", "time_junction_q_head")  # multiples of time_off
GOALS = {  # by batch, measure and ratio
    (1, "time_off", 0): "≤ 1.0",
    (64, "time_off", 0): "≤ 1.0",
    (1, "time_steered", 0.2): "≤ 1.25",
    (64, "time_steered", 0.2): "≤ 2.0",
    (1, "time_junction_gate", 0): "≤ 1.02",
    (64, "time_junction_gate", 0): "≤ 1.02",
    (1, "time_q_head", 1.0): "≤ 1.1",
    (64, "time_q_head", 1.0): "≤ 1.1",
    (1, "time_junction_q_head", ""): "≤ 1.1",
    (64, "time_junction_q_head", ""): "≤ 1.1",
}
MEMORY_KINDS = ("import", "plain", "off", "steered")
PAGE = ROOT / "docs" / "performance.md"
HEAD = """# Performance

Written by `make speed` from `results/speed.csv`; not edited by hand. Times and memory are multiples
of those of transformers' `model.generate` (or of what the row says), measured in turns within one
process: the median of the rounds, with their range. The models have random weights (`{model}`) and
run on {threads} CPU threads in float32. Steering uses K = 10 candidates and a value model of the
same size; the gate steers tokens at random. Goals are those that the design of the library set
itself.

"""
LABELS = {  # of measures, which are multiples of those of `model.generate` unless it says otherwise
    "seconds_generate": "seconds of `model.generate`",
    "time_off": "time of `sia.generate` without steering",
    "time_off_transformers": "time of `steered_generate` without steering",
    "time_steered": "time of steering {ratio:.0%} of the tokens",
    "time_attention": "time of an attention gate that never opens",
    "time_junction_gate": "time of a junction gate that never opens, against no steering",
    "time_q_head": "time of a Q-head at every token, against no steering",
    "time_junction_q_head": "time of a junction gate with a Q-head, against no steering",
    "time_published": "time of the published loop, without caches, against steering {ratio:.0%}",
    "growth_of_time": (
        "growth of the time per token from 128 to 512 tokens, against that of `model.generate`"
    ),
    "forwards_per_junction": "forward passes of the value model per steered token",
    "memory_off": "peak memory without steering",
    "memory_steered": "peak memory of steering {ratio:.0%} of the tokens",
}
Row = dict[str, object]


def row(measure: str, values: Sequence[float], goal: str = "", **settings: object) -> Row:
    """Return a row of the table: the median over the rounds, and their range."""
    numbers = {"estimate": statistics.median(values), "low": min(values), "high": max(values)}
    labels = {"model": "", "batch": "", "new_tokens": "", "ratio": ""} | settings
    rounded = {name: round(number, 3) for name, number in numbers.items()}
    return labels | {"measure": measure} | rounded | {"runs": len(values), "goal": goal}


def small_models(
    rounds: int, shape: dict = SMALL, batches: Sequence[int] = (1, 64), tokens: int = 128
) -> list[Row]:
    """Return times on the CPU.

    Args:
        tokens: Length of the usual response; the published loop decodes twice, and the test of
            length four times as many.
    """
    models = random_models(shape)
    name = models.name
    sparse = Steering(models.value, RandomGate(0.2))
    rows = []
    for batch in batches:
        rows += batch_rows(models, sparse, batch, tokens, rounds, model=name)
    settings = {"model": name, "batch": 1, "ratio": 0.2}
    rows.append(published_row(models, sparse, 2 * tokens, rounds, **settings))
    rows.append(length_row(models, sparse, (tokens, 4 * tokens), rounds, **settings))
    passes = [forwards_per_junction(models, sparse, tokens)]
    return [*rows, row("forwards_per_junction", passes, "1", new_tokens=tokens, **settings)]


def batch_rows(
    models: Models, sparse: Steering, batch: int, tokens: int, rounds: int, **settings: object
) -> list[Row]:
    """Return times of every way to decode, as multiples of `model.generate`."""
    # the signal is below 10: this gate watches it and never opens
    watching = Steering(models.value, AttentionGate(threshold=11.0))
    off = {"custom_generate": steered_generate, "steering": None}
    runs = {
        ("seconds_generate", ""): transformers_run(models, batch, tokens, top_k=CANDIDATES),
        ("time_off", 0): sia_run(models, batch, tokens, None),
        ("time_off_transformers", 0): transformers_run(models, batch, tokens, **off),
        ("time_steered", 0.2): sia_run(models, batch, tokens, sparse),
        ("time_attention", 0): sia_run(models, batch, tokens, watching),
    }
    if batch == 1:
        dense = Steering(models.value, EveryToken())
        runs["time_steered", 1.0] = sia_run(models, batch, tokens, dense)
    q_head, closed = random_q_head(models), random_junction_gate(models, threshold=1e9)
    runs["time_junction_gate", 0] = sia_run(models, batch, tokens, Steering(models.value, closed))
    runs["time_q_head", 1.0] = sia_run(models, batch, tokens, Steering(q_head, EveryToken()))
    predicted = replace(closed, threshold=1.0)  # opens on about half of the tokens
    runs["time_junction_q_head", ""] = sia_run(models, batch, tokens, Steering(q_head, predicted))
    times = in_turns(runs, models.device, rounds, f"batch of {batch}")
    base = times["seconds_generate", ""]
    baselines = dict.fromkeys(OVER_PLAIN, times["time_off", 0])
    settings |= {"batch": batch, "new_tokens": tokens}
    return [
        row(
            measure,
            ratios(baselines.get(measure, base), seconds)
            if measure != "seconds_generate"
            else base,
            GOALS.get((batch, measure, ratio), ""),
            **settings,
            ratio=ratio,
        )
        for (measure, ratio), seconds in times.items()
    ]


def published_row(
    models: Models, sparse: Steering, tokens: int, rounds: int, **settings: object
) -> Row:
    """Return the time of the published cost structure as a multiple of ours."""
    runs = {
        "published": published_run(models, tokens, sparse.gate),
        "sia": sia_run(models, 1, tokens, sparse),
    }
    times = in_turns(runs, models.device, rounds, "published loop")
    values = ratios(times["sia"], times["published"])
    return row("time_published", values, "≥ 10", new_tokens=tokens, **settings)


def length_row(
    models: Models, sparse: Steering, lengths: tuple[int, int], rounds: int, **settings: object
) -> Row:
    """Return how much slower a token of long responses is, over that of `model.generate`."""
    short, long = lengths
    runs = {("plain", n): transformers_run(models, 1, n, top_k=CANDIDATES) for n in lengths}
    runs |= {("sia", n): sia_run(models, 1, n, sparse) for n in lengths}
    times = in_turns(runs, models.device, rounds, "long responses")
    growth = {way: ratios(times[way, short], times[way, long]) for way in ("plain", "sia")}
    values = ratios(growth["plain"], growth["sia"])
    return row("growth_of_time", values, "≤ 1.2", new_tokens=long, **settings)


def forwards_per_junction(models: Models, steering: Steering, tokens: int) -> float:
    """Return the forward passes of the value model per junction."""
    passes = []
    hook = models.value.backbone.register_forward_hook(lambda *_: passes.append(1))
    (generation,) = sia_run(models, 1, tokens, steering)(0)
    hook.remove()
    return len(passes) / generation.cost.junctions


def memory_rows(name: str, rounds: int) -> list[Row]:
    """Return peak memory, weights included, beyond that of a program without a model."""
    turns = tqdm(range(rounds), desc="memory", unit="round", disable=None)
    peaks = pd.DataFrame([{kind: peak_memory(kind) for kind in MEMORY_KINDS} for _ in turns])
    beyond = peaks.sub(peaks["import"], axis=0)
    settings = {"model": name, "batch": 64, "new_tokens": 128}
    return [
        row(f"memory_{kind}", beyond[kind] / beyond["plain"], goal,
            ratio=ratio, **settings)
        for kind, goal, ratio in (("off", "", 0), ("steered", "≤ 2.2", 0.2))
    ]  # fmt: skip


def peak_memory(kind: str) -> float:
    """Return the largest resident memory of a fresh process of this kind, in MiB."""
    command = [sys.executable, "-m", "benchmarks.perf.speed", "--peak-memory", kind]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def use_memory(kind: str) -> float:
    """Decode once in this process and return its largest resident memory, in MiB.

    Args:
        kind: One of MEMORY_KINDS; "import" has no model at all.
    """
    if kind != "import":
        models = random_models(SMALL)
        if kind == "plain":  # the value model is no part of plain decoding
            models = replace(models, value=None)
            transformers_run(models, 64, 128, top_k=CANDIDATES)(0)
        else:
            steering = Steering(models.value, RandomGate(0.2)) if kind == "steered" else None
            sia_run(models, 64, 128, steering)(0)
    # getrusage would include the parent from before the start
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def read(path: Path) -> pd.DataFrame:
    """Return the table as it was written."""
    return pd.read_csv(path, keep_default_na=False, na_values={"ratio": [""]})


def page(table: pd.DataFrame, provenance: Mapping[str, Any]) -> str:
    """Return docs/performance.md: how it was measured, and the table with labels."""
    rows = [
        ["measure", "batch", "new tokens", "median", "range", "goal"],
        ["---"] * 6,
    ]
    for r in table.itertuples():
        label = LABELS[r.measure].format(ratio=r.ratio)
        span = f"{r.low:.2f} to {r.high:.2f}" if r.runs > 1 else ""
        rows.append([label, str(r.batch), str(r.new_tokens), f"{r.estimate:.2f}", span, r.goal])
    head = HEAD.format(model=table["model"].iloc[0], threads=provenance["threads"])
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_page(path: Path) -> int:
    """Write docs/performance.md from the table at this path, and print it."""
    text = page(read(path), read_json(path.with_suffix(".json")))
    write_text(PAGE, text)
    print(text)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the table; return the exit code."""
    parser = Parser(
        prog="python -m benchmarks.perf.speed",
        description="measure decoding speed into results/speed.csv",
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=ROUNDS,
        help=f"counted rounds of each comparison (default: {ROUNDS})",
    )
    parser.add_argument("--peak-memory", choices=MEMORY_KINDS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--page", action="store_true", help="only write docs/performance.md, from the table"
    )
    options = parser.parse_args(arguments)
    path = RESULTS / "speed.csv"
    if options.page:
        return write_page(path)
    if options.runs < 1:
        print(f"error: runs must be at least 1, got {options.runs}", file=sys.stderr)
        return 2
    torch.set_num_threads(available_cores())
    if options.peak_memory:
        print(use_memory(options.peak_memory))
        return 0
    start = time.monotonic()
    rows = small_models(options.runs)
    rows += memory_rows(rows[0]["model"], min(options.runs, 3))
    write_text(path, pd.DataFrame(rows).to_csv(index=False))
    threads = torch.get_num_threads()
    write_provenance("benchmarks.perf.speed", start, [path], threads=threads)
    return write_page(path)


if __name__ == "__main__":
    sys.exit(main())
