r"""Fit a gate that predicts where steering matters, and say what it captures on held-out prompts.

python scripts/fit_junction_gate.py --output my-gate      (the lab's models, in assets/lab)
python scripts/fit_junction_gate.py --model Qwen/Qwen3-1.7B-Base \
    --value-model Runyi-Hu/SIA --subfolder VM-Qwen3-1.7B-Base \
    --backbone Qwen/Qwen3-1.7B-Base --prompts wildguardmix --limit 1000 --output my-gate

OUTPUT becomes a folder that `JunctionGate.from_pretrained` reads; beside the gate it holds
captured.csv and captured.png: the share of the divergence KL(π‖π*) in the top share of the steps,
by this gate, by entropy, at random and by the oracle. With --q-head it also holds a head that gives
the values without the value model, which `QHead.from_pretrained` reads.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# before what takes seconds to import: from here on Ctrl-C prints no trace
from benchmarks.runtime.command_line import (
    Parser,
    exit_code,
    path,
    require,
    require_counts,
    require_new,
)

# isort: split

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from benchmarks.runtime.files import write_atomically, write_text
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.hub.models import chat_ids
from benchmarks.subjects.hub.prompts import Chat, load_prompts, question
from benchmarks.subjects.lab.replicate import Replicate
from scripts.compare import add_model_arguments, load, model_prompts
from sia.fitting import Ranking, check_share, train_junction_gate, train_q_head
from sia.states import collect_states

LAB_PROMPTS = 300


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 for bad input, 130 when interrupted.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--prompts", help="name of a prompt set, or NAME=FILE for a local copy")
    add("--limit", type=int, default=LAB_PROMPTS, help=f"number of prompts ({LAB_PROMPTS})")
    add("--output", required=True, type=path, help="folder to write")
    add("--share", type=float, default=0.2, help="share of the steps to steer (0.2)")
    add("--beta", type=float, default=1.0, help="strength of the steering (1.0)")
    add("--candidates", type=int, default=10, help="tokens to choose from (10)")
    add("--max-new-tokens", type=int, default=128)
    add("--batch-size", type=int, default=64, help="responses decoded together (64)")
    add("--seed", type=int, default=0)
    add("--q-head", action="store_true", help="also fit values without the value model")
    options = parser.parse_args(arguments)
    return exit_code(lambda: fit(options), "nothing was written", "--batch-size")


def fit(options: argparse.Namespace) -> None:
    """Fit the gate and, if requested, the Q-head, and write the folder.

    Raises:
        ValueError: For an option, a model or prompts that cannot be used.
    """
    require_new(options.output)
    require(options, lambda count: count >= 5, "at least 5 prompts", "limit")
    counts = "candidates", "max_new_tokens", "batch_size"
    require_counts(options, *counts)
    if bool(options.model) != bool(options.prompts):
        raise ValueError("--model and --prompts go together: name both, or neither for the lab's")
    model, tokenizer, value_model, value_tokenizer = load(options)
    chats = prompts_of(options)
    settings = {
        "beta": options.beta,
        "candidates": options.candidates,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "value_prompts": chat_ids(value_tokenizer, chats),
    }
    check_share(options.share)
    prompts = model_prompts(tokenizer, chats, options.chat)
    states = collect_states(model, tokenizer, value_model, prompts, **settings)
    training = {"beta": options.beta, "seed": options.seed}
    gate = train_junction_gate(model, value_model, states, share=options.share, **training)
    rows = report("", gate.rankings)
    head = None
    if options.q_head:
        head = train_q_head(model, value_model, states, **training)
        rows += report("Q-head", [r for r in head.rankings if r.name == "head"])
    table = pd.DataFrame(rows)

    def write(folder: Path) -> None:
        gate.gate.save_pretrained(folder)
        if head is not None:
            head.scorer.save_pretrained(folder)
        write_text(folder / "captured.csv", table.to_csv(index=False))
        draw(table, gate.states[1]).savefig(folder / "captured.png", dpi=200)

    write_atomically(options.output, write)
    print(table.pivot(index="score", columns="share", values="captured").round(3).to_string())
    print(f"threshold {gate.gate.threshold:.4g} nats; fitted to {gate.states[0]} states, "
          f"held out {gate.states[1]}")  # fmt: skip
    if head is not None:
        print(f"the Q-head explains {head.explained:.1%} of the variance of the values")
    print(f"written to {options.output}")


def prompts_of(options: argparse.Namespace) -> list[Chat]:
    """Return prompts as chats, from the named prompt set or evenly from the lab's for training."""
    if options.prompts:
        return list(load_prompts(options.prompts).chats[: options.limit])
    replicate = Replicate.open(load_profile("lab"), 0)
    prompts = replicate.prompts["training"]
    count = min(options.limit, len(prompts))
    return [question(prompts[i * len(prompts) // count].text) for i in range(count)]


def report(name: str, rankings: Sequence[Ranking]) -> list[dict]:
    """Return a row for each score and share."""
    return [
        {
            "score": name or ranking.name,
            "share": share,
            "captured": captured,
            "auroc": ranking.auroc,
        }
        for ranking in rankings
        for share, captured in ranking.captured.items()
    ]


def draw(table: pd.DataFrame, states: int) -> Figure:
    """Draw the captured share against the share of the steps."""
    figure = Figure(figsize=(3.4, 2.8), layout="constrained")
    axes = figure.subplots()
    sns.lineplot(table, x="share", y="captured", hue="score", style="score", markers=True, ax=axes)
    axes.set(
        xlabel="share of the steps that are steered",
        ylabel="captured share of Σ KL(π‖π*)",
        ylim=(0, 1.02),
        title=f"held-out prompts, n = {states} steps",
    )
    axes.legend(title=None, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
