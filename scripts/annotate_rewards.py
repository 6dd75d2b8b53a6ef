"""Scores prompts with their responses by a trajectory reward model: what value models are trained from.

python scripts/annotate_rewards.py --data wildguardmix --reward Skywork/Skywork-Reward-V2-Qwen3-8B --output harmlessness.jsonl

Writes a JSON line for each example: prompt (a chat), response, reward. An interrupted run goes on where it was: what is done lies in
OUTPUT.part, which becomes OUTPUT at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.runtime.command_line import Parser, exit_code
from benchmarks.spec.profile import Source
from benchmarks.subjects.hub.examples import EXAMPLE_SETS, load_examples
from benchmarks.subjects.hub.models import chat_ids, choose_device, fetch, place, tokenizer_of
from benchmarks.subjects.lab.models import trajectory_rewards
from sia import RewardScorer

WINDOW = 256  # examples that are tokenised, scored and written together


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help=f"{', '.join(EXAMPLE_SETS)}, or NAME=FILE for a local copy"
    )
    parser.add_argument("--reward", required=True, help="Hub id or folder of the reward model")
    parser.add_argument("--revision", default="main", help="of the reward model (default: main)")
    parser.add_argument("--output", required=True, type=Path, help="JSON lines to write")
    parser.add_argument(
        "--longest",
        type=int,
        default=2048,
        help="tokens; longer examples are left out, and counted (default: 2048)",
    )
    parser.add_argument("--limit", type=int, help="only the first so many examples")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="", help="cpu or cuda (default: what there is)"
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: annotate(options), "what was scored is kept")


def annotate(options: argparse.Namespace) -> None:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    device, dtype = choose_device(options.device)
    if options.output.exists():
        raise ValueError(f"{options.output} is there already: name another output, or delete it")
    disable_progress_bar()
    examples = load_examples(options.data)[: options.limit]
    source = fetch(Source(options.reward, options.revision))
    settings = {
        "data": options.data,
        "reward": options.reward,
        "revision": source.revision,
        "longest": options.longest,
    }
    settings |= {"examples": len(examples)}
    part = options.output.with_name(options.output.name + ".part")
    begun = begin(part, settings)
    name, where = place(source)
    tokenizer = tokenizer_of(source)
    model = RewardScorer.from_pretrained(
        name, tokenizer.eos_token_id, dtype=dtype, device_map=device, **where
    ).model
    if "score" not in dict(model.named_children()):
        raise ValueError(
            f"{options.reward} must be a decoder with a linear score head, got {type(model).__name__}"
        )
    with (
        part.open("a", encoding="utf-8") as file,
        tqdm(total=len(examples), initial=begun, desc="rewards", unit="example") as bar,
    ):
        for start in range(begun, len(examples), WINDOW):
            window = examples[start : start + WINDOW]
            chats = (
                [*chat, {"role": "assistant", "content": response}] for chat, response in window
            )
            ids = chat_ids(tokenizer, chats, answered=True)
            short = [i for i in range(len(window)) if len(ids[i]) <= options.longest]
            rewards = dict(
                zip(short, trajectory_rewards(model, [ids[i] for i in short]).tolist(), strict=True)
            )
            for i, (chat, response) in enumerate(window):
                example = {"prompt": list(chat), "response": response, "reward": rewards.get(i)}
                file.write(json.dumps(example, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(window))
    left_out = finish(part, options.output)
    print(
        f"{options.output}: {len(examples) - left_out} examples, {left_out} left out with more than {options.longest} tokens"
    )


def begin(part: Path, settings: dict) -> int:
    """How many examples are done: the whole lines behind the first, which holds the settings. A line that was cut off goes.

    Errors: ValueError if it was begun with other settings.
    """
    if not part.exists():
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return 0
    content = part.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if lines and json.loads(lines[0]) != settings:
        raise ValueError(
            f"{part} was begun with other settings, {lines[0].decode()}: delete it, or name another output"
        )
    if not lines:
        part.unlink()
        return begin(part, settings)
    if len(whole) < len(content):
        os.truncate(part, len(whole))
    return len(lines) - 1


def finish(part: Path, output: Path) -> int:
    """Writes the output from what was done, whole or not at all; returns how many examples had no reward."""
    unfinished = output.with_name(f".{output.name}")
    left_out = 0
    with part.open(encoding="utf-8") as done, unfinished.open("w", encoding="utf-8") as file:
        next(done)
        for line in done:
            if json.loads(line)["reward"] is None:
                left_out += 1
            else:
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(output)
    part.unlink()
    return left_out


if __name__ == "__main__":
    sys.exit(main())
