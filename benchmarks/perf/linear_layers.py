"""Linear layers of the lab's models by MKL and by oneDNN, on one core.

Prints milliseconds and their ratio, medians of rounds in turns:
`python -m benchmarks.perf.linear_layers`.
"""

import copy
import statistics
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.perf.timing import Run, in_turns
from benchmarks.runtime.workers import threads
from benchmarks.spec.profile import LabProfile, load_profile
from benchmarks.subjects.lab.linear import use_onednn

ROUNDS, CALLS = 15, 20
# positions of a step that scores ten candidates of 400 responses, and their newest tokens
ROWS = 4400


def main() -> None:
    """Time every shape of layer, forward and with gradients."""
    size, generator = cast(LabProfile, load_profile("lab")).model, torch.Generator().manual_seed(0)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {ROWS} positions, ms")
    hidden, inner = size.hidden_size, size.feed_forward
    for inputs, outputs in ((hidden, hidden), (hidden, inner), (inner, hidden)):
        mkl = nn.Linear(inputs, outputs, bias=False)
        layers = {"MKL": mkl, "oneDNN": use_onednn(copy.deepcopy(mkl))}
        x = torch.randn(ROWS, inputs, generator=generator)
        for learning in (False, True):
            runs = {name: calls_of(layer, x, learning) for name, layer in layers.items()}
            seconds = in_turns(runs, x.device, ROUNDS, "layers")
            ms = {n: 1e3 * statistics.median(times) / CALLS for n, times in seconds.items()}
            label = f"{inputs:4} → {outputs:4} {'with gradients' if learning else 'forward':15}"
            times = f"MKL {ms['MKL']:6.2f}  oneDNN {ms['oneDNN']:6.2f}"
            print(f"{label} {times}  ratio {ms['MKL'] / ms['oneDNN']:.2f}")


def calls_of(layer: nn.Linear, x: Tensor, learning: bool) -> Run:
    """Return a run of several calls of a layer, with gradients if it is learning."""
    x = x.clone().requires_grad_(learning)

    def run(seed: int) -> None:
        for _ in range(CALLS):
            with torch.set_grad_enabled(learning):
                y = layer(x)
            if learning:
                y.backward(y.detach())

    return run


if __name__ == "__main__":
    with threads(1):
        main()
