"""Tiny models compute fastest on one thread, above all where several test processes share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
