"""Prompt sets of the alignment literature, through `datasets`: from the Hub, or from a local copy in the same public form.

A prompt is a chat that ends in a user turn: `({"role": "user", "content": …}, …)`. Sources, by the names of PROMPT_SETS:
advbench      Zou et al., "Universal and transferable adversarial attacks on aligned language models", 2023
hex-phi       Qi et al., "Fine-tuning aligned language models compromises safety", 2024
alpaca-eval   Li et al., "AlpacaEval: an automatic evaluator of instruction-following models", 2023
truthfulqa    Lin, Hilton and Evans, "TruthfulQA: measuring how models mimic human falsehoods", 2022
hh-rlhf       Bai et al., "Training a helpful and harmless assistant with RLHF", 2022 (harmless-base)
shp           Ethayarajh, Choi and Swayamdipta, "Understanding dataset difficulty with V-usable information", 2022
wildguardmix  Han et al., "WildGuard: open one-stop moderation tools for safety risks, jailbreaks and refusals of LLMs", 2024
"""

import csv
import gzip
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import datasets
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

datasets.disable_progress_bars()
Chat = tuple[dict[str, str], ...]
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class PromptSet:
    """Where a set is on the Hub, and in which of `columns` (the first that there is) its prompts are. file: which of its files, where it
    has a script instead of tables. dialogue: they are whole dialogues of Human and Assistant, the last answer of which is cut off.
    headless: its local CSV files may have no header, one prompt a line."""

    hub_id: str
    split: str
    columns: tuple[str, ...]
    config: str | None = None
    data_dir: str | None = None
    file: str = ""
    dialogue: bool = False
    headless: bool = False


PROMPT_SETS = {
    "advbench": PromptSet("walledai/AdvBench", "train", ("goal", "prompt")),
    "hex-phi": PromptSet(
        "LLM-Tuning-Safety/HEx-PHI", "all", ("prompt", "Instruction", "instruction"), headless=True
    ),
    "alpaca-eval": PromptSet(
        "tatsu-lab/alpaca_eval", "train", ("instruction",), file="alpaca_eval.json"
    ),
    "truthfulqa": PromptSet(
        "truthfulqa/truthful_qa", "validation", ("question", "Question"), config="generation"
    ),
    "hh-rlhf": PromptSet(
        "Anthropic/hh-rlhf", "test", ("chosen",), data_dir="harmless-base", dialogue=True
    ),
    "shp": PromptSet("stanfordnlp/SHP", "test", ("history",)),
    "wildguardmix": PromptSet("allenai/wildguardmix", "test", ("prompt",), config="wildguardtest"),
}


def load_prompts(source: str) -> list[Chat]:
    """The different prompts of a set, in its order. source: a name of PROMPT_SETS (from the Hub), or NAME=PATH for a local file, or a
    folder of them, in the same public form (.csv, .json, .jsonl, .parquet, or these compressed with .gz).

    Errors: ValueError for an unknown name, a missing column, an empty or unreadable file; FileNotFoundError where there is nothing.
    """
    name, _, path = source.partition("=")
    if name not in PROMPT_SETS:
        raise ValueError(
            f"unknown prompt set {name!r}, expected one of: {', '.join(PROMPT_SETS)} (or NAME=FILE for a local copy)"
        )
    prompt_set = PROMPT_SETS[name]
    columns = prompt_set.columns if prompt_set.headless else ()
    table = (
        read_files(Path(path), columns) if path else from_hub(name, prompt_set, prompt_set.split)
    )
    where = path or prompt_set.hub_id
    column = next((column for column in prompt_set.columns if column in table.column_names), None)
    if column is None:
        wanted = " or ".join(prompt_set.columns)
        raise ValueError(
            f"{where} is no copy of {name}: expected a column {wanted}, found {', '.join(table.column_names)}"
        )
    texts = table[column]
    other = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if other is not None:
        raise ValueError(
            f"{where} is no copy of {name}: the column {column} must hold texts, got {other!r}"
        )
    chats = (dialogue(text) if prompt_set.dialogue else question(text) for text in texts)
    found = list(
        dict.fromkeys(
            tuple((turn["role"], turn["content"]) for turn in chat) for chat in chats if chat
        )
    )
    if not found:
        raise ValueError(f"{where} has no prompts")
    return [tuple({"role": role, "content": content} for role, content in chat) for chat in found]


