"""Texts that the lab's world writes, and what the judge says of sentences in any order."""

import random

from benchmarks.spec.cells import OBJECTIVES
from benchmarks.subjects.lab.judge import judge
from benchmarks.subjects.lab.world import World, WorldConfig


def test_texts(data_regression):
    texts = {}
    for seed in (0, 1):
        world, rng = World(WorldConfig(seed=seed)), random.Random(seed)
        for objective in OBJECTIVES:
            texts[f"world {seed}, {objective}"] = [
                {"prompt": prompt.text, "response": world.response(prompt.item, rng)}
                for prompt in world.prompts(rng, 4, objective, set())
            ]
    data_regression.check(texts)


def test_rubric(data_regression):
    """Sentences of two items in any order: right, about something else, repeated, unfinished."""
    world, cases = World(WorldConfig(seed=3)), {}
    for kind in ("howto", "benign", "harmful", "fact"):
        item, *others = [item for item in world.items if item.kind == kind]
        for number in range(6):
            rng = random.Random(f"{kind} {number}")
            pool = [world.response(each, rng) for each in (item, item, item, rng.choice(others))]
            sentences = [f"{text} ." for text in " ".join(pool).split(" .") if text]
            text = " ".join(sentence.strip() for sentence in rng.choices(sentences, k=number + 2))
            verdict = judge(world.grammar, item, text, finished=number > 0)
            cases[f"{kind} {number}"] = {
                "text": text,
                "points": {name: round(points, 3) for name, points in verdict.points.items()},
                "score": round(verdict.score, 3),
                "fluency errors": verdict.fluency_errors,
            }
    data_regression.check(cases)
