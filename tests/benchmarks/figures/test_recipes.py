"""The recipes of CONTRIBUTING.md: a new figure is one file, a new gate one class."""

import importlib
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from benchmarks import __main__, figures
from benchmarks.analysis import tables
from benchmarks.engine.gates import gate_of
from benchmarks.figures import base, methods, registry, style
from benchmarks.report import render
from benchmarks.runtime.fingerprints import ROOT
from benchmarks.spec.cells import OBJECTIVES
from sia import calibrate
from sia.gates import GATES, EntropyGate, Step
from tests.helpers import tiny
from tests.helpers.fake import SMOKE, FakeResults
from tests.helpers.project import redirect_output

NEW_FIGURE = '''"""Length of base responses."""

from benchmarks.analysis import estimates
from benchmarks.figures import methods, style
from benchmarks.figures.base import Figure
from benchmarks.spec.cells import FigureCells


class BaseLength(Figure):
    """Length of base responses."""

    measured = ("steered", "tokens")
    reported = ("tokens",)

    def cells(self, profile, replicate):
        return FigureCells([methods.base(replicate, profile.families[0])])

    def summarize(self, rows, profile):
        scores = estimates.method_scores(rows, ("tokens",))
        return estimates.summarize(scores, ("tokens",), profile)

    def plot(self, table, profile, stale, folder):
        figure = style.plt.figure(figsize=(style.COLUMN, 2))
        axis = figure.subplots()
        style.sns.barplot(estimates.pooled(table), x="objective", y="estimate", ax=axis)
        axis.set(ylabel="length (tokens)")
        caption = style.sample_size_note(table, profile)
        entry = style.handle("base")
        return style.finish(figure, [entry], caption, folder, self.name, stale=stale)
'''


@pytest.fixture
def new_figure(tmp_path, monkeypatch):
    """The registry with one more file among those of the figures."""
    (tmp_path / "base_length.py").write_text(NEW_FIGURE, encoding="utf-8")
    monkeypatch.setattr(figures, "__path__", [*figures.__path__, str(tmp_path)])
    monkeypatch.setattr(__main__, "FIGURES", importlib.reload(registry).FIGURES)
    yield registry.FIGURES["base-length"]
    del base.REGISTERED["base-length"], sys.modules["benchmarks.figures.base_length"]
    monkeypatch.undo()
    importlib.reload(registry)


def test_a_new_figure_is_one_file(new_figure, tmp_path, monkeypatch):
    redirect_output(monkeypatch, tmp_path)
    monkeypatch.setattr(tables, "drawing_code", lambda name: "code")  # not in the folder of all
    assert "base-length" in __main__.build_parser().format_help()
    assert new_figure.why_unsupported(SMOKE) == ""
    rows = new_figure.collect(SMOKE, range(2), FakeResults(SMOKE))
    summary = new_figure.summarize(rows, SMOKE)
    tables.write_table(SMOKE, "base-length", rows, summary, range(2), 1.0, {})
    assert __main__.main(["figures", "--profile", "smoke"]) == 0
    assert {path.name for path in (tmp_path / "figures/smoke").glob("base-length.*")} == {
        "base-length.png",
        "base-length.pdf",
    }
    page = (tmp_path / "figures/smoke" / render.REPORT).read_text(encoding="utf-8")
    assert '<section id="base-length">' in page
    assert "Length of base responses" in page


def test_make_finds_a_new_figure(tmp_path):
    folder = tmp_path / "benchmarks/figures"
    folder.mkdir(parents=True)
    for path in (ROOT / "benchmarks/figures").glob("*.py"):
        (folder / path.name).touch()
    (folder / "base_length.py").touch()
    command = ["make", "-s", "-C", tmp_path, "-f", ROOT / "Makefile", "help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = text[text.index("One figure, drawn") :].split()
    assert "base-length" in line
    assert set(registry.FIGURES) <= set(line)
    assert not {"base", "methods", "registry", "style"} & set(line)


def test_figures_are_known_without_torch():
    """Drawing takes seconds; nothing that measures is imported."""
    heavy = ("torch", "sia", "transformers", "benchmarks.engine", "benchmarks.subjects")
    code = (
        "import sys, benchmarks.figures.registry as r; assert len(r.FIGURES) > 10; "
        f"imported = [n for n in {heavy} if n in sys.modules]; assert not imported, imported"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_new_gate_is_one_class(monkeypatch):
    monkeypatch.setitem(style.PALETTE, "low-entropy", style.Look("#CC3311", "*"))

    @dataclass(frozen=True)
    class LowEntropyGate(EntropyGate):
        """Open where the entropy is below `threshold` nats."""

        name = "low-entropy"
        label = "low entropy"

        def opens(self, step: Step) -> torch.Tensor:
            return ~super().opens(step)

        @classmethod
        def fit(cls, generations, ratio, **settings):
            return super().fit(generations, 1 - ratio, **settings)

    try:
        model, prompts = tiny.language_model("qwen3"), tiny.prompts(4)
        generations = tiny.generate(model, prompts, max_new_tokens=40)
        threshold = calibrate(LowEntropyGate, generations, 0.2).threshold
        entropies = np.concatenate([generation.entropy for generation in generations])
        assert 0.15 < (entropies < threshold).mean() <= 0.2
        request = methods.steered(0, "qwen3", "token", gate="low-entropy", ratio=0.2)
        assert request.method == "low-entropy"
        assert GATES["low-entropy"].calibrated
        cell = request.resolve(1.0, [0.5, 1.0, 1.5])
        gates = [gate_of(None, cell, objective) for objective in OBJECTIVES]
        assert gates == [LowEntropyGate(t) for t in (0.5, 1, 1.5)]
        assert style.handle("low-entropy").get_label() == "low entropy"
    finally:
        del GATES["low-entropy"]
