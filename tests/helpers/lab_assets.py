"""Tiny models in the folders of a lab's replicate, and their export."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.runtime.files import seal
from benchmarks.spec.profile import Language, load_profile
from benchmarks.subjects.lab.replicate import Replicate
from scripts import export_lab_models
from sia import JunctionGate
from tests.helpers import tiny

FAMILY = "qwen3"


@dataclass(frozen=True)
class LabAssets:
    """An export and the replicate that was exported."""

    folder: Path
    replicate: Replicate

    @property
    def vocabulary(self) -> int:
        return len(self.replicate.tokenizer)


def trained_replicate(patch: pytest.MonkeyPatch, folder: Path) -> Replicate:
    """Return a replicate with subword tokens and tiny random models, cached below `folder`."""
    smoke = load_profile("smoke")
    profile = replace(
        smoke,
        language=Language("subwords", 150, 3, (4, 5, 6)),
        decoding=replace(smoke.decoding, max_new_tokens=8),
    )
    patch.setattr("benchmarks.subjects.lab.replicate.CACHE", folder)
    replicate = Replicate.open(profile, 0)
    size = len(replicate.tokenizer)
    base = tiny.language_model(FAMILY, 0, size)
    base.save_pretrained(replicate.path("base", FAMILY))
    tiny.value_model(FAMILY, 1, size).save_pretrained(replicate.path("value-token", FAMILY))
    heads = replicate.path("heads-token", FAMILY)
    JunctionGate(0.1, tiny.predictor(base)).save_pretrained(heads)
    tiny.q_head(base, vocabulary=size).save_pretrained(heads)
    for sealed in replicate.folder.iterdir():
        seal(sealed)
    return replicate


def export(patch: pytest.MonkeyPatch, folder: Path) -> LabAssets:
    """Export tiny models, calibrated and measured on few prompts."""
    replicate = trained_replicate(patch, folder / "cache")
    export_lab_models.export(replicate, folder / "assets" / "lab", 9)
    return LabAssets(folder / "assets" / "lab", replicate)
