"""Progress of worker processes."""

from __future__ import annotations

import io

from benchmarks.runtime import workers


def test_the_progress_bar_promises_nothing_before_a_fiftieth_is_done():
    bar = workers.Bar(total=100, bar_format=workers.BAR, file=io.StringIO())
    bar.update(1)
    assert str(bar).endswith("? to go")
    bar.update(4)
    assert str(bar).endswith(":00 to go")
    bar.close()
