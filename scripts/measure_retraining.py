"""How far training the check profile again on another processor moves its metrics: results/check/reference/retraining.csv.

    python scripts/measure_retraining.py

Runs the check profile under several instruction sets of this processor, which round otherwise, each in a process of its own, and
writes what `make check` takes for no change. Needs an x86 processor with AVX-512, whose older instruction sets can be chosen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from benchmarks.analysis import tables
from benchmarks.checks import check
from benchmarks.runtime.files import CACHE, write_text
from benchmarks.spec.profile import load_profile

INSTRUCTIONS = {  # PyTorch's own kernels, and the matrix products of MKL and of oneDNN
    "avx512": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "compatible": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
}


def main() -> None:
    if len(sys.argv) == 2:  # a run under one of them
        from benchmarks.__main__ import FIGURES

        rows, _ = check.measure_again(FIGURES, load_profile(check.CHECKED))
        check.per_prompt(rows)[0].to_parquet(sys.argv[1])
        return
    profile, runs = load_profile(check.CHECKED), []
    with tempfile.TemporaryDirectory() as folder:
        for name, variables in INSTRUCTIONS.items():
            shutil.rmtree(
                CACHE / profile.name, ignore_errors=True
            )  # its numbers may be of other instructions
            path = Path(folder) / f"{name}.parquet"
            print(name)
            subprocess.run([sys.executable, __file__, path], check=True, env=os.environ | variables)
            runs.append(pd.read_parquet(path))
    path = check.reference(profile) / check.RETRAINING
    found = check.retraining_tolerance(runs)
    write_text(path, found.to_csv(index=False))
    print(found.to_string(index=False))
    print(f"written to {path.relative_to(tables.ROOT)}")


if __name__ == "__main__":
    main()
