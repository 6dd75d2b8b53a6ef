"""The lab world: its size, its seed and settings, its prompts."""

import random

import pytest

from benchmarks.spec.cells import OBJECTIVES
from benchmarks.subjects.lab.world import World, WorldConfig

WORLD = World(WorldConfig(seed=0))
ITEMS = {item.topic: item for item in WORLD.items}


def test_size_of_the_world():
    assert 600 <= len(WORLD.words) <= 1000
    assert {item.objective for item in WORLD.items} == set(OBJECTIVES)
    assert len(ITEMS) == len(WORLD.items) == 60


def test_a_seed_decides_everything_and_other_seeds_differ():
    def sample(seed):
        world, rng = World(WorldConfig(seed=seed)), random.Random(1)
        prompts = [world.prompt(rng) for _ in range(20)]
        return (
            [p.text for p in prompts],
            [world.response(p.item, rng) for p in prompts],
            world.carelessness,
        )

    assert sample(0) == sample(0)
    assert sample(0)[2] != sample(1)[2]
    assert sample(0)[1] != sample(1)[1]


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"decoys": 0.0}, lambda texts: sum("take a" in t or "thanks" in t for t in texts)),
        ({"zipf": 3.0}, lambda texts: len({w for t in texts for w in t.split()})),
        ({"recovery": 1.0}, lambda texts: sum("my aunt" in t for t in texts)),
        ({"drift": 0.0}, lambda texts: sum("my aunt" in t for t in texts)),
        ({"habits": (0.0,)}, lambda texts: sum("my aunt" in t for t in texts)),
    ],
)
def test_every_setting_of_the_world_changes_it(change, measure):
    def texts(**settings):
        world, rng = World(WorldConfig(**settings)), random.Random(3)
        return [world.response(item, rng) for item in world.items for _ in range(20)]

    assert measure(texts(**change)) < measure(texts())


def test_asking_for_more_prompts_than_there_are():
    world = World(WorldConfig())
    world.lexicon["prompts"] |= {"prefix": [""], "suffix_fact": [""]}  # 24 facts asked in 4 ways
    found = world.prompts(random.Random(0), 90, "honesty")
    assert len({prompt.text for prompt in found}) == 90
    with pytest.raises(
        ValueError, match="fewer than 7 different prompts for honesty outside the ones to avoid"
    ):
        world.prompts(random.Random(0), 7, "honesty", {prompt.text for prompt in found})
