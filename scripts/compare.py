"""Type a prompt and see the base model's answer and the steered one side by side, as they are made; junctions are highlighted.

python scripts/compare.py                                   (the lab's models, after make models or make smoke)
python scripts/compare.py --model Qwen/Qwen3-1.7B-Base --value-model Runyi-Hu/SIA --subfolder VM-Qwen3-1.7B-Base \\
    --backbone Qwen/Qwen3-1.7B-Base --threshold 1.0 --beta 1.0

Underlined: the gate was open there, the token was steered. Red: steering changed the token, under the same noise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks.runtime.command_line import Parser
from benchmarks.runtime.files import CACHE
from benchmarks.spec.profile import Source
from benchmarks.subjects.hub.models import chat_ids, choose_device, fetch, place, tokenizer_of
from benchmarks.subjects.hub.prompts import plain_text, question
from sia import EntropyGate, Generation, Never, Steering, ValueModel
from sia.batch import begin, check_options

LAB = [CACHE / name / "models" / "replicate0" for name in ("lab", "smoke")]
STEERED, SHIFTED = "underline", "underline bold red"


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="Hub id or folder of the language model (default: the lab's)"
    )
    parser.add_argument("--value-model", help="Hub id or folder of a value model for it")
    parser.add_argument("--subfolder", default="", help="of the value model")
    parser.add_argument(
        "--backbone",
        default="",
        help="of a value model in the published layout, where it does not name it",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=1.0,
        help="entropy, in nats, from which on a token is steered (default: 1.0)",
    )
    parser.add_argument(
        "--beta", type=float, default=4.0, help="strength; inf: values alone (default: 4.0)"
    )
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chat",
        action="store_true",
        help="use the model's chat template (always that of lab models)",
    )
    parser.add_argument(
        "--prompt", help="answer this one and leave; otherwise prompts are asked for"
    )
    options = parser.parse_args(arguments)
    console = Console()
    try:
        model, tokenizer, value_model, value_tokenizer = load(options)
        steering = Steering(
            value_model, EntropyGate(options.threshold), options.beta, options.candidates
        )
        for prompt in [options.prompt] if options.prompt is not None else ask(console):
            compare(console, model, tokenizer, steering, value_tokenizer, prompt, options)
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, EOFError):
        console.print()
    return 0


def load(
    options: argparse.Namespace,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ValueModel, PreTrainedTokenizerBase]:
    """Language model, value model, and the tokenizer of each."""
    disable_progress_bar()
    if bool(options.model) != bool(options.value_model):
        raise ValueError(
            "--model and --value-model go together: name both, or neither for the lab's"
        )
    if not options.model:
        folder = next((folder for folder in LAB if (folder / "qwen3-value-token").exists()), None)
        if folder is None:
            raise FileNotFoundError(
                f"there are no lab models yet in {' or '.join(map(str, LAB))}: make smoke, or make models, trains them"
            )
        options.chat = True
        model = AutoModelForCausalLM.from_pretrained(folder / "qwen3-base").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / "qwen3-base")
        return model, tokenizer, ValueModel.from_pretrained(folder / "qwen3-value-token"), tokenizer
    device, dtype = choose_device()
    how = {"dtype": dtype, "device_map": device}
    source, values = (
        fetch(Source(options.model)),
        fetch(Source(options.value_model, "main", options.subfolder, options.backbone)),
    )
    name, where = place(source)
    model = AutoModelForCausalLM.from_pretrained(name, **where, **how).eval()
    name, where = place(values)
    value_model = ValueModel.from_pretrained(name, options.backbone or None, **where, **how)
    return model, tokenizer_of(source), value_model, tokenizer_of(values)


def ask(console: Console) -> Iterator[str]:
    """Prompts, until there is none."""
    while prompt := console.input("[bold]prompt[/bold] (empty to leave): ").strip():
        yield prompt


def compare(
    console: Console,
    model,
    tokenizer,
    steering: Steering,
    value_tokenizer,
    prompt: str,
    options: argparse.Namespace,
) -> None:
    chat = question(prompt)
    if not chat:
        raise ValueError("a prompt needs at least one character, got an empty one")
    check_options([prompt], options.temperature, max_new_tokens=options.max_new_tokens)
    if options.chat:
        (ids,) = chat_ids(tokenizer, [chat], enable_thinking=False)
    else:
        ids = tokenizer(plain_text(chat)).input_ids
    (value_ids,) = chat_ids(value_tokenizer, [chat])
    both = [
        begin(
            model,
            tokenizer,
            [ids],
            [value_ids],
            [0],
            how,
            options.max_new_tokens,
            options.temperature,
            [options.seed],
        )
        for how in (Steering(None, Never(), candidates=options.candidates), steering)
    ]
    with Live(console=console, refresh_per_second=12) as live:
        while any(len(decoding.going) for decoding in both):
            for decoding in both:
                if len(decoding.going):
                    decoding.run(1)
            live.update(
                side_by_side(
                    tokenizer,
                    [decoding.generations(tokenizer)[0] for decoding in both],
                    console.width,
                )
            )


def side_by_side(
    tokenizer: PreTrainedTokenizerBase, generations: list[Generation], width: int
) -> Columns:
    """Base and steered answer, with what they took below."""
    panels = []
    for title, generation in zip(("base", "steered"), generations, strict=True):
        ratio = 0.0 if math.isnan(generation.intervention_ratio) else generation.intervention_ratio
        kl = float(generation.kl.sum())
        note = f"{len(generation.token_ids)} tokens"
        if title == "steered":
            note += (
                f", {ratio:.0%} steered, {int(generation.shifted.sum())} changed, KL {kl:.2f} nats"
            )
        panels.append(
            Panel(
                highlighted(tokenizer, generation),
                title=title,
                subtitle=note,
                width=max(20, width // 2 - 1),
            )
        )
    return Columns(panels, padding=0)


def highlighted(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> Text:
    """The text, token by token: each is what it adds to the text before it."""
    text, said = Text(), ""
    for i in range(len(generation.token_ids)):
        whole = tokenizer.decode(generation.token_ids[: i + 1], skip_special_tokens=True)
        added = whole[len(said) :].rstrip("\ufffd")
        style = SHIFTED if generation.shifted[i] else STEERED if generation.steered[i] else ""
        lead = added[: len(added) - len(added.lstrip())]
        text.append(lead)
        text.append(added[len(lead) :], style=style)
        said = whole.rstrip("\ufffd")  # of a character that is not complete yet
    return text


if __name__ == "__main__":
    sys.exit(main())
