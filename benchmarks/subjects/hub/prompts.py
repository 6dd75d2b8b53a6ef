r"""Prompt sets and examples of the alignment literature, from the Hub or from local copies.

A local copy has the public form of the set. A prompt is a chat that ends in a user turn:
`({"role": "user", "content": …}, …)`. An example is a prompt with a response.

advbench       Zou et al., "Universal and transferable adversarial attacks on aligned language
               models", 2023
hex-phi        Qi et al., "Fine-tuning aligned language models compromises safety", 2024
alpaca-eval    Li et al., "AlpacaEval: an automatic evaluator of instruction-following models", 2023
truthfulqa     Lin, Hilton and Evans, "TruthfulQA: measuring how models mimic human falsehoods",
               2022
hh-rlhf        Bai et al., "Training a helpful and harmless assistant with RLHF", 2022
               (harmless-base; examples: the chosen and the rejected last answer of each dialogue)
shp            Ethayarajh, Choi and Swayamdipta, "Understanding dataset difficulty with V-usable
               information", 2022
wildguardmix   Han et al., "WildGuard: open one-stop moderation tools for safety risks, jailbreaks
               and refusals of LLMs", 2024
ultrafeedback  Cui et al., 2023 (examples alone: its ShareGPT and UltraChat instructions)
"""

import csv
import gzip
import hashlib
import io
import json
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from os.path import expanduser
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import load_dataset
from pyarrow import parquet

from benchmarks.runtime.files import sha256

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
csv.field_size_limit(2**31 - 1)  # prompts may be long
Chat = tuple[dict[str, str], ...]
Example = tuple[Chat, str]
Table = list[dict[str, Any]]
FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SHAREGPT = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = f"{', '.join(FORMATS)} (or .gz)"


def is_text(value: object) -> bool:
    """Return whether a value is a text of whole signs: halves of one are in no vocabulary."""
    from sia._inputs import holds_half_pair  # not before: it imports torch

    return isinstance(value, str) and not holds_half_pair(value)


def question(text: str | None) -> Chat:
    """Return a chat of one user turn; an empty one if there is no text."""
    text = (text or "").strip()
    return ({"role": "user", "content": text},) if text else ()


def dialogue(text: str | None) -> Chat:
    r"""Return the turns of "\n\nHuman: …\n\nAssistant: …" up to the last of Human."""
    turns = _turns(text)
    while turns and (turns[-1]["role"] != "user" or not turns[-1]["content"]):
        turns.pop()
    return tuple(turns)


