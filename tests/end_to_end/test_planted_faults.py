"""Planted faults are caught, and docs/testing.md says by which tests."""

import os
import subprocess
import sys

import pytest

from benchmarks.runtime.fingerprints import ROOT
from tests.planted_faults import FAULTS

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name):
    fault = FAULTS[name]
    command = [sys.executable, "-m", "pytest", "-p", "tests.planted_faults", "--tb=line", "-rf"]
    result = subprocess.run(
        [*command, *fault.caught_by],
        cwd=ROOT,
        env=os.environ | {"PLANTED_FAULT": name},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED ")]
    for test in fault.caught_by:
        assert any(test in line for line in failed), result.stdout[-2000:]
    # a wrong number, not a planted function that no longer fits its calls
    assert "TypeError" not in result.stdout, result.stdout[-2000:]


def test_the_docs_list_what_catches_each_fault():
    text = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
    for name, fault in FAULTS.items():
        tests = ", ".join(f"`{test}`" for test in fault.caught_by)
        assert f"| {name} | {tests} |" in text
