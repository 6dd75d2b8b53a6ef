r"""Show the base model's answer and the steered one side by side, as they are generated.

python scripts/compare.py                       (the lab's models, in assets/lab)
python scripts/compare.py --model Qwen/Qwen3-1.7B-Base \
    --value-model Runyi-Hu/SIA --subfolder VM-Qwen3-1.7B-Base \
    --backbone Qwen/Qwen3-1.7B-Base --threshold 1.0 --beta 1.0

Underlined: the gate was open and the token was steered. Red: steering changed the token, under the
same random numbers. In a pipe the two answers follow each other, and steered tokens stand in
brackets, changed ones with stars: [steered], [*changed*].
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

# before what takes seconds to import: from here on Ctrl-C prints no trace
from benchmarks.runtime.command_line import Parser, exit_code, require_counts

# isort: split

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks.spec.profile import Source
from benchmarks.subjects.hub.models import (
    chat_ids,
    choose_device,
    device_map,
    fetch,
    place,
    tokenizer_of,
)
from benchmarks.subjects.hub.prompts import Chat, chat_of, plain_text
from scripts.lab_models import LabModels
from sia import EntropyGate, Gate, Generation, JunctionGate, QHead, Scorer, Steering, ValueModel
from sia.batch import start_decoding
from sia.scorers.loading import load_complete

STEERED, SHIFTED = "underline", "underline bold red"
MARKS = {"": "{}", STEERED: "[{}]", SHIFTED: "[*{}*]"}  # where there are no styles


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 for bad input, 130 when interrupted.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--threshold", type=float, help="steer from this entropy on (nats; 1.0)")
    add("--junction-gate", help="folder or Hub id of a junction gate, in place of the threshold")
    add("--q-head", help="folder or Hub id of a Q-head, in place of the value model's values")
    add("--beta", type=float, default=4.0, help="strength; inf: values alone (4.0)")
    add("--candidates", type=int, default=10, help="tokens to choose from (10)")
    add("--max-new-tokens", type=int, default=80)
    add("--temperature", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--prompt", help="answer this prompt and exit; otherwise prompts are read one by one")
    options = parser.parse_args(arguments)
    return exit_code(lambda: answer(options), "", "--max-new-tokens, or smaller models")


def answer(options: argparse.Namespace) -> None:
    """Answer the prompt, or prompts that are read one by one."""
    require_counts(options, "candidates", "max_new_tokens")
    console = Console()
    if options.junction_gate and options.threshold is not None:
        raise ValueError("--junction-gate stands in place of --threshold, got both")
    model, tokenizer, value_model, value_tokenizer = load(options)
    gate: Gate = EntropyGate(1.0 if options.threshold is None else options.threshold)
    if options.junction_gate:
        gate = JunctionGate.from_pretrained(options.junction_gate)
    scorer: Scorer = value_model
    if options.q_head:
        scorer = QHead.from_pretrained(options.q_head, device=model.device)
    steering = Steering(scorer, gate, options.beta, candidates=options.candidates)
    for prompt in read_prompts(console) if options.prompt is None else [options.prompt]:
        compare(console, model, tokenizer, steering, value_tokenizer, prompt, options)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load` reads."""
    add = parser.add_argument
    add("--model", help="Hub id or folder of the language model (default: the lab's)")
    add("--value-model", help="Hub id or folder of a value model for it")
    add("--subfolder", default="", help="of the value model")
    add("--backbone", default="", help="of the value model, if it does not name its own")
    add("--chat", action="store_true", help="use the model's chat template (lab models always do)")


def load(
    options: argparse.Namespace,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ValueModel, PreTrainedTokenizerBase]:
    """Return language model and tokenizer, value model and its tokenizer.

    Raises:
        ValueError: If one of the two models is missing, or is only described.
        FileNotFoundError: If the lab's models are not there.
    """
    disable_progress_bar()
    if bool(options.model) != bool(options.value_model):
        raise ValueError(
            "--model and --value-model go together: name both, or neither for the lab's"
        )
    if not options.model:
        if options.subfolder or options.backbone:
            raise ValueError("--subfolder and --backbone belong to --value-model: name it, too")
        options.chat = True
        lab = LabModels.load()
        return lab.model, lab.tokenizer, lab.values, lab.tokenizer
    device, dtype = choose_device()
    kwargs = {"dtype": dtype, "device_map": device_map(device)}
    source = fetch(Source(options.model))
    values = fetch(Source(options.value_model, "main", options.subfolder, options.backbone))
    name, location = place(source)
    model = load_complete(AutoModelForCausalLM, name, "language model", location | kwargs).eval()
    name, location = place(values)
    value_model = ValueModel.from_pretrained(name, options.backbone or None, **location, **kwargs)
    return model, tokenizer_of(source), value_model, tokenizer_of(values)


