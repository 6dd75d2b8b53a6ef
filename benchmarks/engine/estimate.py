"""GPU hours of the figures of a Hub profile, by a roofline (Williams, Waterman, Patterson, 2009).

Each pass of a model takes the longer of reading its weights and of its multiplications, at a
share of what the GPU can do, and some time to launch. An estimate to plan with; nothing here is
measured. `make estimate PROFILE=qwen3-8b`.
"""

from collections.abc import Iterable
from dataclasses import replace

from benchmarks.engine.sweep import Sweep
from benchmarks.spec.cells import (
    DIVERGENCE,
    OBJECTIVES,
    ROUNDS,
    TIMED_PROMPTS,
    Cell,
    CellRequest,
    FigureCells,
)
from benchmarks.spec.methods import EVALUATION_REWARD, REWARD, ROLLOUT
from benchmarks.spec.model_kinds import Q_HEAD, VOCABULARY, value_kind
from benchmarks.spec.profile import HubProfile
from benchmarks.subjects.hub.memory import weight_bytes

PROMPT = 100  # tokens of a usual prompt


GPU = "H100"
BANDWIDTH, SPEED = 3.35e12, 989e12  # bytes per second; FLOPs per second in bfloat16
SHARE = 0.35  # of either that decoding reaches: an assumption, as is LAUNCH
LAUNCH = 0.02  # seconds of a pass besides
# of a value model of one's own: responses as in the paper, and the defaults of the scripts
RESPONSES, EPOCHS, BATCH, BATCH_TOKENS = 68_000, 3, 8, 2**15
BACKWARD = 2  # passes that the backward pass takes the time of
GATE_PROMPTS, GATE_ROWS, GATE_TOKENS = 1000, 64, 128


def pass_seconds(billions: float, tokens: float) -> float:
    """Return the seconds of one pass over `tokens` of all rows; weights have 2 bytes each."""
    reading = 2e9 * billions / BANDWIDTH
    multiplying = 2e9 * billions * tokens / SPEED
    return LAUNCH + max(reading, multiplying) / SHARE


def with_sizes(profile: HubProfile) -> HubProfile:
    """Return the profile with the sizes of local models that it does not state, by their files."""
    sizes = {kind: weight_bytes(source, "bfloat16") for kind, source in profile.models.items()}
    models = {
        kind: source if source.billions else replace(source, billions=sizes[kind] / 2e9)
        for kind, source in profile.models.items()
    }
    return replace(profile, models=models)


def decoding_seconds(profile: HubProfile, cell: Cell | CellRequest, responses: int) -> float:
    """Return the seconds of decoding so many responses of a cell, searches with their rewards."""
    billions = {kind: source.billions for kind, source in profile.models.items()}
    sweep, decoding = profile.sweep, profile.decoding
    rows = min(decoding.batch_size, responses)
    batches = responses / rows
    steps = batches * decoding.max_new_tokens
    seconds = steps * pass_seconds(billions[str(cell.model)], rows)
    ratio = cell.target_ratio or 0.5
    if cell.gate in ("never", DIVERGENCE):  # a scorer there is asked at every step
        ratio = 1.0
    if cell.scorer and cell.scorer.name != Q_HEAD:  # which is no model of its own
        opened = 1 - (1 - ratio) ** rows  # share of steps at which some row is at a junction
        if cell.scorer == ROLLOUT:
            rollouts = rows * ratio * decoding.candidates
            rolled = sweep.rollout_tokens * pass_seconds(billions["base"], rollouts)
            scoring = rolled + pass_seconds(billions[REWARD], rollouts * sweep.rollout_tokens)
        elif cell.scorer.name == VOCABULARY:
            scoring = pass_seconds(billions[str(value_kind(cell.scorer.loss))], rows)
        else:
            scored = rows * (ratio * decoding.candidates + 1)  # 1: what a row has to catch up
            scoring = pass_seconds(billions[str(cell.scorer)], scored)
        seconds += steps * opened * scoring
    if cell.search:
        read = rows * (PROMPT + decoding.max_new_tokens)
        seconds += batches * pass_seconds(billions[REWARD], read)
    return seconds


