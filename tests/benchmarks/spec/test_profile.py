"""Reading profiles: defaults, digests, and one sentence for whatever is wrong."""

import copy
import dataclasses
import re
import shutil

import pytest

from benchmarks.spec import profile as profiles
from benchmarks.spec.profile import load_profile, profile_digest

SMOKE = load_profile("smoke")


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        ("documents = 6000", "document = 6000", " [training]: missing documents, unknown document"),
        ("[statistics]", "[statistic]", ": missing statistics, unknown statistic"),
        ("drift = 0.16", "speed = 0.16", " [worlds]: missing drift, unknown speed"),
        ("[sweep]", "[sweep", " is not valid TOML: Expected ']' at the end of a table"),
        ("replicates = 1", "replicates = '1'", ": replicates should be a valid integer, got '1'"),
        ("documents = 6000", "documents = 0.5", " [training]: documents should be a valid integer"),
        ("0.2, 0.5]", "0.2, 1.0]", " [sweep]: ratios should be less than 1, got 1.0"),
        (
            "main_ratios = [0.2, 0.5]",
            "main_ratios = [0.2, 0.7]",
            " [sweep]: main_ratios must be some of ratios, got (0.2, 0.7)",
        ),
        (
            "reduced_ratios = [0.2]",
            "reduced_ratios = []",
            " [sweep]: reduced_ratios must be some of ratios, got ()",
        ),
        (
            "betas = [1.0, 4.0, inf]",
            "betas = [4.0]",
            " [sweep]: betas must contain 1.0, got (4.0,)",
        ),
        (
            "betas = [1.0, 4.0, inf]",
            "betas = [1.0, 4.0, 4.0]",
            " [sweep]: betas must differ from one another, got (1.0, 4.0, 4.0)",
        ),
        (
            "temperature = 1.0",
            "temperature = inf",
            " [decoding]: temperature should be a finite number, got inf",
        ),
        (
            'families = ["qwen3", "llama"]',
            'families = ["qwen3", "gpt"]',
            ": families should be 'qwen3' or 'llama', got 'gpt'",
        ),
        (
            'families = ["qwen3", "llama"]',
            'families = ["qwen3", "qwen3"]',
            ": families must differ from one another, got ('qwen3', 'qwen3')",
        ),
        (
            "tuning = [1.0, 4.0]",
            "tuning = [2.0]",
            " [sweep]: tuning must be some of betas, got (2.0,)",
        ),
        ("[1.0, 1.5]", "[1.5]", " [sweep]: thresholds must contain 1.0, got (1.5,)"),
        (
            "responses = 4",
            "responses = 6",
            " [sweep]: responses must be a power of 2, at least beams, got 6",
        ),
        (
            "beam_width = 2",
            "beam_width = 3",
            " [sweep]: beams must be a multiple of beam_width, got 4",
        ),
        (
            "beams = 4\nbeam_width = 2",
            "beams = 3\nbeam_width = 1",
            " [sweep]: beams must be a power of 2, got 3",
        ),
        (
            "[decoding]",
            "[hardware]\nbatch_size = 3\n[decoding]",
            ": hardware is no part of a profile: pass DEVICE=, DTYPE= or BATCH_SIZE=",
        ),
        (
            "candidates = 10",
            "candidates = 100000",
            " [decoding]: candidates should be less than or equal to 127, got 100000",
        ),
        (
            "max_new_tokens = 20",
            "max_new_tokens = 9999999",
            " [decoding]: max_new_tokens should be less than or equal to 32767, got 9999999",
        ),
        ("level = 0.95", "level = 95", " [statistics]: level should be less than 1, got 95"),
        (
            "best_fraction = 0.25",
            "best_fraction = 1.25",
            " [training]: best_fraction should be less than or equal to 1, got 1.25",
        ),
        (
            "value_epochs = 1",
            "value_epochs = 0",
            " [training]: value_epochs should be greater than or equal to 1, got 0",
        ),
    ],
)
def test_invalid_profiles_give_a_one_line_error(tmp_path, monkeypatch, line, replacement, message):
    text = (profiles.PROFILES / "smoke.toml").read_text(encoding="utf-8")
    assert line in text
    (tmp_path / "bad.toml").write_text(text.replace(line, replacement), encoding="utf-8")
    monkeypatch.setattr(profiles, "PROFILES", tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"profile bad.toml{message}")):
        load_profile("bad")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'extends = "bad"', "profile bad.toml extends itself, by bad"),
        (b"\xff", "profile bad.toml is not valid TOML: 'utf-8' codec can't decode"),
        (b'extends = "smoke"\n[families]\na = 1\n', "profile bad.toml: families"),
    ],
)
def test_files_that_are_no_profiles_are_named(tmp_path, monkeypatch, text, message):
    shutil.copy(profiles.PROFILES / "smoke.toml", tmp_path)
    (tmp_path / "bad.toml").write_bytes(text)
    monkeypatch.setattr(profiles, "PROFILES", tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_profile("bad")


def test_the_lab_has_the_models_that_it_trains_alone():
    """A baseline of one's own needs another."""
    assert all(SMOKE.has(kind) for kind in ("base", "value-token-small", "instruct", "q-head-mean"))
    assert not SMOKE.has("guide")


def test_every_setting_but_those_of_summaries_changes_the_profile_digest():
    digests, settings = {profile_digest(SMOKE)}, 1
    others = {"acceptance", "statistics"}
    decisive = [field for field in dataclasses.fields(SMOKE) if field.name not in others]
    for field in decisive:
        table = getattr(SMOKE, field.name)
        keys = dataclasses.fields(table) if dataclasses.is_dataclass(table) else ()
        for key in keys:
            other = copy.copy(table)
            object.__setattr__(other, key.name, "changed")  # past its own checks
            digests.add(profile_digest(dataclasses.replace(SMOKE, **{field.name: other})))
        if not keys:
            digests.add(profile_digest(dataclasses.replace(SMOKE, **{field.name: "changed"})))
        settings += len(keys) or 1
    assert len(digests) == settings
    statistics = dataclasses.replace(SMOKE.statistics, level=0.5)
    assert profile_digest(dataclasses.replace(SMOKE, statistics=statistics)) in digests
