"""The documentation as data: its Python blocks."""

from benchmarks.runtime.fingerprints import ROOT


def python_blocks(page: str) -> list[str]:
    """Return the Python blocks of a Markdown page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]
