"""Base class of figures: the cells that one needs, its rows, its summary and its drawing."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pandas as pd

from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import Profile

REGISTERED: dict[str, "Figure"] = {}


class Figure:
    """One figure or table; defining a subclass registers an instance of it.

    Attributes:
        name: Command, target of make, and stem of its files; that of the module unless given.
        title: Heading in the report: the first line of its docstring.
        measured: Columns of the rows of cells that its table keeps.
        reported: Metrics of its table in the report: the profile's score if None, all if empty.
        needs_lab: Whether only a profile that trains its own models can measure it.
        own_section: Whether the report shows it in a section of its own.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str]
    measured: ClassVar[Sequence[str]] = ()
    reported: ClassVar[Sequence[str] | None] = None
    needs_lab: ClassVar[bool] = False
    own_section: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        """Register the figure under its name."""
        cls.name = cls.__dict__.get("name") or cls.__module__.rpartition(".")[2].replace("_", "-")
        cls.title = inspect.getdoc(cls).partition("\n")[0].rstrip(".")
        REGISTERED[cls.name] = cls()

    def why_unsupported(self, profile: Profile) -> str:
        """Return why the profile cannot measure this figure; empty if it can."""
        if self.needs_lab and not profile.trains_models:
            return f"{self.name} needs the lab, whose world and training can be changed"
        return ""

    def cells(self, profile: Profile, replicate: int) -> FigureCells:
        """Return the cells of one replicate that the figure needs."""
        raise NotImplementedError

    def collect(self, profile: Profile, replicates: Sequence[int], results) -> pd.DataFrame:
        """Return the rows of the table: one for each response of each cell, unless overridden."""
        cells = [cell for replicate in replicates for cell in self.cells(profile, replicate).cells]
        return results.table(cells, profile.available_metrics(self.measured))

    def summarize(self, rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
        """Return estimates with intervals from the rows of the table."""
        raise NotImplementedError

    def plot(
        self, table: pd.DataFrame, profile: Profile, stale: bool, folder: Path
    ) -> Sequence[Path]:
        """Draw the summary into `folder` and return the files written.

        Args:
            table: Summary, as read from its file.
            stale: Whether it was measured under other conditions than there are now.
        """
        raise NotImplementedError
