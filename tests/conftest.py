"""Order and environment of the tests: one thread a process, the longest files first."""

import os
import shutil

import pytest
from hypothesis import settings

# before torch is imported: tiny models compute fastest so, above all where processes share cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("the same examples every time", derandomize=True)
settings.load_profile("the same examples every time")

LONGEST = ("test_reproduce.py", "test_figures.py", "test_models.py", "test_lm_eval.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def lab_assets(tmp_path_factory):
    """Tiny models of a lab with subword tokens, exported as those of assets/lab are."""
    from tests.helpers import lab_assets

    with pytest.MonkeyPatch.context() as patch:
        yield lab_assets.export(patch, tmp_path_factory.mktemp("lab"))


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Empty folders of profiles, tables and cells, and a function that adds a profile."""
    from benchmarks.spec.profile import PROFILES, load_profile
    from tests.helpers import hub_folders
    from tests.helpers.project import redirect_output

    shutil.copytree(PROFILES, tmp_path / "profiles")
    monkeypatch.setattr("benchmarks.spec.profile.PROFILES", tmp_path / "profiles")
    redirect_output(monkeypatch, tmp_path)
    for module in ("benchmarks.engine.store", "benchmarks.engine.run"):
        monkeypatch.setattr(f"{module}.CACHE", tmp_path / ".cache")

    def add(family, places, further=""):
        text = hub_folders.profile_text(family, places) + further
        (tmp_path / "profiles/tiny.toml").write_text(text, encoding="utf-8")
        return load_profile("tiny")

    return add
