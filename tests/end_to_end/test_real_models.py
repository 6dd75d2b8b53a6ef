"""Every target of a profile of real models, at the smallest scale and in half precision."""

import json
from pathlib import Path

import pandas as pd
from PIL import Image

from benchmarks.__main__ import main, supported_figures
from benchmarks.analysis import tables
from benchmarks.runtime.files import write_atomically
from benchmarks.runtime.workers import ThisProcess
from benchmarks.spec.profile import load_profile
from tests.helpers import hub_folders

SMALLER = {
    "prompts_per_objective = 5": "prompts_per_objective = 2\nsamples = 2",
    "validation_prompts_per_objective = 3": "validation_prompts_per_objective = 1",
    "max_new_tokens = 8": "max_new_tokens = 5",
    "ratios = [0.2, 0.5]\nmain_ratios = [0.2, 0.5]": "ratios = [0.2]\nmain_ratios = [0.2]",
    "betas = [1.0, 4.0, inf]": "betas = [1.0, inf]",
    "thresholds = [1.0, 1.5]": "thresholds = [1.0]",
}
UNIT = ["objective", "prompt"]


def draw(names, profile) -> list[list[Path]]:
    """Write a picture of one pixel in place of each figure: test_figures draws them."""
    drawn = []
    for name in names:
        path = tables.FIGURES / profile.name / f"{name}.png"
        write_atomically(path, Image.new("RGB", (1, 1)).save)
        drawn.append([path])
    return drawn


def test_every_target_in_bfloat16(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.engine.run.Workers", lambda *_: ThisProcess())
    monkeypatch.setattr("benchmarks.engine.sweep.ROUNDS", 1)
    monkeypatch.setattr("benchmarks.__main__.draw", draw)
    project("qwen3", hub_folders.save_hub(tmp_path / "hub", "qwen3"))
    path = tmp_path / "profiles/tiny.toml"
    text = path.read_text(encoding="utf-8")
    for usual, smaller in SMALLER.items():
        assert usual in text
        text = text.replace(usual, smaller)
    path.write_text(text, encoding="utf-8")
    options = ["--profile", "tiny", "--device", "cpu", "--dtype", "bfloat16", "--batch-size", "4"]
    assert main(["reproduce", *options]) == 0
    assert "report: figures/tiny/report.html" in capsys.readouterr().out
    folder, names = tables.folder(load_profile("tiny")), supported_figures(load_profile("tiny"))
    assert {"figure1", "figure4", "cost", "entropy", "junctions"} <= set(names)
    for name in names:
        provenance = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        assert provenance["dtype"] == "bfloat16"
    # views show the responses that were measured, though these were decoded in larger batches
    shown = pd.read_parquet(folder / "junctions.parquet").query("method == 'sia' and chosen")
    measured = pd.read_parquet(folder / "figure1.parquet").query(
        "method == 'sia' and target_ratio == 0.2 and beta == 1 and seed == 0"
    )
    columns = ["tokens", "steered"]
    seen = shown.groupby(UNIT, observed=True)["steered"].agg(["size", "sum"])
    rows = measured.drop_duplicates(UNIT).set_index(UNIT)[columns].sort_index()
    assert seen.sort_index().to_numpy().tolist() == rows.to_numpy().tolist()
