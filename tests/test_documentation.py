"""The front page: short, legible, and its quickstart runs."""

import subprocess
import sys

from benchmarks.runtime.fingerprints import ROOT
from tests.helpers import hub_folders
from tests.helpers.documents import python_blocks


def test_the_front_page_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 200


def test_the_quickstart_runs_on_folders_of_the_hubs_form_with_the_library_alone(tmp_path):
    base = hub_folders.save_model(tmp_path / "base", "qwen3", seed=0, kind="base")
    hub_folders.save_value_model(tmp_path / "SIA" / "VM-Qwen3-1.7B-Base", base)
    code = python_blocks("README.md")[0]
    code = code.replace("Qwen/Qwen3-1.7B-Base", str(base))
    code = code.replace("Runyi-Hu/SIA", str(tmp_path / "SIA"))
    code += "\nimport sys\nprint(output.shape[0])\n"
    code += "print({'lm_eval', 'pandas', 'matplotlib', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "set()"]
