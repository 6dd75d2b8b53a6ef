"""Times of cells, by a clock that moves only while something is said to take time."""

from types import SimpleNamespace

from benchmarks.engine import timing
from benchmarks.spec.cells import Cell
from benchmarks.spec.profile import load_profile


def test_responding_and_the_choice_of_the_best_are_timed_once_for_each_prompt(monkeypatch):
    clock, calls = [0.0], []

    def takes(seconds, result):
        clock[0] += seconds
        return result

    def respond(subject, shard, prompts, seeds):
        calls.append((shard.objective, prompts, seeds))
        return takes(6.0 * shard.cell.responses, [["a", "b"]] * shard.cell.responses)

    expanded = (["p", "q", "more", "p"], [0, 1, 2, 0], [0, 0, 0, 1])
    replacements = {
        "time": SimpleNamespace(perf_counter=lambda: clock[0]),
        "subject_of": lambda profile, replicate: takes(100.0, SimpleNamespace(batch_size=2)),
        "expand_prompts": lambda subject, shard: takes(100.0, expanded),
        "respond": respond,
        "choose_best": lambda subject, samples, prompts: takes(1.0, None),
    }
    for name, replacement in (replacements | {"TIMED_PROMPTS": 2}).items():
        monkeypatch.setattr(timing, name, replacement)
    cells = [Cell(0, "qwen3"), Cell(0, "qwen3", search="best-of", responses=4)]
    assert timing.time_cells((load_profile("smoke"), cells, 2)).to_dict("list") == {
        "cell": [0, 1, 0, 1],
        "prompt": [1, 1, 2, 2],
        "seconds": [3.0, 12.5, 3.0, 12.5],
    }
    # the first round, which is not kept, is of the first objective
    objectives = ["harmlessness"] * 2 + ["helpfulness"] * 2 + ["honesty"] * 2
    assert calls == [(objective, ["p", "q"], [0, 0]) for objective in objectives]
