"""The lab models' linear layers by MKL and by oneDNN, on one core: milliseconds and their ratio, medians of 15 rounds in turns.

python scripts/time_linear_layers.py
"""

from __future__ import annotations

import copy
import statistics
import time

import torch

from benchmarks.runtime.workers import threads
from benchmarks.spec.profile import load_profile
from benchmarks.subjects.lab.linear import by_onednn

ROUNDS, CALLS = 15, 20
ROWS = 4400  # positions of a step that scores ten candidates of 400 responses, and each response's newest token


def main() -> None:
    size, draw = load_profile("lab").model, torch.Generator().manual_seed(0)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {ROWS} positions, forward and with gradients, ms"
    )
    for inputs, outputs in (
        (size.hidden_size,) * 2,
        (size.hidden_size, size.feed_forward),
        (size.feed_forward, size.hidden_size),
    ):
        plain = torch.nn.Linear(inputs, outputs, bias=False)
        layers = {"MKL": plain, "oneDNN": by_onednn(copy.deepcopy(plain))}
        x = torch.randn(ROWS, inputs, generator=draw)
        for learning in (False, True):
            seconds: dict[str, list[float]] = {name: [] for name in layers}
            for _ in range(ROUNDS):
                for name, layer in layers.items():
                    seconds[name].append(timed(layer, x, learning))
            mkl, onednn = (statistics.median(times) * 1e3 for times in seconds.values())
            what = "with gradients" if learning else "forward"
            print(
                f"{inputs:4} → {outputs:4} {what:15} MKL {mkl:6.2f}  oneDNN {onednn:6.2f}  ratio {mkl / onednn:.2f}"
            )


def timed(layer: torch.nn.Linear, x: torch.Tensor, learning: bool) -> float:
    """Seconds of a call."""
    x = x.clone().requires_grad_(learning)
    start = time.perf_counter()
    for _ in range(CALLS):
        with torch.set_grad_enabled(learning):
            y = layer(x)
        if learning:
            y.backward(y.detach())
    return (time.perf_counter() - start) / CALLS


if __name__ == "__main__":
    with threads(1):
        main()
