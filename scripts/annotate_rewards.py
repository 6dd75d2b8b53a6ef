r"""Score responses to prompts with a trajectory reward model: the data of value models.

python scripts/annotate_rewards.py --data wildguardmix \
    --reward Skywork/Skywork-Reward-V2-Qwen3-8B --output harmlessness.jsonl

Writes a JSON line for each example: prompt (a chat), response, reward. It runs on every GPU, with
--executor ray on those of the cluster at RAY_ADDRESS; the file does not depend on their number. An
interrupted run resumes: finished examples are in OUTPUT.part, which becomes OUTPUT at the end.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.runtime.command_line import (
    RESUMES,
    Parser,
    exit_code,
    path,
    require_counts,
    require_new,
)
from benchmarks.runtime.files import working_alone, write_text
from benchmarks.runtime.fingerprints import file_states
from benchmarks.runtime.workers import ThisProcess, Workers, load_ray_workers
from benchmarks.spec.profile import Source, digest
from benchmarks.subjects.hub.prompts import EXAMPLE_SETS, load_examples

if TYPE_CHECKING:  # a worker imports this file before it knows its GPU, and torch asks at once
    from benchmarks.subjects.hub.annotation import Window

LONGEST_HELP = "tokens; longer examples are left out, and counted (2048, or the model's positions)"
BATCH_HELP = "tokens of a forward pass (default: 32768 on a GPU, else 2048)"
WINDOW = 256  # examples that a worker tokenises and scores, and that are written together


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 for bad input, 130 when interrupted.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help=f"{', '.join(EXAMPLE_SETS)}, or NAME=FILE for a local copy")
    add("--reward", required=True, help="Hub id or folder of the reward model")
    add("--revision", default="main", help="of the reward model (default: main)")
    add("--output", required=True, type=path, help="JSON lines to write")
    add("--longest", type=int, default=2048, help=LONGEST_HELP)
    add("--limit", type=int, help="only the first so many examples")
    add("--batch-tokens", type=int, help=BATCH_HELP)
    add("--device", choices=("cpu", "cuda"), default="", help="default: cuda if available")
    add("--executor", choices=("local", "ray"), default="local", help="ray: at RAY_ADDRESS")
    options = parser.parse_args(arguments)
    return exit_code(
        lambda: annotate(options), f"what was scored is kept, {RESUMES}", "--batch-tokens"
    )


def annotate(options: argparse.Namespace) -> None:
    """Annotate, unless another run does so for the same output.

    Raises:
        ValueError: As `score_examples` does; also for an output that cannot be used.
    """
    require_counts(options, "longest", "limit", "batch_tokens")
    require_new(options.output)
    with working_alone(options.output):
        score_examples(options)


def score_examples(options: argparse.Namespace) -> None:
    """Score every example and write those that are not too long.

    Raises:
        ValueError: For an option or a reward model that cannot be used, an output that was begun
            with other settings, or if no example can be scored.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.subjects.hub.annotation import REFUSED, TOO_LONG, Window, score_window
    from benchmarks.subjects.hub.models import (
        check_reward_model,
        choose_device,
        config_of,
        fetch,
        require_template,
        tokenizer_of,
    )
    from benchmarks.subjects.scoring import positions_at_once
    from sia._kv_cache import position_count

    gpus = load_ray_workers().gpus() if options.executor == "ray" else None
    device, dtype = choose_device(options.device, gpus=gpus)
    disable_progress_bar()
    examples = load_examples(options.data)[: options.limit]
    source = fetch(Source(options.reward, options.revision))
    longest = min(options.longest, position_count(config_of(source)) or options.longest)
    batch_tokens = options.batch_tokens or positions_at_once(torch.device(device))
    settings = {
        "data": options.data,
        "content": digest(examples, file_states([Path(source.id)])),  # of a local model, too
        "reward": options.reward,
        "revision": source.revision,
        "longest": longest,
        "examples": len(examples),
        "batch_tokens": batch_tokens,
        "dtype": dtype,
    }
    partial = options.output.with_name(options.output.name + ".part")
    completed = finished_examples(partial, settings)
    require_template(tokenizer_of(source))
    check_reward_model(source)
    if longest < options.longest:
        print(f"{options.reward} has positions for {longest} tokens, no longer ones are scored")
    windows = [
        Window(
            number,
            examples[first : first + WINDOW],
            source,
            device,
            dtype,
            longest,
            batch_tokens,
        )
        for number, first in enumerate(range(completed, len(examples), WINDOW))
    ]
    write = OrderedWriter(partial, "" if completed else head_line(settings))
    with (
        workers_for(options.executor, device) as workers,
        workers.progress(len(examples) - completed),
    ):
        workers.run(score_window, windows, description="rewards", on_result=write)
    with partial.open(encoding="utf-8") as file:
        _, *lines = file
    rewards = [json.loads(line)["reward"] for line in lines]
    scored = [
        line for line, reward in zip(lines, rewards, strict=True) if isinstance(reward, float)
    ]
    refused = rewards.count(REFUSED)
    left_out = f"{rewards.count(TOO_LONG)} left out with more than {longest} tokens" + (
        f", {refused} that the chat template refuses" if refused else ""
    )
    if scored:
        write_text(options.output, "".join(scored))
    partial.unlink()
    if not scored:
        raise ValueError(
            f"{options.data} must have examples that can be scored, got none, {left_out}"
        )
    print(f"{options.output}: {len(scored)} examples, {left_out}")


