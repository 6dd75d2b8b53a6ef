"""Tiny models compute fastest on one thread, above all where several test processes share the cores; the longest files begin first."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

LONGEST = ("test_road.py", "test_figures.py", "test_cluster.py", "test_harness.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
