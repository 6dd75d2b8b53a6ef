"""Order and environment of the tests: one thread a process, the longest files first."""

import os

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
    from benchmarks.spec.profile import load_profile
    from tests.helpers import hub_folders
    from tests.helpers.project import copy_project

    profiles = copy_project(monkeypatch, tmp_path)

    def add(family, places, further=""):
        text = hub_folders.profile_text(family, places) + further
        (profiles / "tiny.toml").write_text(text, encoding="utf-8")
        return load_profile("tiny")

    return add
