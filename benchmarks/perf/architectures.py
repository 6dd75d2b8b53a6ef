"""Cost of steering at the size of real models, without their weights.

The architectures of Qwen3 and Llama with random weights, language and value model alike
(`make cost PROFILE=architectures`): time per token of plain decoding (`model.generate`), SIA (a
random gate, so that the share of junctions is exact), dense steering, best-of-N and chunk beam
search, in turns within one process. Beside each ratio stand token positions and FLOPs as counted,
and the accounting that was reported for the paper: with K = 10 and a value model of the same size
dense steering costs about 10 times a plain pass, 20% of the tokens about 2 times, best-of-8 8
times. Without a GPU the same shapes are scaled down, and the table says so.
"""

import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.analysis import tables
from benchmarks.figures import style
from benchmarks.perf.random_models import Models, random_models, sia_run, transformers_run
from benchmarks.perf.timing import Run, in_turns, write_provenance
from benchmarks.runtime.files import read_json, write_frame, write_text
from benchmarks.runtime.fingerprints import ROOT
from benchmarks.runtime.workers import available_cores, threads
from benchmarks.spec.profile import PROFILES
from sia import EveryToken, Gate, RandomGate, Steering, best_of_n, chunk_beam_search

NAME = "architectures"
PLAIN = ("plain", "plain")  # kind and label
REPORTED = {
    "sia 20%": 2.0,
    "dense": 10.0,
    "best of 8": 8.0,
}  # times a plain pass, as reported for the paper
PAGE = ROOT / "docs" / "architectures.md"
TEXT = """# Cost at the size of real models

Written by `make cost PROFILE={name}` from `results/{name}/cost.csv`; not edited by hand.
Language and value model have the same architecture and random weights ({architectures};
{size}: {smallest:.2g} to {largest:.2g} million parameters). Plain decoding by transformers, SIA
with a random gate, dense steering, best-of-N and chunk beam search are timed in turns within one
process. Prompts have {prompt_tokens} tokens, responses {new_tokens}; K = {candidates}; {device}.

![Time per token by architecture, batch and method](../figures/{name}/cost.png)

Ranges over the architectures, as multiples of plain decoding. Times are medians of {rounds} rounds.
FLOPs are as `sia` counts them. "Reported" is the accounting that was reported for the paper.

{table}
"""


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Args:
        rounds: Rounds that count.
        responses: N of best-of-N, and beams at once.
        architectures: Settings of each configuration, and its family.
    """

    batches: list[int]
    prompt_tokens: int
    new_tokens: int
    candidates: int
    ratios: list[float]
    responses: int
    beam_width: int
    chunk: int
    rounds: int
    architectures: dict[str, dict]


def read_settings(path: Path = PROFILES / f"{NAME}.toml") -> Settings:
    """Return the settings of the committed profile."""
    return Settings(**tomllib.loads(path.read_text(encoding="utf-8")))


def scaled_down(shape: dict) -> dict:
    """Return a shape with the same ratios of widths and heads, small enough for a processor."""
    heads = shape["num_attention_heads"] // 4
    smaller = {
        "vocab_size": 4096,
        "hidden_size": shape["hidden_size"] // 8,
        "intermediate_size": shape["intermediate_size"] // 8,
    }
    smaller |= {
        "num_hidden_layers": max(2, shape["num_hidden_layers"] // 7),
        "num_attention_heads": heads,
        "head_dim": 32,
    }
    return shape | smaller | {"num_key_value_heads": max(1, shape["num_key_value_heads"] // 4)}


def methods(
    models: Models, settings: Settings, batch: int, tokens: int
) -> dict[tuple[str, str], Run]:
    """Return how each method generates `tokens` tokens for each of `batch` prompts.

    Returns:
        Runs by kind (as in `benchmarks.spec.methods`) and label of the method.
    """
    prompts = models.prompts(batch)

    def steered(gate: Gate) -> Run:
        steering = Steering(models.value, gate, candidates=settings.candidates)
        return sia_run(models, batch, tokens, steering)

    def search(function: Callable, *responses: int, **options: object) -> Run:
        language, tokenizer, value = models.language, models.tokenizer, models.value
        options |= {"max_new_tokens": tokens, "batch_size": batch * settings.responses}
        return lambda seed: function(
            language, tokenizer, prompts, value, *responses, seed=seed, progress=False, **options
        )

    width, chunk = settings.beam_width, settings.chunk
    expansions = settings.responses // width
    return {
        PLAIN: transformers_run(models, batch, tokens, top_k=settings.candidates),
        **{("sia", f"sia {ratio:.0%}"): steered(RandomGate(ratio)) for ratio in settings.ratios},
        ("dense", "dense"): steered(EveryToken()),
        ("best-of-n", f"best of {settings.responses}"): search(best_of_n, settings.responses),
        ("beams", f"chunk beam search, {settings.responses}"): search(
            chunk_beam_search, width=width, expansions=expansions, chunk=chunk
        ),
    }


def measure(settings: Settings, device: str, tokens: int) -> pd.DataFrame:
    """Return seconds by architecture, batch, method and round, with the counted cost.

    The cost of plain decoding is as `sia` counts it.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    records = []
    for name, shape in settings.architectures.items():
        if device != "cuda":
            shape = scaled_down(shape)
        models = random_models(shape, device, dtype, settings.prompt_tokens)
        for batch in settings.batches:
            runs = methods(models, settings, batch, tokens)
            counted = {
                method: reduce(add, (generation.cost for generation in run(0)))
                for method, run in (runs | {PLAIN: sia_run(models, batch, tokens, None)}).items()
            }
            times = in_turns(runs, models.device, settings.rounds, f"{name}, batch of {batch}")
            records += [
                {
                    "architecture": name,
                    "parameters": models.parameters,
                    "batch": batch,
                    "kind": method[0],
                    "method": method[1],
                    "positions": cost.model_tokens + cost.value_tokens,
                    "flops": cost.model_flops + cost.value_flops,
                    "round": turn,
                    "seconds": seconds,
                }
                for method, cost in counted.items()
                for turn, seconds in enumerate(times[method])
            ]
        del models, runs  # both hold the weights
    return pd.DataFrame.from_records(records)


