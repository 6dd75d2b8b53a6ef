"""GPU hours of the figures of a Hub profile, by a roofline (Williams, Waterman, Patterson, 2009).

Each pass of a model takes the longer of reading its weights and of its multiplications, at a
share of what the GPU can do, and some time to launch. An estimate to plan with; nothing here is
measured. `make estimate PROFILE=qwen3-8b`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.spec.cells import OBJECTIVES, Cell, CellRequest, FigureCells
from benchmarks.spec.methods import EVALUATION_REWARD, REWARD, ROLLOUT
from benchmarks.spec.profile import HubProfile

PROMPT = 100  # tokens of a usual prompt


@dataclass(frozen=True)
class Gpu:
    """A GPU and how well decoding uses it (`share` and `launch` are assumptions).

    Args:
        bandwidth: Bytes per second.
        speed: FLOPs per second in bfloat16.
        share: Share of either that decoding reaches.
        launch: Seconds of a pass besides.
    """

    name: str
    bandwidth: float
    speed: float
    share: float
    launch: float


H100 = Gpu("H100", 3.35e12, 989e12, 0.35, 0.02)


def pass_seconds(billions: float, tokens: float, gpu: Gpu) -> float:
    """Return the seconds of one pass over `tokens` of all rows; weights have 2 bytes each."""
    reading = 2e9 * billions / gpu.bandwidth
    multiplying = 2e9 * billions * tokens / gpu.speed
    return gpu.launch + max(reading, multiplying) / gpu.share


def cell_seconds(
    profile: HubProfile, cell: Cell | CellRequest, prompts: int, samples: int, gpu: Gpu = H100
) -> float:
    """Return the seconds of decoding and scoring all responses of a cell."""
    billions = {kind: source.billions for kind, source in profile.models.items()}
    sweep, decoding = profile.sweep, profile.decoding
    responses = len(OBJECTIVES) * prompts * samples * cell.responses
    rows = min(decoding.batch_size, responses)
    batches = responses / rows
    steps = batches * decoding.max_new_tokens
    seconds = steps * pass_seconds(billions[str(cell.model)], rows, gpu)
    ratio = 0.0 if cell.gate == "never" else cell.target_ratio or 0.5
    if ratio:
        opened = 1 - (1 - ratio) ** rows  # share of steps at which some row is at a junction
        if cell.scorer == ROLLOUT:
            rollouts = rows * ratio * decoding.candidates
            rolled = sweep.rollout_tokens * pass_seconds(billions["base"], rollouts, gpu)
            scoring = rolled + pass_seconds(billions[REWARD], rollouts * sweep.rollout_tokens, gpu)
        else:
            scored = rows * (ratio * decoding.candidates + 1)  # 1: what a row has to catch up
            scoring = pass_seconds(billions[str(cell.scorer)], scored, gpu)
        seconds += steps * opened * scoring
    read = rows * (PROMPT + decoding.max_new_tokens)
    if cell.search:
        seconds += batches * pass_seconds(billions[REWARD], read, gpu)
    # every N of best-of-N has its best
    kept = cell.responses.bit_length() if cell.search == "best-of" else 1
    judging = pass_seconds(billions[EVALUATION_REWARD], read, gpu)
    judging += pass_seconds(billions["base"], read, gpu)
    return seconds + batches / cell.responses * kept * judging


def gpu_hours(
    profile: HubProfile,
    cells: Iterable[Cell | CellRequest],
    validations: Iterable[Cell | CellRequest],
    gpu: Gpu = H100,
) -> float:
    """Return the hours of test cells and validation cells.

    Validation cells count twice: thresholds may have to be calibrated again.
    """
    evaluation = profile.evaluation
    held_out = (evaluation.validation_prompts_per_objective, evaluation.validation_samples)
    seconds = 2 * sum(cell_seconds(profile, cell, *held_out, gpu) for cell in validations)
    for cell in cells:
        prompts = cell.prompts or evaluation.prompts_per_objective
        seconds += cell_seconds(profile, cell, prompts, evaluation.samples, gpu)
    return seconds / 3600


def figure_hours(profile: HubProfile, needs: dict[str, FigureCells]) -> dict[str, float]:
    """Return the hours of each figure alone, and of "all" together, which share cells."""
    from benchmarks.engine.sweep import Sweep

    calibrator = Sweep(profile).calibrator
    hours = {}
    for name, need in (needs | {"all": FigureCells.union(needs.values())}).items():
        requests = dict.fromkeys([*need.cells, *need.traces])
        unsteered, steered = calibrator.stages(requests)
        hours[name] = gpu_hours(profile, requests, [*unsteered, *steered])
    return hours
