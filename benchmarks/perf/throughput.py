"""Throughput against batch size, share of steered tokens and scorer.

`make throughput` writes results/throughput.csv, figures/throughput.png and docs/throughput.md.
In a large batch nearly every step has a row at a junction. How much of the gain of sparsity is left
there depends on how the scorer reads: rows beside each other, or one plain pass. Tokens per second
are multiples of those of plain decoding by the same loop, taken in turns within one process. The
models have random weights, the gate steers tokens at random.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from benchmarks.analysis.tables import RESULTS
from benchmarks.perf.random_models import (
    Models,
    random_models,
    random_q_head,
    random_vocabulary_value_model,
    sia_run,
)
from benchmarks.perf.speed import SMALL
from benchmarks.perf.timing import in_turns, ratios, write_provenance
from benchmarks.runtime.command_line import Parser
from benchmarks.runtime.files import read_json, write_atomically, write_text
from benchmarks.runtime.fingerprints import ROOT
from benchmarks.runtime.workers import available_cores
from sia import RandomGate, Scorer, Steering

BATCHES = (1, 4, 16, 64)
SHARES = (0.0, 0.1, 0.2, 0.4, 1.0)
TOKENS = 64
ROUNDS = 5
FIGURE = ROOT / "figures" / "throughput.png"
PAGE = ROOT / "docs" / "throughput.md"
SPARSE = 0.2  # share whose gain over dense steering the page states
TEXT = """# Throughput in batches

Written by `make throughput` from `results/throughput.csv`; not edited by hand. Tokens per second as
multiples of those of plain decoding by `sia.generate`, measured in turns within one process: the
median of {runs} rounds, {tokens} new tokens. The models have random weights (`{model}`), the gate
steers tokens at random, {threads} CPU threads, float32.

![Throughput against batch size](../figures/throughput.png)

A step of a batch costs a pass of the scorer as soon as one row is at a junction. The gain of
sparsity is the throughput with {sparse:.0%} of the tokens steered over that with all of them. Where
it is below 1, rows that lag behind by different numbers of tokens cost more, padded to the longest,
than a pass of all rows at every step:

{gains}

All numbers:

{table}
"""


def throughput_rows(
    models: Models,
    rounds: int,
    batches: Sequence[int] = BATCHES,
    shares: Sequence[float] = SHARES,
    tokens: int = TOKENS,
) -> list[dict[str, object]]:
    """Return a row for each batch size, scorer and share."""
    assert models.value is not None
    scorers: dict[str, Scorer] = {
        "value model": models.value,
        "vocabulary head": random_vocabulary_value_model(models),
        "Q-head": random_q_head(models),
    }
    rows = []
    for batch in batches:
        runs = {("", 0.0): sia_run(models, batch, tokens, None)}
        runs |= {
            (name, share): sia_run(models, batch, tokens, Steering(scorer, RandomGate(share)))
            for name, scorer in scorers.items()
            for share in shares
        }
        times = in_turns(runs, models.device, rounds, f"batch of {batch}")
        plain = times.pop(("", 0.0))
        for (name, share), seconds in times.items():
            relative = ratios(seconds, plain)  # of speeds: every run decodes as many tokens
            rows.append(
                {
                    "model": models.name,
                    "batch": batch,
                    "new_tokens": tokens,
                    "scorer": name,
                    "share": share,
                    "estimate": round(statistics.median(relative), 3),
                    "low": round(min(relative), 3),
                    "high": round(max(relative), 3),
                    "plain_tokens_per_second": round(batch * tokens / statistics.median(plain)),
                    "runs": rounds,
                }
            )
    return rows


def draw(table: pd.DataFrame) -> Figure:
    """Draw throughput against batch size, a panel for each scorer."""
    scorers = table["scorer"].unique()
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    panels = figure.subplots(1, len(scorers), sharey=True)
    data = table.assign(share=table["share"].map("{:.0%}".format), batch=table["batch"].astype(str))
    for axes, scorer in zip(panels, scorers, strict=True):
        of_scorer = data[data["scorer"] == scorer]
        last = scorer == scorers[-1]
        sns.lineplot(
            of_scorer, x="batch", y="estimate", hue="share", style="share", markers=True,
            dashes=False, palette="viridis", legend=last, ax=axes,
        )  # fmt: skip
        spread = of_scorer[["low", "high"]].sub(of_scorer["estimate"], axis=0).abs().T
        axes.errorbar(
            of_scorer["batch"], of_scorer["estimate"], spread, fmt="none", ecolor="0.7",
            elinewidth=0.8, zorder=0,
        )  # fmt: skip
        axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
        axes.set(title=scorer, xlabel="responses in a batch", ylim=(0, None))
        axes.set_ylabel("tokens per second,\nmultiple of plain decoding")
    panels[-1].legend(title="steered", frameon=False, loc="lower left", fontsize=7)
    runs = table["runs"].max()
    figure.supxlabel(f"median of {runs} rounds; bars: their range", fontsize=7, color="0.4")
    return figure


def page(table: pd.DataFrame, provenance: Mapping[str, Any]) -> str:
    """Return docs/throughput.md: how it was measured, the gain of sparsity, and the table."""
    numbers = table.pivot_table("estimate", ["scorer", "share"], "batch", sort=False)
    numbers.columns = [f"batch of {batch}" for batch in numbers.columns]
    gains = numbers.xs(SPARSE, level="share") / numbers.xs(1.0, level="share")
    shown = numbers.rename(index="{:.0%}".format, level="share").reset_index()
    return TEXT.format(
        runs=table["runs"].max(),
        tokens=table["new_tokens"].max(),
        model=table["model"].iloc[0],
        threads=provenance["threads"],
        sparse=SPARSE,
        gains=gains.reset_index().to_markdown(index=False, floatfmt=".2f"),
        table=shown.to_markdown(index=False, floatfmt=".2f"),
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the table and draw it; return the exit code."""
    parser = Parser(
        prog="python -m benchmarks.perf.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=int, default=ROUNDS, help=f"counted rounds ({ROUNDS})")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        print(f"error: runs must be at least 1, got {options.runs}", file=sys.stderr)
        return 2
    torch.set_num_threads(available_cores())
    start, path = time.monotonic(), RESULTS / "throughput.csv"
    table = pd.DataFrame(throughput_rows(random_models(SMALL), options.runs))
    write_text(path, table.to_csv(index=False))
    write_provenance("benchmarks.perf.throughput", start, [path], threads=torch.get_num_threads())

    def save(file: Path) -> None:
        draw(table).savefig(file, dpi=200, format="png")

    write_atomically(FIGURE, save)
    text = page(table, read_json(path.with_suffix(".json")))
    write_text(PAGE, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
