"""Forecast of a run, before it begins: memory of a worker, hours of the GPUs that are here.

As in `benchmarks.engine.estimate`, nothing here is measured.
"""

import sys
from dataclasses import replace

import torch

from benchmarks.engine.estimate import BANDWIDTH, GPU, SPEED, figure_hours
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import Hardware, HubProfile
from benchmarks.subjects.hub.memory import gpus_each, memory, unknown_sizes
from benchmarks.subjects.hub.models import kinds_of

CARDS = {  # GB and 1e12 operations per second in bfloat16, as their maker states them
    "H200": (4800, 989),
    "H100 PCIe": (2000, 756),
    "H100": (3350, 989),
    "A100": (1550, 312),
    "L40S": (864, 362),
    "A10": (600, 70),
    "RTX 4090": (1010, 165),
    "RTX 3090": (936, 71),
    "L4": (300, 121),
    "T4": (320, 65),
}
ASK_FROM = 0.1  # hours from which a run asks at a terminal


def slowdown(card: str) -> float | None:
    """Return how many times as long as the estimate's GPU a card takes at most; None if unknown."""
    for name, (gigabytes, teraflops) in CARDS.items():
        if name in card:
            return max(BANDWIDTH / gigabytes / 1e9, SPEED / teraflops / 1e12)
    return None


def forecast(profile: HubProfile, needs: FigureCells, hardware: Hardware) -> tuple[str, float]:
    """Return a sentence about the memory and the hours of a run, and the hours.

    Models of unknown size take neither: `announce` names them.
    """
    needed = memory(profile, models_of(needs), hardware)
    batches = replace(profile.decoding, batch_size=hardware.batch_size)
    hours = figure_hours(replace(profile, decoding=batches), {"run": needs})["run"]
    gpus = torch.cuda.device_count() if hardware.device == "cuda" else 0
    if not gpus:  # none here, or those of a cluster
        sentence = f"needs {format_gigabytes(needed)} for each worker, and {format_hours(hours)}"
        return f"{sentence} of one {GPU}", hours
    card = torch.cuda.get_device_properties(0)
    each = gpus_each(needed, card.total_memory, gpus)
    factor = slowdown(card.name)
    hours *= (factor or 1.0) / (gpus // each)
    place = "on this card" if gpus == 1 else f"on these {gpus} cards"
    place += f", {each} for each worker" if each > 1 else ""
    name = card.name if factor else f"{card.name}, taken for a {GPU}"
    sentence = f"needs {format_gigabytes(needed)} and about {format_hours(hours)} {place} ({name})"
    if needed > each * card.total_memory:
        available = format_gigabytes(each * card.total_memory)
        sentence += f"; that is more than {available}: use a smaller BATCH_SIZE"
    return sentence, hours


def models_of(needs: FigureCells) -> set[str]:
    """Return the models that cells need, by kind."""
    return {kind for cell in needs.requests for kind in kinds_of(cell)}


def format_gigabytes(count: float) -> str:
    """Return a number of bytes in GB."""
    return f"{count / 1e9:.0f} GB"


def format_hours(hours: float) -> str:
    """Return a duration in hours or minutes."""
    return f"{hours:.1f} h" if hours >= 1 else f"{max(1, round(60 * hours))} min"


def announce(profile: HubProfile, needs: FigureCells, hardware: Hardware) -> None:
    """Print what a run will take and, at a terminal, ask whether it should begin.

    Raises:
        ValueError: If it should not.
    """
    sentence, hours = forecast(profile, needs, hardware)
    print(f"{profile.name}: {sentence} (an estimate; cells measured before take no time)")
    if unknown := unknown_sizes(profile, models_of(needs)):
        print(f"{profile.name}: {unknown}")
    if hours < ASK_FROM or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    try:
        reply = input("continue? [Y/n] ").strip().lower()
    except EOFError:
        reply = "no"
    if reply in ("n", "no"):
        raise ValueError("not started, as you answered")
