"""Order and environment of the tests: one thread a process, the longest files first."""

import os

# before torch is imported: tiny models compute fastest so, above all where processes share cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST = ("test_reproduce.py", "test_figures.py", "test_cluster.py", "test_models.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
