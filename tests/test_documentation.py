"""The front page: short, legible, and its quickstart runs; the session of the usage page."""

import subprocess
import sys

from benchmarks.runtime.fingerprints import ROOT
from tests.helpers import hub_folders, tiny


def python_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


def test_the_front_page_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 200


def test_the_quickstart_runs_on_folders_of_the_hubs_form_with_the_library_alone(tmp_path):
    base = hub_folders.save_model(tmp_path / "base", "qwen3", seed=0, kind="base")
    hub_folders.save_value_model(tmp_path / "SIA" / "VM-Qwen3-1.7B-Base", base)
    code = python_blocks("README.md")[0]
    code = code.replace("Qwen/Qwen3-1.7B-Base", str(base)).replace("=256", "=12")
    code = code.replace("Runyi-Hu/SIA", str(tmp_path / "SIA"))
    code += "\nimport sys\nprint(output.shape[0])\n"
    code += "print({'lm_eval', 'pandas', 'matplotlib', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert (words[0], words[-2:]) == ("Human:", ["1", "set()"])


def test_the_documentation_steers_the_models_of_the_lab(lab_assets, tmp_path):
    """The lab's quickstart, and the session of the usage page with an owner's further models."""
    base = tiny.language_model("qwen3", 3, lab_assets.vocabulary)
    rewards = tiny.reward_model("qwen3", 4, lab_assets.vocabulary)
    for model, name in ((base, "autoregressive-reward-model"), (rewards, "reward-model")):
        model.save_pretrained(tmp_path / "owner" / name)
    readme = python_blocks("README.md")[-1]
    usage = "\n".join(python_blocks("docs/usage.md"))
    for code, lines in ((readme, 1), (usage, 10)):
        assert 'lab = "assets/lab"' in code
        code = code.replace("assets/lab", str(lab_assets.folder)).replace("=256", "=12")
        code = code.replace('"owner/', f'"{tmp_path}/owner/')
        code = code.replace("hub/custom_generate", str(ROOT / "hub/custom_generate"))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.strip().splitlines()) == lines
    assert "junctions=" in done.stdout
    assert (tmp_path / "my-value-model" / "value_head.safetensors").exists()
