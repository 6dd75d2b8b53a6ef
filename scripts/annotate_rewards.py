r"""Score responses to prompts with a trajectory reward model: the data of value models.

python scripts/annotate_rewards.py --data wildguardmix \
    --reward Skywork/Skywork-Reward-V2-Qwen3-8B --output harmlessness.jsonl

Writes a JSON line for each example: prompt (a chat), response, reward. An interrupted run resumes:
finished examples are in OUTPUT.part, which becomes OUTPUT at the end.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from benchmarks.runtime.command_line import Parser, exit_code
from benchmarks.runtime.files import write_text
from benchmarks.spec.profile import Source
from benchmarks.subjects.hub.models import (
    chat_ids,
    check_reward_model,
    choose_device,
    fetch,
    place,
    require_template,
    tokenizer_of,
)
from benchmarks.subjects.hub.prompts import EXAMPLE_SETS, Example, load_examples
from benchmarks.subjects.scoring import trajectory_rewards
from sia import RewardScorer

LONGEST_HELP = "tokens; longer examples are left out, and counted (default: 2048)"
TOO_LONG, REFUSED = "too long", "refused by the chat template"
WINDOW = 256  # examples that are tokenised, scored and written together


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
    add("--output", required=True, type=Path, help="JSON lines to write")
    add("--longest", type=int, default=2048, help=LONGEST_HELP)
    add("--limit", type=int, help="only the first so many examples")
    add("--device", choices=("cpu", "cuda"), default="", help="default: cuda if available")
    options = parser.parse_args(arguments)
    return exit_code(lambda: annotate(options), "what was scored is kept")


def annotate(options: argparse.Namespace) -> None:
    """Score every example and write those that are not too long.

    Raises:
        ValueError: For an option, a reward model or an output that cannot be used.
    """
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    if options.output.exists():
        raise ValueError(f"{options.output} is there already: name another output, or delete it")
    device, dtype = choose_device(options.device)
    disable_progress_bar()
    examples = load_examples(options.data)[: options.limit]
    source = fetch(Source(options.reward, options.revision))
    settings = {
        "data": options.data,
        "reward": options.reward,
        "revision": source.revision,
        "longest": options.longest,
        "examples": len(examples),
    }
    partial = options.output.with_name(options.output.name + ".part")
    completed = finished_examples(partial, settings)
    name, location = place(source)
    tokenizer = tokenizer_of(source)
    require_template(tokenizer)
    check_reward_model(source)
    model = RewardScorer.from_pretrained(
        name, tokenizer.eos_token_id, dtype=dtype, device_map=device, **location
    ).model
    if not completed:  # a start that failed has left nothing
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    windows = [examples[i : i + WINDOW] for i in range(completed, len(examples), WINDOW)]
    with (
        partial.open("a", encoding="utf-8") as file,
        tqdm(total=len(examples), initial=completed, desc="rewards", unit="example") as bar,
    ):
        for window in windows:
            rewards = score_examples(model, tokenizer, window, options.longest)
            for (chat, response), reward in zip(window, rewards, strict=True):
                example = {"prompt": list(chat), "response": response, "reward": reward}
                file.write(json.dumps(example, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(window))
    with partial.open(encoding="utf-8") as file:
        _, *lines = file
    rewards = [json.loads(line)["reward"] for line in lines]
    scored = [
        line for line, reward in zip(lines, rewards, strict=True) if isinstance(reward, float)
    ]
    write_text(options.output, "".join(scored))
    partial.unlink()
    refused = rewards.count(REFUSED)
    print(
        f"{options.output}: {len(scored)} examples,"
        f" {rewards.count(TOO_LONG)} left out with more than {options.longest} tokens"
        + (f", {refused} that the chat template refuses" if refused else "")
    )


def score_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    longest: int,
) -> list[float | str]:
    """Return the reward of each example, or why it is left out.

    Raises:
        FloatingPointError: If a reward is no finite number.
    """
    results: list[float | str] = []
    token_ids = {}
    for number, (chat, response) in enumerate(examples):
        whole = [*chat, {"role": "assistant", "content": response}]
        try:
            (ids,) = chat_ids(tokenizer, [whole], answered=True)
        except ValueError:
            results.append(REFUSED)
            continue
        results.append(TOO_LONG)
        if len(ids) <= longest:
            token_ids[number] = ids
    rewards = trajectory_rewards(model, list(token_ids.values())).tolist()
    for number, reward in zip(token_ids, rewards, strict=True):
        if not math.isfinite(reward):
            raise FloatingPointError(
                f"rewards must be finite, the model gives {reward} for {examples[number]}"
            )
        results[number] = reward
    return results


def finished_examples(partial: Path, settings: dict) -> int:
    """Return how many examples are scored: the whole lines after the first, the settings.

    A line that was cut off is removed.

    Raises:
        ValueError: If it was begun with other settings.
    """
    content = partial.read_bytes() if partial.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    first, *scored = whole.splitlines() or [b""]
    if not first:
        return 0
    if json.loads(first) != settings:
        raise ValueError(
            f"{partial} was begun with other settings, {first.decode()}:"
            " delete it, or name another output"
        )
    os.truncate(partial, len(whole))
    return len(scored)


if __name__ == "__main__":
    sys.exit(main())
