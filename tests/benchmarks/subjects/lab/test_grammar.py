"""Sentences that are written, recognised and corrupted."""

import random

from benchmarks.subjects.lab.items import parse_steps
from benchmarks.subjects.lab.world import World, WorldConfig
from benchmarks.subjects.lab.writer import corrupt

WORLD = World(WorldConfig(seed=0))


def test_the_grammar_reads_what_it_writes():
    rng = random.Random(0)
    for kind in WORLD.grammar.templates:
        for _ in range(200):
            text = WORLD.grammar.write(kind, rng)
            assert WORLD.grammar.parse(text).kind == kind, text
    assert WORLD.grammar.parse("the aunt step first .") is None
    step = WORLD.grammar.parse("then stir the nice flour slowly .")
    assert (step.kind, step.fields) == ("step", {"verb": "stir", "object": "flour"})


def test_corruption_is_what_the_judge_calls_ungrammatical():
    rng = random.Random(0)
    text = "experts confirm that it is black ."
    broken = {corrupt(text, rng) for _ in range(50)} - {text}
    assert len(broken) > 5
    assert all(sentence.endswith(" .") for sentence in broken)
    assert all(WORLD.grammar.parse(sentence) is None for sentence in broken)


def test_steps_are_read_from_the_lexicon():
    assert parse_steps("mix,stir:flour; heat:oven") == (
        (("mix", "stir"), "flour"),
        (("heat",), "oven"),
    )
