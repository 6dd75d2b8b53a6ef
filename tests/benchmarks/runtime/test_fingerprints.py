"""Digests of code."""

from __future__ import annotations

from benchmarks.runtime import fingerprints


def test_code_digest_sees_code_and_not_comments():
    same = [
        fingerprints._without_docstrings(text)
        for text in ('def f():\n    "A."\n    return 1', "def f():  # note\n    return 1")
    ]
    assert same[0] == same[1] != fingerprints._without_docstrings("def f():\n    return 2")
