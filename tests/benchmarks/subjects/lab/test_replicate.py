"""Prompts of a replicate."""

from benchmarks.spec.cells import OBJECTIVES
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.replicate import Replicate


def test_evaluation_prompts_never_occur_in_training():
    replicate = Replicate(load_profile("smoke"), 0)
    texts = {split: [p.text for p in prompts] for split, prompts in replicate.prompts.items()}
    everything = [text for many in texts.values() for text in many]
    assert len(everything) == len(set(everything))
    held_out = {text for split in ("test", "validation", "heldout") for text in texts[split]}
    for family in ("qwen3", "llama"):
        assert not held_out & {prompt.text for prompt, _ in replicate.corpus(5000, family)}
    counts = {o: sum(p.item.objective == o for p in replicate.prompts["test"]) for o in OBJECTIVES}
    assert set(counts.values()) == {15}
