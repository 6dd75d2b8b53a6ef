"""Cost of steering at the size of real models, without their weights.

The architectures of Qwen3 and Llama with random weights, language and value model alike
(`make cost PROFILE=architectures`): time per token of plain decoding (`model.generate`), SIA (a
random gate, so that the share of junctions is exact), dense steering, best-of-N and chunk beam
search, in turns within one process. Beside each ratio stand token positions and FLOPs as counted,
and the accounting that was reported for the paper: with K = 10 and a value model of the same size
dense steering costs about 10 times a plain pass, 20% of the tokens about 2 times, best-of-8 8
times. Without a GPU the same shapes are scaled down, and the table says so.
"""

import json
import statistics
import time
import tomllib
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.analysis import tables
from benchmarks.figures import style
from benchmarks.perf.random_models import Models, plain_run, random_models, sia_run
from benchmarks.perf.timing import Run, in_turns
from benchmarks.runtime.files import read_json, write_frame, write_text
from benchmarks.runtime.fingerprints import MODELS, code_digest
from benchmarks.runtime.workers import available_cores, threads
from benchmarks.spec.profile import PROFILES
from sia import EveryToken, Gate, RandomGate, Steering, best_of_n, chunk_beam_search
from sia.cost import Cost

NAME = "architectures"
REPORTED = {
    "sia 20%": 2.0,
    "dense": 10.0,
    "best of 8": 8.0,
}  # times a plain pass, as reported for the paper
COLOURS = {
    "sia": "sia",
    "dense": "dense",
    "best": "best-of-n",
    "chunk": "beams",
}  # first word of a method → its colour


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


def methods(models: Models, settings: Settings, batch: int, tokens: int) -> dict[str, Run]:
    """Return the runs to time; each makes `tokens` tokens for each of `batch` prompts."""
    prompts = models.prompts(batch)
    usual = {"max_new_tokens": tokens, "batch_size": batch * settings.responses, "progress": False}

    def steered(gate: Gate) -> Run:
        return sia_run(
            models, batch, tokens, Steering(models.value, gate, candidates=settings.candidates)
        )

    def best(seed: int):
        return best_of_n(
            models.language,
            models.tokenizer,
            prompts,
            models.value,
            settings.responses,
            seed=seed,
            **usual,
        )

    def beams(seed: int):
        expansions = settings.responses // settings.beam_width
        return chunk_beam_search(
            models.language,
            models.tokenizer,
            prompts,
            models.value,
            width=settings.beam_width,
            expansions=expansions,
            chunk=settings.chunk,
            seed=seed,
            **usual,
        )

    return {
        "plain": plain_run(models, batch, tokens, settings.candidates),
        **{f"sia {ratio:.0%}": steered(RandomGate(ratio)) for ratio in settings.ratios},
        "dense": steered(EveryToken()),
        f"best of {settings.responses}": best,
        f"chunk beam search, {settings.responses}": beams,
    }


