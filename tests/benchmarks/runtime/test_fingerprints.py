"""Digests of code."""

import os
import shutil

from benchmarks.runtime import fingerprints


def test_the_code_digest_ignores_comments():
    same = [
        fingerprints._without_docstrings(text)
        for text in ('def f():\n    "A."\n    return 1', "def f():  # note\n    return 1")
    ]
    assert same[0] == same[1] != fingerprints._without_docstrings("def f():\n    return 2")


def test_what_draws_a_figure_is_its_file_and_the_style(monkeypatch, tmp_path):
    shutil.copytree(
        fingerprints.ROOT / "benchmarks",
        tmp_path / "benchmarks",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    monkeypatch.setattr(fingerprints, "ROOT", tmp_path)
    before = {name: fingerprints.drawing_code(name) for name in ("figure3", "value-error")}
    for file, moved in (
        ("figure5", set()),
        ("value_error", {"value-error"}),
        ("style", {"figure3", "value-error"}),
    ):
        path = tmp_path / f"benchmarks/figures/{file}.py"
        path.write_text(path.read_text() + "\n# a comment\n")
        assert {name: fingerprints.drawing_code(name) for name in before} == before
        path.write_text(path.read_text() + "\nmore = 1\n")
        after = {name: fingerprints.drawing_code(name) for name in before}
        assert {name for name in before if after[name] != before[name]} == moved
        before = after


def test_files_are_identified_by_their_content(monkeypatch, tmp_path):
    monkeypatch.setattr(fingerprints, "BLOCKS", 3)
    monkeypatch.setattr(fingerprints, "BLOCK", 4)
    small, big = tmp_path / "head.bin", tmp_path / "weights.bin"
    small.write_bytes(b"head")
    big.write_bytes(b"a" * 100)
    before = fingerprints.file_states([tmp_path, small])
    assert [name for name, _ in before] == ["head.bin", "weights.bin", "head.bin"]
    for file in (small, big):
        os.utime(file, (1, 1))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/download.lock").touch()
    assert fingerprints.file_states([tmp_path, small]) == before
    for changed in (b"b" + b"a" * 99, b"a" * 50 + b"b" + b"a" * 49, b"a" * 99 + b"b", b"a" * 99):
        big.write_bytes(changed)
        os.utime(big, (2, len(changed) + changed.find(b"b")))
        assert fingerprints.file_states([tmp_path])[1] != before[1]