def read_files(path: Path, columns: Sequence[str] = ()) -> Dataset:
    """A file, or all files of a folder, as one table. columns: CSV files whose first line has none of these names have no header, and one
    column, which gets the first of the names.

    Errors: FileNotFoundError where there is nothing, ValueError for a file of another form, or a damaged one.
    """
    files = sorted(file for file in path.iterdir() if _format(file)) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise FileNotFoundError(
            f"no data in {path}: expected a file, or a folder of files, of the form {', '.join(FORMATS)} (or .gz)"
        )
    kinds = {_format(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"{path} must be of one form, {', '.join(FORMATS)} (or .gz), got {', '.join(file.name for file in files)}"
        )
    empty = [file for file in files if file.stat().st_size == 0]
    if empty:
        raise ValueError(f"{empty[0]} is empty")
    (kind,) = kinds
    options = {}
    if kind == "csv" and columns and not set(columns) & set(_first_row(files[0])):
        options = {"header": None, "names": [columns[0]]}
    try:
        return load_dataset(
            kind, data_files=[str(file) for file in files], split="train", **options
        )
    except (DatasetGenerationError, ValueError, OSError, EOFError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{path} has a header and no rows") from error
        cause = error.__cause__ or error
        raise ValueError(
            f"{path} cannot be read as {kind}: {str(cause).strip().splitlines()[0]}"
        ) from error


def _first_row(file: Path) -> list[str]:
    with (gzip.open if file.suffix == ".gz" else open)(
        file, "rt", encoding="utf-8-sig", errors="replace"
    ) as lines:
        return next(csv.reader(lines), [])


def _format(file: Path) -> str | None:
    return FORMATS.get(Path(file.name.removesuffix(".gz")).suffix)


class OnHub(Protocol):
    """What a data set of the Hub is known by."""

    hub_id: str
    config: str | None
    data_dir: str | None
    file: str


def from_hub(name: str, where: OnHub, split: str) -> Dataset:
    """A split of a data set, or "all" of them. Errors: FileNotFoundError, in one sentence, if it cannot be had."""
    try:
        if where.file:
            return load_dataset(
                "json", data_files=f"hf://datasets/{where.hub_id}/{where.file}", split=split
            )
        options = {"data_dir": where.data_dir} if where.data_dir else {}
        if split == "all":
            parts = load_dataset(where.hub_id, where.config, **options)
            return datasets.concatenate_datasets([parts[part] for part in sorted(parts)])
        return load_dataset(where.hub_id, where.config, split=split, **options)
    except Exception as error:  # the Hub's client lets many kinds through: no network, a proxy, no such set, no access to a gated one
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"the data set {name} cannot be had: {where.hub_id} is not in the cache {datasets.config.HF_DATASETS_CACHE} and cannot be "
            f"downloaded ({cause}); a local copy is named as {name}=FILE"
        ) from error


def question(text: str | None) -> Chat:
    text = (text or "").strip()
    return ({"role": "user", "content": text},) if text else ()


def dialogue(text: str | None) -> Chat:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …" up to the last of Human."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + (text or "").lstrip("\n"))
    turns = [(who, said.strip()) for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    while turns and (turns[-1][0] != "Human" or not turns[-1][1]):
        turns.pop()
    return tuple(
        {"role": "user" if who == "Human" else "assistant", "content": said} for who, said in turns
    )


@dataclass(frozen=True)
class Split:
    """test, validation: chats. skipped: how many of the set were left out because they were too long."""

    test: list[Chat]
    validation: list[Chat]
    skipped: int


def split_prompts(
    source: str, chats: Sequence[Chat], too_long: Iterable[bool], test: int, validation: int
) -> Split:
    """The first of a fixed random order of the set, without those that are too long.

    Errors: ValueError if there are fewer than `test` + `validation`.
    """
    short = [chat for chat, long in zip(chats, too_long, strict=True) if not long]
    if len(short) < test + validation:
        raise ValueError(
            f"{source} has {len(short)} prompts that are not too long ({len(chats) - len(short)} are), "
            f"evaluation asks for {test} + {validation} (test + validation)"
        )
    order = random.Random(f"prompts {source.partition('=')[0]}").sample(
        range(len(short)), len(short)
    )
    chosen = [short[i] for i in order]
    return Split(chosen[:test], chosen[test : test + validation], len(chats) - len(short))


def plain_text(chat: Chat) -> str:
    """A chat for a base model: "Human:\\n{instruction}\\nAssistant:\\n", turn by turn."""
    return "".join(_plain_turns(chat)) + "Assistant:\n"


def _plain_turns(chat: Chat) -> Iterator[str]:
    for turn in chat:
        yield f"{'Human' if turn['role'] == 'user' else 'Assistant'}:\n{turn['content']}\n"