def _turns(text: str | None) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + (text or "").lstrip("\n"))
    return [
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def chat_of(prompt: object) -> Chat:
    """Return a prompt, a text or messages, as a chat that ends in a user turn.

    Messages have role and content or, as in ShareGPT, from and value.

    Raises:
        ValueError: For anything else, or a chat that ends in an empty turn.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt.strip()}]
    if not isinstance(prompt, Sequence) or not all(isinstance(turn, Mapping) for turn in prompt):
        raise ValueError(f"a prompt must be a text or a list of messages, got {prompt!r}")
    turns = []
    for turn in prompt:
        speaker = turn.get("role") or turn.get("from")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if not isinstance(speaker, str) or not is_text(content):
            raise ValueError(f"a message must have a role and a content, a text, got {dict(turn)}")
        role = SHAREGPT.get(speaker, speaker)
        if role not in ROLES:
            raise ValueError(f"a message must be of {', '.join(ROLES)}, got one of {speaker}")
        turns.append({"role": role, "content": content})
    if not turns or turns[-1]["role"] != "user":
        last = turns[-1]["role"] if turns else "no message"
        raise ValueError(f"a prompt must end in a user turn, got one that ends in {last}")
    if not turns[-1]["content"].strip():
        raise ValueError("a prompt must end in a user turn with a text, got an empty one")
    return tuple(turns)


def chat_of_csv(prompt: str) -> Chat:
    """Return a prompt of a CSV file, a text or messages as JSON, as `chat_of` does.

    Raises:
        ValueError: For what begins like messages and is no JSON, and as `chat_of` does.
    """
    if not re.match(r"\s*\[\s*\{", prompt):
        return chat_of(prompt)
    try:
        return chat_of(json.loads(prompt))
    except json.JSONDecodeError:
        raise ValueError(
            f"a prompt that begins with [{{ must be messages as JSON, got {prompt!r}"
        ) from None


def _pair(prompt: str | None, response: str | None) -> Iterator[Example | None]:
    chat = question(prompt)
    yield (chat, response.strip()) if chat and response and response.strip() else None


def _completions(row: dict) -> Iterator[Example | None]:
    if row["source"] in ("sharegpt", "ultrachat"):
        for completion in row["completions"]:
            yield from _pair(row["instruction"], completion["response"])


def _last_answers(row: dict) -> Iterator[Example | None]:
    for text in (row["chosen"], row["rejected"]):
        chat, turns = dialogue(text), _turns(text)
        answered = chat and len(turns) == len(chat) + 1  # else it follows another turn
        answer = turns[-1]["content"] if answered else ""
        yield (chat, answer) if answer else None


@dataclass(frozen=True)
class HubData:
    """A data set of the Hub.

    Attributes:
        hub_id: Owner and name.
        split: Split to read, or "all".
        columns: Of a set of prompts, names that the column of prompts may have: the first that
            there is counts. Of a set of examples, the columns that `read` needs.
        read: Function of a prompt's text that returns its chat, or of a row that yields examples.
        config: Configuration on the Hub.
        data_dir: Folder on the Hub.
        file: File on the Hub, where the set has a script instead of tables.
        headless: True if local CSV files may have no header, one prompt a line.
    """

    hub_id: str
    split: str
    columns: tuple[str, ...]
    read: Callable = question
    config: str | None = None
    data_dir: str | None = None
    file: str = ""
    headless: bool = False


PROMPT_SETS = {
    "advbench": HubData("walledai/AdvBench", "train", ("goal", "prompt")),
    "hex-phi": HubData(
        "LLM-Tuning-Safety/HEx-PHI", "all", ("prompt", "Instruction", "instruction"), headless=True
    ),
    "alpaca-eval": HubData(
        "tatsu-lab/alpaca_eval", "train", ("instruction",), file="alpaca_eval.json"
    ),
    "truthfulqa": HubData(
        "truthfulqa/truthful_qa", "validation", ("question", "Question"), config="generation"
    ),
    "hh-rlhf": HubData(
        "Anthropic/hh-rlhf", "test", ("chosen",), dialogue, data_dir="harmless-base"
    ),
    "shp": HubData("stanfordnlp/SHP", "test", ("history",)),
    "wildguardmix": HubData("allenai/wildguardmix", "test", ("prompt",), config="wildguardtest"),
}
EXAMPLE_SETS = {
    "wildguardmix": HubData(
        "allenai/wildguardmix",
        "train",
        ("prompt", "response"),
        lambda row: _pair(row["prompt"], row["response"]),
        "wildguardtrain",
    ),
    "ultrafeedback": HubData(
        "openbmb/UltraFeedback", "train", ("source", "instruction", "completions"), _completions
    ),
    "hh-rlhf": HubData(
        "Anthropic/hh-rlhf",
        "train",
        ("chosen", "rejected"),
        _last_answers,
        data_dir="harmless-base",
    ),
    "alpaca-eval": HubData(
        "tatsu-lab/alpaca_eval",
        "train",
        ("instruction", "output"),
        lambda row: _pair(row["instruction"], row["output"]),
        file="alpaca_eval.json",
    ),
}


@dataclass(frozen=True)
class PromptSet:
    """Different prompts of a set, in its order.

    Attributes:
        chats: Prompts.
        rows: Number of each prompt's row in the set, from 0.
        origin: File with its SHA-256, or id and revision on the Hub.
    """

    chats: Sequence[Chat]
    rows: Sequence[int]
    origin: Mapping[str, str]


def load_prompts(source: str) -> PromptSet:
    """Return the different prompts of a set.

    Args:
        source: A name of PROMPT_SETS, or NAME=PATH for a local file, or a folder of them.

    Raises:
        ValueError: For an unknown name, a missing column, an empty or unreadable file.
        FileNotFoundError: If there is nothing at the path, or the Hub's set cannot be had.
    """
    data, table, copy, origin = _open(source, PROMPT_SETS, "prompt set")
    column = next((column for column in data.columns if column in table[0]), None)
    if column is None:
        raise ValueError(
            f"{copy}: expected a column {' or '.join(data.columns)}, found {', '.join(table[0])}"
        )
    texts = [row[column] for row in table]
    for text in texts:
        if text is not None and not is_text(text):
            raise ValueError(f"{copy}: the column {column} must hold texts, got {text!r}")
    chats = {row: chat for row, chat in enumerate(map(data.read, texts)) if chat}
    if not chats:
        raise ValueError(f"{source.partition('=')[2] or data.hub_id} has no prompts")
    first_rows = {repr(chat): row for row, chat in reversed(chats.items())}
    rows = sorted(first_rows.values())
    _say_left_out(source, len(table) - len(chats), "rows without a prompt")
    _say_left_out(source, len(chats) - len(rows), "prompts that are there before")
    return PromptSet([chats[row] for row in rows], rows, origin)


def _say_left_out(source: str, count: int, what: str) -> None:
    if count:
        print(f"{source}: {count} {what} left out", file=sys.stderr)


def load_examples(source: str) -> list[Example]:
    """Return the examples of a set.

    Args:
        source: A name of EXAMPLE_SETS, or NAME=PATH for a local copy.

    Raises:
        ValueError: As `load_prompts` does; also for a row of another form.
        FileNotFoundError: As `load_prompts` does.
    """
    data, table, copy, _ = _open(source, EXAMPLE_SETS, "data")
    if not set(data.columns) <= table[0].keys():
        raise ValueError(
            f"{copy}: expected the columns {', '.join(data.columns)}, found {', '.join(table[0])}"
        )
    try:
        candidates = [example for row in table for example in data.read(row)]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{copy}: a row is of another form ({type(error).__name__}: {error})"
        ) from error
    examples = [example for example in candidates if example is not None]
    for chat, response in examples:
        for text in (*(turn["content"] for turn in chat), response):
            if not is_text(text):
                raise ValueError(f"{copy}: an example must hold texts, got {text!r}")
    if not examples:
        raise ValueError(f"{source.partition('=')[2] or data.hub_id} has no prompts with responses")
    _say_left_out(source, len(candidates) - len(examples), "examples without prompt or response")
    return examples


def _open(
    source: str, sets: dict[str, HubData], noun: str
) -> tuple[HubData, Table, str, dict[str, str]]:
    """Return a set, its table, the beginning of an error about its form, and its origin."""
    name, local, path = source.partition("=")
    path = expanduser(path)
    if name not in sets:
        raise ValueError(
            f"unknown {noun} {name!r}, expected one of: {', '.join(sets)}"
            " (or NAME=FILE for a local copy)"
        )
    if local and not path:
        raise ValueError(f"{source} names no file: expected {name}=FILE, or {name} for the Hub's")
    data = sets[name]
    wrong_form = f"{path or data.hub_id} is no copy of {name}"
    if path:
        table = read_files(Path(path), data.columns if data.headless else ())
        return data, table, wrong_form, {"file": path, "sha256": _digest(Path(path))}
    table, revision = _from_hub(name, data)
    return data, table, wrong_form, {"hub_id": data.hub_id, "revision": revision}


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file; of a folder, that of what sha256sum prints of its files."""
    if path.is_file():
        return sha256(path)
    sums = "".join(f"{sha256(file)}  {file.name}\n" for file in _files(path))
    return hashlib.sha256(sums.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that have a known form, but hidden ones."""
    files = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in files if _format(file))


def read_files(path: Path, columns: Sequence[str] = ()) -> Table:
    """Read a file, or all files of a folder but hidden ones, as one table of the same columns.

    Args:
        path: The file or folder.
        columns: CSV files whose first line has none of these names, and is more than single words
            or numbers, have no header: each line is a text, commas included, in the column that has
            the first of the names.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: For a file of another form, or a damaged one.
    """
    files = _files(path) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise FileNotFoundError(
            f"no data in {path}: expected a file, or a folder of files, of the form {FORMS}"
        )
    kind, *others = {_format(file) for file in files}
    if others or not kind:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} must be of one form, {FORMS}, got {names}")
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty")
    try:
        if kind == "csv":
            rows = _csv_rows(files, columns)
        elif kind == "json":
            rows = [row for file in files for row in _json_rows(_text(file))]
        else:
            rows = [row for file in files for row in _parquet_rows(file)]
    except (
        ValueError, OSError, EOFError, RecursionError, csv.Error, zlib.error, pa.ArrowException
    ) as error:  # fmt: skip
        cause = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read as {kind}: {cause}") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _csv_rows(files: Sequence[Path], columns: Sequence[str]) -> Table:
    """Read CSV files as texts alone: "null", "NA" and "007" are what they are."""
    rows: Table = []
    for file in files:
        text = _text(file)
        first = next(csv.reader(io.StringIO(text, newline="")), [])
        if _is_header(first, columns):
            rows += _rows_below_header(text, any(cell.startswith(" ") for cell in first))
            continue
        cells = {cell.strip(' "').lower() for cell in re.split("[,;\t]", ",".join(first))}
        named = not cells.isdisjoint(name.lower() for name in columns)
        if named or _has_numbers_below_a_name(text):
            raise ValueError(
                f"the first line of {file.name} is a header, expected columns separated by "
                f"commas, one of them named {columns[0]}"
            )
        rows += [{columns[0]: line} for line in _lines(text)]
    return rows


def _is_header(first: Sequence[str], columns: Sequence[str]) -> bool:
    """Return whether the first line of a CSV file names columns.

    It does if no column is asked for, if it names one that is, or if its cells are single words or
    numbers, which no prompt is.
    """
    if not columns or not {cell.strip(' "') for cell in first}.isdisjoint(columns):
        return True
    names = [cell for cell in first if cell]
    return bool(names) and all(re.fullmatch(r"[a-zA-Z_]\w*|\d+", name, re.ASCII) for name in names)


def _has_numbers_below_a_name(text: str) -> bool:
    """Return whether one of several columns of a CSV file has numbers in all rows but the first."""
    rows = list(filter(None, csv.reader(io.StringIO(text, newline=""))))
    if len(rows) < 2 or len(rows[0]) < 2 or any(len(row) != len(rows[0]) for row in rows):
        return False
    if any(cell.startswith(" ") for row in rows for cell in row):  # commas of sentences
        return False
    columns = zip(*rows, strict=True)
    return any(
        not first.strip().isdigit() and all(cell.strip().isdigit() for cell in below)
        for first, *below in columns
    )


def _rows_below_header(text: str, spaced: bool) -> Table:
    """Return the rows of a CSV file by the names of its header.

    Args:
        text: The file.
        spaced: Whether a space stands before each cell.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=spaced)
    header = [cell.strip() for cell in next(reader, [])]
    named = max((number for number, name in enumerate(header, 1) if name), default=0)
    if repeated := [name for name, count in Counter(header).items() if name and count > 1]:
        raise ValueError(f"its header names the column {repeated[0]} more than once")
    rows: Table = []
    for cells in filter(None, reader):
        if len(cells) > len(header) or any(cells[named:]):
            raise ValueError(f"line {reader.line_num} has more columns than the header names")
        rows.append(dict(zip_longest(header, cells)))
    return rows


def _opened(file: Path, mode: str, **options: str) -> Any:
    return (gzip.open if file.suffix == ".gz" else open)(file, mode, **options)


def _text(file: Path) -> str:
    with _opened(file, "rt", encoding="utf-8-sig", newline="") as stream:
        return stream.read()


def _parquet_rows(file: Path) -> Table:
    with _opened(file, "rb") as stream:
        return parquet.ParquetFile(stream).read().to_pylist()


def _json_rows(text: str) -> Table:
    """Return the objects of a JSON list, or of JSON lines; texts that look like dates are texts."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                content += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON: {error}") from None
    rows = content if isinstance(content, list) else [content]
    if others := [type(row).__name__ for row in rows if not isinstance(row, dict)]:
        raise ValueError(f"expected objects, one a line or in a list, got {others[0]}")
    return rows


def _lines(text: str) -> Iterator[str]:
    """Yield texts of a file without a header: one a line, in quotes if it has several lines."""
    lines = list(io.StringIO(text, newline=None))
    number = 0
    while number < len(lines):
        if not lines[number].startswith('"'):
            yield lines[number].rstrip("\n")
            number += 1
            continue
        reader = csv.reader(lines[number:], strict=True)
        try:
            fields = next(reader)
        except csv.Error as error:
            if "expected after" not in str(error) or reader.line_num > 1:
                raise
            fields = [lines[number].rstrip("\n")]  # begins with a quotation: "Do" it, then go
        if len(fields) != 1:
            raise ValueError(f"line {number + 1} has {len(fields)} columns and there is no header")
        yield fields[0]
        number += reader.line_num


def is_csv(path: Path) -> bool:
    """Return whether a file, or those of a folder, are CSV."""
    return "csv" in map(_format, path.iterdir() if path.is_dir() else [path])


def _format(file: Path) -> str | None:
    return FORMATS.get(Path(file.name.removesuffix(".gz")).suffix)


def _from_hub(name: str, data: HubData) -> tuple[Table, str]:
    """Return the rows of a data set, and the commit that it was read at."""
    try:
        if data.file:
            file = f"hf://datasets/{data.hub_id}/{data.file}"
            table = load_dataset("json", data_files=file, split=data.split)
            return list(table), _revision(table.info)
        split = None if data.split == "all" else data.split
        tables = load_dataset(data.hub_id, data.config, data_dir=data.data_dir, split=split)
        if split:
            return list(tables), _revision(tables.info)
        parts = [tables[key] for key in sorted(tables)]
        return [row for part in parts for row in part], _revision(parts[0].info)
    except Exception as error:  # the Hub's client lets through many kinds
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"the data set {name} cannot be had: {data.hub_id} is not in the cache"
            f" {datasets.config.HF_DATASETS_CACHE} and cannot be downloaded ({cause});"
            f" a local copy is named as {name}=FILE"
        ) from error


def _revision(info: datasets.DatasetInfo) -> str:
    """Return the commit that a data set was fetched at; "unknown" where its addresses lack it."""
    addresses = " ".join(info.download_checksums or ())
    match = re.search(r"@([0-9a-f]{40})/", addresses)
    return match[1] if match else "unknown"


@dataclass(frozen=True)
class Split:
    """Prompts of a test and a validation set, and how many were skipped as too long.

    Attributes:
        rows: Rows of the prompts in their set, by "test" and "validation".
    """

    test: list[Chat]
    validation: list[Chat]
    skipped: int
    rows: Mapping[str, list[int]]


def split_prompts(
    source: str, prompts: PromptSet, too_long: Iterable[bool], test: int, validation: int
) -> Split:
    """Return the first prompts of a fixed random order, without those that are too long.

    Raises:
        ValueError: If there are fewer than `test` + `validation`.
    """
    pairs = zip(prompts.chats, prompts.rows, strict=True)
    short = [pair for pair, long in zip(pairs, too_long, strict=True) if not long]
    skipped = len(prompts.chats) - len(short)
    if len(short) < test + validation:
        raise ValueError(
            f"{source} has {len(short)} prompts that are not too long ({skipped} are),"
            f" evaluation asks for {test} + {validation} (test + validation)"
        )
    rng = random.Random(f"prompts {source.partition('=')[0]}")
    chats, rows = zip(*rng.sample(short, len(short)), strict=True)
    ranges = {"test": slice(test), "validation": slice(test, test + validation)}
    splits = {name: list(chats[some]) for name, some in ranges.items()}
    rows_of = {name: list(rows[some]) for name, some in ranges.items()}
    return Split(splits["test"], splits["validation"], skipped, rows_of)


def plain_text(chat: Chat) -> str:
    r"""Return a chat for a base model: "Human:\n{instruction}\nAssistant:\n", turn by turn."""
    speakers = {"user": "Human", "assistant": "Assistant"}
    turns = [f"{speakers[turn['role']]}:\n{turn['content']}\n" for turn in chat]
    return "".join(turns) + "Assistant:\n"