def measure(settings: Settings, device: str, tokens: int) -> pd.DataFrame:
    """Return seconds by architecture, batch, method and round, with the counted cost.

    The cost of plain decoding is as `sia` counts it.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    records, total = [], len(settings.architectures) * len(settings.batches) * (settings.rounds + 1)
    with tqdm(total=total, desc="cost of architectures", unit="round", disable=None) as bar:
        for name, shape in settings.architectures.items():
            shape = dict(shape)
            family = shape.pop("family")
            models = random_models(
                shape if device == "cuda" else scaled_down(shape), device, dtype, family
            )
            models = replace(models, prompt_tokens=settings.prompt_tokens)
            for batch in settings.batches:
                calls = methods(models, settings, batch, tokens)
                counted = {
                    method: counted_cost(call(0))
                    for method, call in calls.items()
                    if method != "plain"
                }
                counted["plain"] = counted_cost(sia_run(models, batch, tokens, None)(0))
                times = in_turns(calls, models.device, settings.rounds, bar)
                for method, seconds in times.items():
                    cost = counted[method]
                    columns = {
                        "architecture": name,
                        "parameters": models.parameters,
                        "batch": batch,
                        "method": method,
                    }
                    columns |= {
                        "positions": cost.model_tokens + cost.value_tokens,
                        "flops": cost.model_flops + cost.value_flops,
                    }
                    records += [
                        columns | {"round": turn, "seconds": second}
                        for turn, second in enumerate(seconds)
                    ]
            del models, calls  # both hold the weights
    return pd.DataFrame.from_records(records)


def counted_cost(generations) -> Cost:
    """Return the cost of all generations together."""
    return reduce(add, (generation.cost for generation in generations))


def summarize(rows: pd.DataFrame, tokens: int) -> pd.DataFrame:
    """Return milliseconds per token, and ratios to plain decoding of the same round.

    Ratios (median, lowest, highest) are of time; counted token positions and FLOPs stand beside,
    and `reported` is as REPORTED.
    """
    records = []
    for (architecture, parameters, batch), part in rows.groupby(
        ["architecture", "parameters", "batch"], sort=False
    ):
        plain = part[part["method"] == "plain"].set_index("round")
        for method, own in part.groupby("method", sort=False):
            own = own.set_index("round")
            ratio = own["seconds"] / plain["seconds"]
            counted = {
                name: own[name].iloc[0] / plain[name].iloc[0] for name in ("positions", "flops")
            }
            records.append(
                {
                    "architecture": architecture,
                    "parameters": parameters,
                    "batch": batch,
                    "method": method,
                    "ms_per_token": 1000 * statistics.median(own["seconds"]) / (batch * tokens),
                    "time": ratio.median(),
                    "time_low": ratio.min(),
                    "time_high": ratio.max(),
                    "rounds": len(ratio),
                    **counted,
                    "reported": REPORTED.get(method),
                }
            )
    return pd.DataFrame.from_records(records).round(4)


def plot(table: pd.DataFrame, provenance: dict, folder: Path) -> list[Path]:
    """Draw a panel for each batch: time of every method as a multiple of plain decoding."""
    batches = list(dict.fromkeys(table["batch"]))
    names = list(dict.fromkeys(table["architecture"]))
    kinds = [method for method in dict.fromkeys(table["method"]) if method != "plain"]
    figure, axes = style.grid(1, len(batches), 1.1 * len(names), 2.6)
    width = 0.8 / len(kinds)
    shades = {kind: _colour(kind, kinds) for kind in kinds}
    for axis, batch in zip(axes[0], batches, strict=True):
        part = table[table["batch"] == batch].set_index(["architecture", "method"])
        for i, name in enumerate(names):
            for j, kind in enumerate(kinds):
                row = part.loc[(name, kind)]
                place = i + (j - (len(kinds) - 1) / 2) * width
                axis.bar(place, row["time"], width, color=shades[kind])
                axis.plot(
                    [place, place],
                    [row["time_low"], row["time_high"]],
                    color="#222222",
                    linewidth=0.9,
                )
                axis.plot(place, row["flops"], marker="_", color="#D00000", markersize=5)
                if pd.notna(row["reported"]):
                    axis.plot(place, row["reported"], marker="x", color="#888888", markersize=4)
        axis.axhline(1, color="#999999", linewidth=0.8)
        axis.set_xticks(range(len(names)), [name.replace("-", "\n", 1) for name in names])
        axis.set_title(f"batch of {batch}", loc="left")
    axes[0, 0].set_ylabel("time / plain decoding")
    handles = [
        style.plt.Rectangle((0, 0), 1, 1, color=shades[kind], label=kind.replace("sia", "SIA"))
        for kind in kinds
    ]
    handles.append(
        style.Line2D([], [], color="#D00000", marker="_", linestyle="none", label="FLOPs, counted")
    )
    handles.append(
        style.Line2D(
            [], [], color="#888888", marker="x", linestyle="none", label="reported accounting"
        )
    )
    size = "scaled down: there was no GPU" if provenance["scaled_down"] else "full size"
    settings = provenance["settings"]
    caption = (
        "Time per token as a multiple of model.generate, median and range of "
        f"{int(table['rounds'].max())} rounds, in turns. Random weights, {size}; language and "
        f"value model alike, K = {settings['candidates']}, prompts of {settings['prompt_tokens']} "
        f"and responses of {provenance['new_tokens']} tokens. {provenance['device']}."
    )
    return style.finish(figure, handles, caption, folder, "cost", stale=False, legend_columns=7)


def _colour(kind: str, kinds: list[str]) -> str:
    first = kind.split()[0]
    same = [other for other in kinds if other.split()[0] == first]
    return style.COLOURS[COLOURS[first]] if kind == same[0] else "#003B5C"


def run(fresh: bool) -> None:
    """Draw the table, measured first where there is none or `fresh`."""
    folder = tables.RESULTS / NAME
    where, there = f"results/{NAME}", (folder / "cost.json").exists()
    if there and not fresh:
        print(f"cost: drawing the table in {where}, nothing is measured (FRESH=1 measures again)")
    else:
        reason = "as FRESH=1 asks" if fresh else f"for {where} has no table of it"
        print(f"cost: measuring, {reason}")
        _measure_and_write(folder)
    provenance = read_json(folder / "cost.json")
    tables.check_files(folder, "cost", provenance)
    paths = plot(pd.read_csv(folder / "cost.csv"), provenance, tables.FIGURES / NAME)
    print(f"cost: {', '.join(str(path.relative_to(tables.ROOT)) for path in paths)}")


def _measure_and_write(folder: Path) -> None:
    start, settings = time.monotonic(), read_settings()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = settings.new_tokens if device == "cuda" else settings.new_tokens // 4
    if device == "cpu":
        print(
            "cost: there is no GPU; the architectures are scaled down, "
            f"and responses have {tokens} tokens"
        )
    with threads(available_cores()):
        rows = measure(settings, device, tokens)
    write_frame(folder / "cost.parquet", rows)
    write_text(folder / "cost.csv", summarize(rows, tokens).to_csv(index=False))
    provenance = {
        **tables.circumstances("benchmarks"),
        "code_digest": code_digest(MODELS),
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{available_cores()} cores",
        "scaled_down": device == "cpu",
        "new_tokens": tokens,
        "settings": vars(settings) | {"architectures": list(settings.architectures)},
        "wall_seconds": round(time.monotonic() - start, 1),
        "sha256": {name: tables.sha256(folder / name) for name in ("cost.csv", "cost.parquet")},
    }
    write_text(folder / "cost.json", json.dumps(provenance, indent=2, sort_keys=True) + "\n")
