"""Prompts with responses, to annotate with rewards and learn values from.

wildguardmix  WildGuardMix (train): prompt, response
ultrafeedback UltraFeedback (Cui et al., 2023), its ShareGPT and UltraChat instructions: instruction, completions
hh-rlhf       the chosen and the rejected last answer of each dialogue
alpaca-eval   instruction, output
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.subjects.hub.prompts import Chat, dialogue, from_hub, question, read_files

Example = tuple[Chat, str]


@dataclass(frozen=True)
class ExampleSet:
    """columns: that its rows need. read: the examples of one row."""

    hub_id: str
    columns: tuple[str, ...]
    read: Callable[[dict], Iterator[Example]]
    config: str | None = None
    data_dir: str | None = None
    file: str = ""
    split: str = "train"


def _pair(prompt: str | None, response: str | None) -> Iterator[Example]:
    chat = question(prompt)
    if chat and response and response.strip():
        yield chat, response.strip()


def _completions(row: dict) -> Iterator[Example]:
    if row["source"] in ("sharegpt", "ultrachat"):
        for completion in row["completions"]:
            yield from _pair(row["instruction"], completion["response"])


def _last_answers(row: dict) -> Iterator[Example]:
    for text in (row["chosen"] or "", row["rejected"] or ""):
        chat = dialogue(text)
        answer = text.rpartition("\n\nAssistant:")[2].strip()
        if chat and answer and "\n\nHuman:" not in answer:
            yield chat, answer


EXAMPLE_SETS = {
    "wildguardmix": ExampleSet(
        "allenai/wildguardmix",
        ("prompt", "response"),
        lambda row: _pair(row["prompt"], row["response"]),
        "wildguardtrain",
    ),
    "ultrafeedback": ExampleSet(
        "openbmb/UltraFeedback", ("source", "instruction", "completions"), _completions
    ),
    "hh-rlhf": ExampleSet(
        "Anthropic/hh-rlhf", ("chosen", "rejected"), _last_answers, data_dir="harmless-base"
    ),
    "alpaca-eval": ExampleSet(
        "tatsu-lab/alpaca_eval",
        ("instruction", "output"),
        lambda row: _pair(row["instruction"], row["output"]),
        file="alpaca_eval.json",
    ),
}


def load_examples(source: str) -> list[Example]:
    """source: a name of EXAMPLE_SETS (the Hub's training split), or NAME=PATH for a local copy in the same public form.

    Errors: as of `load_prompts`.
    """
    name, _, path = source.partition("=")
    if name not in EXAMPLE_SETS:
        raise ValueError(
            f"unknown data {name!r}, expected one of: {', '.join(EXAMPLE_SETS)} (or NAME=FILE for a local copy)"
        )
    example_set = EXAMPLE_SETS[name]
    where = path or example_set.hub_id
    table = read_files(Path(path)) if path else from_hub(name, example_set, example_set.split)
    missing = [column for column in example_set.columns if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{where} is no copy of {name}: expected the columns {', '.join(example_set.columns)}, found {', '.join(table.column_names)}"
        )
    try:
        examples = [example for row in table for example in example_set.read(row)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is no copy of {name}: a row is of another form ({type(error).__name__}: {error})"
        ) from error
    if not examples:
        raise ValueError(f"{where} has no prompts with responses")
    return examples
