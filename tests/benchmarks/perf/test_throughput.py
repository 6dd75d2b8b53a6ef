"""Throughput: a row for every batch, scorer and share, and a picture of them."""

import re

import pandas as pd

from benchmarks.perf import throughput
from benchmarks.perf.random_models import random_models
from tests.benchmarks.perf.test_speed import SHAPE


def test_every_scorer_is_measured_at_every_share_and_batch():
    models = random_models(SHAPE)
    rows = throughput.throughput_rows(models, 1, batches=(1, 2), shares=(0.0, 1.0), tokens=3)
    table = pd.DataFrame(rows)
    assert table.groupby(["batch", "scorer", "share"]).size().eq(1).all()
    assert len(table) == 2 * 3 * 2
    assert (table["estimate"] > 0).all()
    figure = throughput.draw(table)
    assert [axes.get_title() for axes in figure.axes] == [
        "value model",
        "vocabulary head",
        "Q-head",
    ]
    page = throughput.page(table.replace({"share": {0.0: 0.2}}), {"threads": 2})
    gain = table["estimate"][0] / table["estimate"][1]
    assert "median of 1 rounds, 3 new tokens" in page
    assert re.search(rf"value model +\| +{gain:.2f} \|", page)
    labels = [text.get_text() for text in figure.axes[-1].get_legend().get_texts()]
    assert labels == ["0%", "100%"]