def cell_seconds(
    profile: HubProfile, cell: Cell | CellRequest, prompts: int, samples: int
) -> float:
    """Return the seconds of decoding and scoring all responses of a cell."""
    responses = len(OBJECTIVES) * prompts * samples * cell.responses
    rows = min(profile.decoding.batch_size, responses)
    read = rows * (PROMPT + profile.decoding.max_new_tokens)
    # every N of best-of-N has its best
    kept = cell.responses.bit_length() if cell.search == "best-of" else 1
    judges = (profile.models[kind].billions for kind in (EVALUATION_REWARD, "base"))
    judging = sum(pass_seconds(billions, read) for billions in judges)
    scored = responses / rows / cell.responses * kept
    return decoding_seconds(profile, cell, responses) + scored * judging


def timing_hours(profile: HubProfile, cells: Iterable[CellRequest]) -> float:
    """Return the hours of timing cells, round by round, while no other GPU works."""
    every = profile.evaluation.prompts_per_objective
    rounds = (
        decoding_seconds(profile, cell, min(cell.prompts or every, TIMED_PROMPTS) * cell.responses)
        for cell in cells
    )
    return (ROUNDS + 1) * sum(rounds) / 3600


def value_model_hours(profile: HubProfile) -> dict[str, float]:
    """Return the hours of each step to a value model and a junction gate of one's own.

    For `RESPONSES` responses: scored by the profile's reward model, learned by LoRA on the backbone
    of its value model; the gate is fitted to responses to `GATE_PROMPTS` prompts.
    """
    billions = {kind: source.billions for kind, source in with_sizes(profile).models.items()}
    value = billions[str(value_kind(profile.losses[0]))]
    length = PROMPT + profile.decoding.max_new_tokens
    passes = RESPONSES * length / BATCH_TOKENS
    steps = EPOCHS * RESPONSES / BATCH * (1 + BACKWARD)
    decoded = GATE_PROMPTS / GATE_ROWS * GATE_TOKENS
    dense = pass_seconds(value, GATE_ROWS * (profile.decoding.candidates + 1))
    seconds = {
        "train": steps * pass_seconds(value, BATCH * length),
        "gate": decoded * (pass_seconds(billions["base"], GATE_ROWS) + dense),
    }
    if REWARD in billions:
        annotating = passes * pass_seconds(billions[REWARD], BATCH_TOKENS)
        seconds = {"annotate": annotating} | seconds
    return {step: time / 3600 for step, time in seconds.items()}


def gpu_hours(
    profile: HubProfile,
    cells: Iterable[Cell | CellRequest],
    validations: Iterable[Cell | CellRequest],
) -> float:
    """Return the hours of test cells and validation cells.

    Validation cells count twice: thresholds may have to be calibrated again.
    """
    evaluation = profile.evaluation
    held_out = (evaluation.validation_prompts_per_objective, evaluation.validation_samples)
    seconds = 2 * sum(cell_seconds(profile, cell, *held_out) for cell in validations)
    for cell in cells:
        prompts = cell.prompts or evaluation.prompts_per_objective
        seconds += cell_seconds(profile, cell, prompts, evaluation.samples)
    return seconds / 3600


def figure_hours(profile: HubProfile, needs: dict[str, FigureCells]) -> dict[str, float]:
    """Return the hours of each figure alone, and of "all" together, which share cells."""
    calibrator = Sweep(profile).calibrator
    sized, hours = with_sizes(profile), {}
    for name, need in (needs | {"all": FigureCells.union(needs.values())}).items():
        requests = dict.fromkeys([*need.cells, *need.traces])
        unsteered, steered = calibrator.stages(requests)
        hours[name] = gpu_hours(sized, requests, [*unsteered, *steered])
        hours[name] += timing_hours(sized, dict.fromkeys(need.timed))
    return hours
