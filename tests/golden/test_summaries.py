"""Summaries of two replicates of made-up rows: what figures plot."""

import pytest

from benchmarks.figures.registry import FIGURES
from tests.golden.models import TOLERANCE
from tests.helpers.fake import table_of


@pytest.mark.parametrize("name", ["figure1", "cost", "entropy"])
def test_summaries(name, dataframe_regression):
    """A sample of rows with other scores for SIA, in the order of the summary."""
    table = table_of(FIGURES[name], lambda cell: 0.5 * (cell.gate == "entropy"))
    rows = table[table["objective"] == "all"].dropna(axis=1, how="all")
    rows = rows.sample(min(len(rows), 60), random_state=0).sort_index()
    floats = rows.select_dtypes("floating").columns
    texts = dict.fromkeys(rows.columns.difference(floats), "category")
    dataframe_regression.check(
        rows.reset_index(drop=True).astype(texts),
        default_tolerance=TOLERANCE,
        basename=f"summary_{name}",
    )