def model_prompts(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], template: bool
) -> list[list[int]]:
    """Return prompts of the language model, in its chat template or as plain texts."""
    if template:
        return chat_ids(tokenizer, chats, enable_thinking=False)
    return tokenizer([plain_text(chat) for chat in chats]).input_ids


def read_prompts(console: Console) -> Iterator[str]:
    """Yield prompts until an empty one or the end of input."""
    if not sys.stdin.isatty():
        yield from takewhile(str.strip, sys.stdin)
        return
    try:
        while prompt := console.input("[bold]prompt[/bold] (empty to exit): ").strip():
            yield prompt
    except EOFError:
        console.print()


def compare(
    console: Console,
    model,
    tokenizer,
    steering: Steering,
    value_tokenizer,
    prompt: str,
    options: argparse.Namespace,
) -> None:
    """Generate the two answers to `prompt` in turns, and show them as they grow."""
    chat = chat_of(prompt)
    ids = model_prompts(tokenizer, [chat], options.chat)
    limits = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
    value_ids = chat_ids(value_tokenizer, [chat])
    policies: list[dict[str, Any]] = [{"candidates": options.candidates}, {"steering": steering}]
    decodings = [
        start_decoding(model, tokenizer, ids, value_ids, [0], [options.seed], **limits, **policy)
        for policy in policies
    ]
    if not console.is_terminal:
        for decoding in decodings:
            decoding.run(options.max_new_tokens)
        answers = [decoding.generations(tokenizer)[0] for decoding in decodings]
        print(one_after_the_other(tokenizer, answers))
        return
    with Live(console=console, refresh_per_second=12) as live:
        while any(len(decoding.active_rows) for decoding in decodings):
            for decoding in decodings:
                if len(decoding.active_rows):
                    decoding.run(1)
            answers = [decoding.generations(tokenizer)[0] for decoding in decodings]
            live.update(side_by_side(tokenizer, answers, console.width))


def side_by_side(
    tokenizer: PreTrainedTokenizerBase, generations: list[Generation], width: int
) -> Columns:
    """Return both answers as panels, side by side, each with its caption as the last line.

    Args:
        tokenizer: Tokenizer of the language model.
        generations: Generations of `POLICIES`, in their order.
        width: Width of the console, in columns.
    """
    panels = []
    for title, subtitle, generation in captioned(generations):
        text = Text()
        for space, word, style in styled_tokens(tokenizer, generation):
            text.append(space)
            text.append(word, style=style)
        text.append(f"\n\n{subtitle}", style="dim")  # Panel cuts a subtitle that is too long
        panels.append(Panel(text, title=title, width=max(20, width // 2 - 1)))
    return Columns(panels, padding=0)


def one_after_the_other(tokenizer: PreTrainedTokenizerBase, generations: list[Generation]) -> str:
    """Return both answers as plain text, their tokens marked by MARKS."""
    paragraphs = []
    for title, subtitle, generation in captioned(generations):
        words = styled_tokens(tokenizer, generation)
        text = "".join(space + MARKS[style].format(word) for space, word, style in words)
        paragraphs.append(f"{title} ({subtitle}):\n{text}\n")
    return "\n".join(paragraphs)


def captioned(generations: list[Generation]) -> list[tuple[str, str, Generation]]:
    """Return title, caption (length, intervention ratio, KL) and answer of each policy."""
    base, steered = generations
    ratio = 0.0 if math.isnan(steered.intervention_ratio) else steered.intervention_ratio
    note = (
        f"{len(steered.token_ids)} tokens, {ratio:.0%} steered,"
        f" {int(steered.shifted.sum())} changed, KL {float(steered.kl.sum()):.2f} nats"
    )
    return [("base", f"{len(base.token_ids)} tokens", base), ("steered", note, steered)]


def styled_tokens(
    tokenizer: PreTrainedTokenizerBase, generation: Generation
) -> Iterator[tuple[str, str, str]]:
    """Yield the text that each token adds: its leading white space, the rest, and a style.

    The texts together are the decoded response. A token may complete a character, or remove the
    space before it, so a token adds what is part of the response only with it.
    """
    prefixes = [
        tokenizer.decode(generation.token_ids[: i + 1], skip_special_tokens=True)
        for i in range(len(generation.token_ids))
    ]
    response, shown = "".join(prefixes[-1:]), 0
    for i, prefix in enumerate(prefixes):
        end = shown
        while prefix[end : end + 1] == response[end : end + 1] != "":
            end += 1
        added = response[shown:end]
        style = SHIFTED if generation.shifted[i] else STEERED if generation.steered[i] else ""
        word = added.lstrip() or added  # white space alone is marked, too
        yield added[: len(added) - len(word)], word, style if added else ""
        shown = end


if __name__ == "__main__":
    sys.exit(main())
