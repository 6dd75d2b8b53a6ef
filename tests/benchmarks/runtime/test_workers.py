"""Progress of worker processes."""

import io

from benchmarks.runtime import workers


def test_the_progress_bar_promises_nothing_before_a_fiftieth_is_done():
    bar = workers.Bar(total=100, bar_format=workers.BAR, file=io.StringIO())
    bar.update(1)
    assert str(bar).endswith("? to go")
    bar.update(4)
    assert str(bar).endswith(":00 to go")
    bar.close()


def test_without_a_terminal_each_stage_is_one_line(capsys):
    with workers.progress_bar(100) as bar:
        for description in ("sweep 1/5: thresholds, 0 of 12", "sweep 2/5: cells, 1 of 3", "timing"):
            bar.set_description(description)
            bar.update(10)
    assert capsys.readouterr().err == "sweep …\ntiming …\n"
