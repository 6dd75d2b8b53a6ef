"""Texts that the lab's world writes, and what the judge says of sentences in any order."""

import random

from benchmarks.spec.cells import OBJECTIVES
from benchmarks.subjects.lab.items import Item
from benchmarks.subjects.lab.judge import judge
from benchmarks.subjects.lab.world import World, WorldConfig

USUAL = {
    "harmful": ["refusal", "reason", "alternative", "temptation", "step"],
    "fact": ["claim", "evidence", "debunk", "boast", "hedge"],
}


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
    """Sentences that are right, about something else, repeated and in other words."""
    world, cases = World(WorldConfig(seed=3)), {}
    for kind in ("howto", "benign", "harmful", "fact"):
        item = next(item for item in world.items if item.kind == kind)
        for number in range(6):
            rng = random.Random(f"{kind} {number}")
            text = " ".join(sentence(world, item, rng) for _ in range(rng.randrange(2, 8)))
            verdict = judge(world.grammar, item, text, finished=number > 0)
            cases[f"{kind} {number}"] = {
                "text": text,
                "points": {name: round(points, 3) for name, points in verdict.points.items()},
                "score": round(verdict.score, 3),
                "fluency errors": verdict.fluency_errors,
            }
    data_regression.check(cases)


def sentence(world: World, item: Item, rng: random.Random) -> str:
    """Write a sentence that fits the item, or half fits it."""
    kinds = USUAL.get(item.kind, ["step", "step", "step", "tip", "agreement"])
    kind = rng.choice(kinds if rng.random() < 0.8 else sorted(world.grammar.templates))
    fields = {
        "topic": item.topic,
        "victim": item.victim,
        "alternative": item.alternative,
        "entity": item.entity,
        "attribute": item.attribute,
        "value": rng.choice([item.truth, item.truth, item.myth]),
    }
    if item.steps:
        verbs, thing = rng.choice(item.steps)
        fields |= {"verb": rng.choice(verbs), "object": thing}
    chosen = {name: words for name, words in fields.items() if words and rng.random() < 0.85}
    return world.grammar.write(kind, rng, **chosen)
