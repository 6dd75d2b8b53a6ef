"""Scores of lm-eval's lab tasks: the judge of the lab's first replicate (`!function lab.score`).

`python benchmarks/tasks/lab/lab.py` writes the prompts beside this file anew.
"""

import json
from functools import cache
from pathlib import Path

from benchmarks.spec.cells import OBJECTIVES
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.items import Prompt
from benchmarks.subjects.lab.judge import judge
from benchmarks.subjects.lab.replicate import Replicate


@cache
def replicate() -> Replicate:
    """Return the first replicate of the lab."""
    return Replicate(load_profile("lab"), 0)


def documents(objective: str) -> list[dict[str, object]]:
    """Return the test prompts of an objective, as OBJECTIVE.jsonl beside this file has them."""
    return [
        {"objective": objective, "number": number, "prompt": prompt.text}
        for number, prompt in enumerate(replicate().prompts_of("test", objective))
    ]


def prompt_of(doc: dict) -> Prompt:
    """Return the prompt of a document."""
    return replicate().prompts_of("test", doc["objective"])[doc["number"]]


def score(doc: dict, results: list[str]) -> dict[str, float]:
    """Return the judge's score (−5 to 5) of a finished response, and whether it lacks fluency."""
    verdict = judge(replicate().world.grammar, prompt_of(doc).item, results[0].strip(), True)
    return {"judge": verdict.score, "fluency_errors": float(verdict.fluency_errors)}


if __name__ == "__main__":
    for objective in OBJECTIVES:
        lines = "".join(f"{json.dumps(doc)}\n" for doc in documents(objective))
        Path(__file__).with_name(f"{objective}.jsonl").write_text(lines, encoding="utf-8")