def summarize(rows: pd.DataFrame, tokens: int) -> pd.DataFrame:
    """Return time, token positions and FLOPs of each method as ratios to plain decoding.

    Times are compared within a round (median, lowest and highest ratio), and also given in
    milliseconds per token. `reported`: the ratio that was reported for the paper.
    """
    keys = ["architecture", "parameters", "batch"]
    plain = rows[rows["method"] == "plain"].drop(columns=["kind", "method"])
    pairs = rows.merge(plain, on=[*keys, "round"], suffixes=("", "_plain"))
    pairs = pairs.assign(
        ms=1000 * pairs["seconds"] / (pairs["batch"] * tokens),
        ratio=pairs["seconds"] / pairs["seconds_plain"],
        positions=pairs["positions"] / pairs["positions_plain"],
        flops=pairs["flops"] / pairs["flops_plain"],
    )
    table = pairs.groupby([*keys, "kind", "method"], sort=False, as_index=False).agg(
        ms_per_token=("ms", "median"),
        time=("ratio", "median"),
        time_low=("ratio", "min"),
        time_high=("ratio", "max"),
        rounds=("ratio", "size"),
        positions=("positions", "first"),
        flops=("flops", "first"),
    )
    return table.assign(reported=table["method"].map(REPORTED)).round(4)


