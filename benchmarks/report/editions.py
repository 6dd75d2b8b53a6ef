"""Headline verdicts of the lab beside those of its first edition, whose tokens are words.

Its steps are less sure by that, and by errors that may happen at any word; a truth is said in one
way, and responses are shorter. A row for each claim that both have measured, a column for each
setting; judge scores, in standard deviations of the base responses of each edition. Ticks are
single replicates, of which the first edition has few.
"""

from pathlib import Path

import pandas as pd

from benchmarks.analysis import tables
from benchmarks.analysis.claims import read_verdicts, settings_of
from benchmarks.analysis.estimates import TOLERANCE
from benchmarks.analysis.intervals import interval_kind
from benchmarks.figures import style
from benchmarks.report import forest
from benchmarks.spec.profile import Profile

NAME = "editions"
FIRST_EDITION = {"lab": "lab-words"}  # by profile
KEY = ["claim", "setting"]
HEADER = 1.65  # inches above and below all rows


def first_verdicts(profile: Profile) -> pd.DataFrame | None:
    """Return the verdicts of the first edition of a profile; None where it has none."""
    path = tables.RESULTS / FIRST_EDITION.get(profile.name, "") / "claims.csv"
    if profile.name not in FIRST_EDITION or not path.exists():
        return None
    return read_verdicts(path)


def draw(
    verdicts: pd.DataFrame, first: pd.DataFrame, profile: Profile, stale: bool, folder: Path
) -> list[Path]:
    """Draw editions.png and editions.pdf; nothing where the editions share no measured claim.

    Args:
        verdicts: Verdicts of the profile, as `claims.pooled_verdicts` returns them.
        first: Verdicts of its first edition.
        profile: Names the settings.
        stale: Whether any table was measured under other conditions than there are now.
        folder: Folder of the files.
    """
    editions = {f"{profile.name} (pieces of words)": verdicts, "first edition (words)": first}
    rows = pd.concat(
        [scores_of(frame).assign(series=name) for name, frame in editions.items()],
        ignore_index=True,
    )
    rows = rows[rows.groupby(KEY)["series"].transform("nunique") == len(editions)]
    if rows.empty:
        return []
    rows = rows.assign(row=forest.numbered_titles(rows))
    titles = list(rows["row"].unique())
    columns = [name for name in settings_of(profile) if name in set(rows["setting"])]
    figure, axes = style.plt.subplots(
        1, len(columns), sharex=True, sharey=True, squeeze=False,
        figsize=(style.COLUMN, forest.ROW * len(titles) + HEADER),
    )  # fmt: skip
    for axis, setting in zip(axes[0], columns, strict=True):
        axis.set_title(settings_of(profile)[setting].replace(", ", ",\n"), fontsize=6.5)
        forest.draw_scores(axis, rows[rows["setting"] == setting], titles, list(editions))
    axes[0, len(columns) // 2].set_xlabel("judge score (SD of base responses)", fontsize=6.5)
    of_each = "; ".join(
        f"{of_edition['replicates'].max():.0f}, {forest.sample_note(of_edition)}"
        for _, of_edition in rows.groupby("series", sort=False)
    )
    kind = interval_kind(profile.statistics.level, int(rows["replicates"].max()))
    caption = (
        f"{kind} ({of_each}); dotted: margin (0, or −{TOLERANCE:g} to reach); ticks: single "
        "replicates."
    )
    handles = forest.legend(list(editions), rows)
    return style.finish(figure, handles, caption, folder, NAME, stale=stale, legend_columns=2)


def scores_of(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return the headline rows in judge scores that have an interval and a setting."""
    chosen = (verdicts["headline"] > 0) & (verdicts["metric"] == "judge") & verdicts["sd"].notna()
    return verdicts[chosen & verdicts["low"].notna() & verdicts["setting"].ne("")]
