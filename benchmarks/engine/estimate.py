"""How many GPU hours the figures of a Hub profile take, by a roofline (Williams, Waterman and Patterson, 2009): each pass of
a model takes the longer of reading its weights and of its multiplications, at a share of what the GPU can do, and some time to launch.
`make estimate PROFILE=qwen3-8b`. An estimate, to plan with; nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.spec.cells import ARGS, OBJECTIVES, ROLLOUT, Cell
from benchmarks.spec.profile import HubProfile
from benchmarks.subjects.hub.models import EVALUATION_REWARD, REWARD

PROMPT = 100  # tokens of a usual prompt


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes a second. speed: bfloat16 FLOPs a second. share: of either that decoding reaches;
    launch: seconds of a pass besides. Both are assumptions."""

    name: str
    bandwidth: float
    speed: float
    share: float
    launch: float


H100 = Gpu("H100", 3.35e12, 989e12, 0.35, 0.02)


def pass_seconds(billions: float, tokens: float, gpu: Gpu) -> float:
    """One forward pass over so many tokens, of all rows together: weights are read once, in two bytes each."""
    return (
        gpu.launch
        + max(2e9 * billions / gpu.bandwidth, 2e9 * billions * tokens / gpu.speed) / gpu.share
    )


def cell_seconds(
    profile: HubProfile, cell: Cell, prompts: int, samples: int, gpu: Gpu = H100
) -> float:
    """Decoding and scoring all responses of a cell."""
    billions = {kind: source.billions for kind, source in profile.models.items()}
    sweep, decoding = profile.sweep, profile.decoding
    responses = len(OBJECTIVES) * prompts * samples * cell.responses
    rows = min(decoding.batch_size, responses)
    steps = responses / rows * decoding.max_new_tokens
    seconds = steps * pass_seconds(billions[cell.model], rows, gpu)
    ratio = 0.0 if cell.gate == "never" else cell.target_ratio or 0.5
    if ratio:
        opened = 1 - (1 - ratio) ** rows  # steps at which some row is at a junction
        scored = rows * (
            ratio * decoding.candidates + 1
        )  # candidates, and what each row has to catch up
        if cell.value_model == ROLLOUT:
            further = rows * ratio * decoding.candidates
            rolled = sweep.rollout_tokens * pass_seconds(billions["base"], further, gpu)
            seconds += (
                steps
                * opened
                * (rolled + pass_seconds(billions[REWARD], further * sweep.rollout_tokens, gpu))
            )
        else:
            kind = REWARD if cell.value_model == ARGS else cell.value_model
            seconds += steps * opened * pass_seconds(billions[kind], scored, gpu)
    read = PROMPT + decoding.max_new_tokens
    batches = responses / rows
    if cell.search:
        seconds += batches * pass_seconds(billions[REWARD], rows * read, gpu)
    kept = (
        batches / cell.responses * (cell.responses.bit_length() if cell.search == "best-of" else 1)
    )  # every N has its best
    return seconds + kept * (
        pass_seconds(billions[EVALUATION_REWARD], rows * read, gpu)
        + pass_seconds(billions["base"], rows * read, gpu)
    )


def hours(
    profile: HubProfile, cells: Iterable[Cell], validations: Iterable[Cell], gpu: Gpu = H100
) -> float:
    """Of these test cells and validation cells (which count twice: thresholds may have to be corrected)."""
    evaluation = profile.evaluation
    total = sum(
        cell_seconds(
            profile, c, c.prompts or evaluation.prompts_per_objective, evaluation.samples, gpu
        )
        for c in cells
    )
    held = (evaluation.validation_prompts_per_objective, evaluation.validation_samples)
    return (total + 2 * sum(cell_seconds(profile, c, *held, gpu) for c in validations)) / 3600