def workers_for(executor: str, device: str):
    """Return the workers: this process, a process per GPU, or a Ray cluster."""
    import torch

    if executor == "ray":
        return load_ray_workers().RayWorkers(int(device == "cuda"))
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    return Workers(gpus) if gpus > 1 else ThisProcess()


@dataclass
class OrderedWriter:
    """Callback that appends scored windows to a file in order, whatever order they finish in.

    Attributes:
        file: File to append to; created with the first result, so that a run that fails at its
            start leaves no file.
        head: Text to write before the first window.
        waiting: Lines of finished windows that are not yet written, by window number.
        next_window: Number of the window that is written next.
    """

    file: Path
    head: str
    waiting: dict[int, str] = field(default_factory=dict)
    next_window: int = 0

    def __call__(self, window: "Window", rewards: Sequence[float | str]) -> None:
        """Accept the rewards of a window, and write all windows whose turn it is."""
        examples = [
            {"prompt": list(chat), "response": response, "reward": reward}
            for (chat, response), reward in zip(window.examples, rewards, strict=True)
        ]
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
        self.waiting[window.number] = "".join(lines)
        if self.next_window not in self.waiting:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(self.head)
            while self.next_window in self.waiting:
                file.write(self.waiting.pop(self.next_window))
                self.next_window += 1
            file.flush()
            os.fsync(file.fileno())
        self.head = ""


def head_line(settings: dict) -> str:
    """Return the first line of an unfinished output, by which a later run knows it."""
    return json.dumps(settings) + "\n"


def finished_examples(partial: Path, settings: dict) -> int:
    """Return the number of examples already scored, after removing an incomplete last window.

    Its examples are scored again as a whole window, so that batches stay the same.

    Raises:
        ValueError: If the file was begun with other settings or data.
    """
    content = partial.read_bytes() if partial.exists() else b""
    first, *scored = content[: content.rfind(b"\n") + 1].splitlines(keepends=True) or [b""]
    if first and first != head_line(settings).encode():
        raise ValueError(
            f"{partial} was begun with other settings or data, "
            f"{first.decode(errors='replace').strip()}: delete it, or name another output"
        )
    complete = len(scored)
    if complete < settings["examples"]:
        complete -= complete % WINDOW
    if complete:
        os.truncate(partial, len(first) + sum(map(len, scored[:complete])))
    else:
        partial.unlink(missing_ok=True)
    return complete


if __name__ == "__main__":
    sys.exit(main())
