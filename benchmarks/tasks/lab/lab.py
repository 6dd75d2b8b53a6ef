"""What lm-eval's lab tasks score a response with: the judge of the lab's first replicate (`!function lab.score`)."""

from __future__ import annotations

from functools import cache

from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.items import Prompt
from benchmarks.subjects.lab.judge import judge
from benchmarks.subjects.lab.replicate import Replicate


@cache
def replicate() -> Replicate:
    return Replicate(load_profile("lab"), 0)


def documents(objective: str) -> list[dict[str, object]]:
    """The test prompts of an objective, as they lie beside this file in OBJECTIVE.jsonl."""
    return [
        {"objective": objective, "number": number, "prompt": prompt.text}
        for number, prompt in enumerate(replicate().prompts_of("test", objective))
    ]


def prompt_of(doc: dict) -> Prompt:
    return replicate().prompts_of("test", doc["objective"])[doc["number"]]


def score(doc: dict, results: list[str]) -> dict[str, float]:
    """The judge's score (−5 to 5) of a response, taken as finished, and whether it has an error of fluency."""
    verdict = judge(replicate().world.grammar, prompt_of(doc).item, results[0].strip(), True)
    return {"judge": verdict.score, "fluency_errors": float(verdict.fluency_errors)}