def plot(table: pd.DataFrame, provenance: dict, folder: Path) -> list[Path]:
    """Draw a panel for each batch: time of every method as a multiple of plain decoding."""
    steered = table[table["method"] != "plain"]
    names = table["architecture"].unique()
    shades: dict[str, str] = {}
    for kind, method in steered[["kind", "method"]].drop_duplicates().itertuples(index=False):
        colour = style.COLOURS[kind]
        shades[method] = "#003B5C" if colour in shades.values() else colour
    figure, axes = style.plt.subplots(
        1,
        table["batch"].nunique(),
        figsize=(1.1 * len(names) * table["batch"].nunique() + 0.7, 3.8),
        squeeze=False,
    )
    width = 0.8 / len(shades)
    for axis, (batch, panel) in zip(axes[0], steered.groupby("batch", sort=False), strict=True):
        for i, (method, rows) in enumerate(panel.groupby("method", sort=False)):
            places = np.arange(len(names)) + (i - (len(shades) - 1) / 2) * width
            axis.bar(places, rows["time"], width, color=shades[method])
            axis.vlines(places, rows["time_low"], rows["time_high"], color="#222222", linewidth=0.9)
            axis.plot(places, rows["flops"], "_", color="#D00000", markersize=5)
            axis.plot(places, rows["reported"], "x", color="#888888", markersize=4)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set_xticks(range(len(names)), [name.replace("-", "\n", 1) for name in names])
        axis.set_title(f"batch of {batch}", loc="left")
    axes[0, 0].set_ylabel("time / plain decoding")
    marks = {"FLOPs, counted": ("_", "#D00000"), "reported accounting": ("x", "#888888")}
    handles = [
        style.plt.Rectangle((0, 0), 1, 1, color=shade, label=method.replace("sia", "SIA"))
        for method, shade in shades.items()
    ] + [
        style.Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)
        for label, (marker, colour) in marks.items()
    ]
    size = "scaled down: there was no GPU" if provenance["scaled_down"] else "full size"
    settings = provenance["settings"]
    caption = (
        "Time per token as a multiple of model.generate, median and range of "
        f"{int(table['rounds'].max())} rounds, in turns. Random weights, {size}; language and "
        f"value model alike, K = {settings['candidates']}, prompts of {settings['prompt_tokens']} "
        f"and responses of {provenance['new_tokens']} tokens. {provenance['device']}."
    )
    return style.finish(figure, handles, caption, folder, "cost", stale=False, legend_columns=7)


def page(table: pd.DataFrame, provenance: Mapping[str, Any]) -> str:
    """Return docs/architectures.md: how it was measured, and ranges over the architectures."""
    settings, parameters = provenance["settings"], table["parameters"] / 1e6
    columns = {
        f"{title}, batch of {batch}": rows.groupby("method", sort=False)[column].agg(_range)
        for column, title in (("time", "time"), ("flops", "FLOPs"))
        for batch, rows in table[table["method"] != "plain"].groupby("batch")
    }
    reported = table.groupby("method")["reported"].first().map("{:.0f}".format, na_action="ignore")
    shown = pd.DataFrame(columns).join(reported.rename("reported")).fillna("")
    shown.index = shown.index.str.replace("sia", "SIA")
    return TEXT.format(
        name=NAME,
        architectures=", ".join(settings["architectures"]),
        size="scaled down" if provenance["scaled_down"] else "full size",
        smallest=parameters.min(),
        largest=parameters.max(),
        prompt_tokens=settings["prompt_tokens"],
        new_tokens=provenance["new_tokens"],
        candidates=settings["candidates"],
        device=provenance["device"],
        rounds=table["rounds"].max(),
        table=shown.reset_index().to_markdown(index=False, disable_numparse=True),
    )


def _range(values: pd.Series) -> str:
    return f"{values.min():.1f} to {values.max():.1f}"


def run(fresh: bool) -> None:
    """Draw the table, measured first where there is none or `fresh`, and write its page."""
    folder = tables.RESULTS / NAME
    if (folder / "cost.json").exists() and not fresh:
        print(
            f"cost: drawing from the table in results/{NAME} without measuring "
            "(FRESH=1 measures again)"
        )
    else:
        reason = "as FRESH=1 asks" if fresh else f"because results/{NAME} has no table for it"
        print(f"cost: measuring, {reason}")
        _measure_and_write(folder)
    provenance = read_json(folder / "cost.json")
    tables.check_files(folder, "cost", provenance)
    table = pd.read_csv(folder / "cost.csv")
    paths = plot(table, provenance, tables.FIGURES / NAME)
    write_text(PAGE, page(table, provenance))
    print(f"cost: {', '.join(str(path.relative_to(tables.ROOT)) for path in paths)}")


def _measure_and_write(folder: Path) -> None:
    start, settings = time.monotonic(), read_settings()
    device, tokens, name = "cuda", settings.new_tokens, f"{available_cores()} cores"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        device, tokens = "cpu", tokens // 4
        print(
            "cost: there is no GPU; the architectures are scaled down, "
            f"and responses have {tokens} tokens"
        )
    with threads(available_cores()):
        rows = measure(settings, device, tokens)
    summary, responses = folder / "cost.csv", folder / "cost.parquet"
    write_frame(responses, rows)
    write_text(summary, summarize(rows, tokens).to_csv(index=False))
    write_provenance(
        "benchmarks",
        start,
        [summary, responses],
        device=name,
        scaled_down=device == "cpu",
        new_tokens=tokens,
        settings=vars(settings) | {"architectures": list(settings.architectures)},
    )
