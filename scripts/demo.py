r"""Steer one prompt in four ways, with the models of assets/lab: `make demo PROMPT="…"`.

All responses have the same random numbers. Underlined at a terminal, in [brackets] elsewhere: the
token was steered. Red, or with stars, [*like this*]: steering changed it. The lab's judge scores
each response, −5 to 5, where the prompt is about something that its world knows, and the mean of
further samples, for one says little.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from textwrap import fill

# before what takes seconds to import: from here on Ctrl-C prints no trace
from benchmarks.runtime.command_line import Parser, exit_code

# isort: split

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from scripts.compare import MARKS, styled_tokens
from scripts.lab_models import LabModels, item_of, plain, scores
from sia import Generation

PROMPT = "how do i bake a cake ?"
SAMPLES = 16
WIDTH = 100  # of lines where there is no terminal


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 for bad input, 130 when interrupted.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", default="", help=f"what to ask ({PROMPT})")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return exit_code(lambda: show(options.prompt.strip() or PROMPT, options.seed), "", "SAMPLES")


def show(prompt: str, seed: int) -> None:
    """Print the first of SAMPLES responses under each steering, with the judge's scores of all.

    Args:
        prompt: Text of the prompt.
        seed: Seed of the first response; the others count on from it.
    """
    disable_progress_bar()
    lab, console = LabModels.load(), Console(highlight=False)
    say = partial(console.print, markup=False, soft_wrap=not console.is_terminal)
    world, ids = lab.world, lab.encode([plain(prompt)]) * SAMPLES
    item = item_of(world, prompt)
    say(f"prompt: {prompt}")
    if item is None:
        topics = ", ".join(known.topic for known in world.items[:: max(1, len(world.items) // 8)])
        say(f"the lab's judge knows no such topic, ask about: {topics}")
    seeds = range(seed, seed + SAMPLES)
    for name, steering in lab.methods().items():
        responses = lab.respond(ids, steering, list(seeds))
        judge_scores = scores(world, item, responses) if item else []
        say(f"\n{name}: {description(responses, judge_scores)}", style="bold")
        say(highlighted(lab.tokenizer, responses[0], console.is_terminal))


def description(responses: Sequence[Generation], judge_scores: Sequence[float]) -> str:
    """Summarise the first response (length, share steered, tokens changed) and the judge scores."""
    response = responses[0]
    texts = [f"{len(response.token_ids)} tokens"]
    if response.steered.any():
        texts += [f"{response.intervention_ratio:.0%} steered", f"{response.shifted.sum()} changed"]
    if judge_scores:
        mean = f"mean of {len(judge_scores)}: {np.mean(judge_scores):+.1f}"
        texts.append(f"judge {judge_scores[0]:+.1f} ({mean})")
    return ", ".join(texts)


def highlighted(tokenizer: PreTrainedTokenizerBase, generation: Generation, styles: bool) -> Text:
    """Return a response whose steered tokens are highlighted by styles or brackets."""
    if styles:
        return Text.assemble(*styled_runs(tokenizer, generation))
    text = "".join(mark(text, style) for text, style in styled_runs(tokenizer, generation))
    return Text(fill(text, WIDTH, break_long_words=False))


def mark(text: str, style: str) -> str:
    """Return a text in the marks of its style, the space before it outside."""
    words = text.lstrip()
    return text[: len(text) - len(words)] + (MARKS[style].format(words) if words else "")


def styled_runs(
    tokenizer: PreTrainedTokenizerBase, generation: Generation
) -> Iterator[tuple[str, str]]:
    """Yield text and style of each run of tokens that have one style."""
    for style, tokens in groupby(styled_tokens(tokenizer, generation), key=lambda token: token[2]):
        yield "".join(space + word for space, word, _ in tokens), style


if __name__ == "__main__":
    sys.exit(main())
