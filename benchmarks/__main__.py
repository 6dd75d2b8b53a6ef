"""The command line: python -m benchmarks COMMAND [--profile NAME] [--replicates N] [--fresh]. `make help` lists the same."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import figure2, tables
from benchmarks.digests import ROOT
from benchmarks.profile import Profile, load_profile

FIGURES = {"figure2": figure2}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compute the tables and draw the figures.")
    parser.add_argument(
        "command",
        choices=["reproduce", "models", "figures", *FIGURES],
        metavar="COMMAND",
        help="reproduce, models, figures, or one of: " + ", ".join(FIGURES),
    )
    parser.add_argument("--profile", default="lab", help="a file of benchmarks/profiles (default: lab)")
    parser.add_argument(
        "--replicates", type=int, help="how many of the profile's replicates to measure (default: 1 for reproduce, else all)"
    )
    parser.add_argument("--fresh", action="store_true", help="measure even where there is a table")
    options = parser.parse_args(arguments)
    try:
        profile = load_profile(options.profile)
        wanted = options.replicates or (1 if options.command == "reproduce" else profile.replicates)
        if not 1 <= wanted <= profile.replicates:
            raise ValueError(f"replicates must be 1 to {profile.replicates} for the profile {profile.name}, got {wanted}")
        run(options.command, profile, range(wanted), options.fresh)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def run(command: str, profile: Profile, replicates: range, fresh: bool) -> None:
    if command == "models":
        compute_models(profile, replicates)
    elif command == "reproduce":
        compute_models(profile, replicates)
        for name in FIGURES:
            compute(name, profile, replicates)
            draw(name, profile)
            compare(name, profile, replicates)
    else:
        for name in FIGURES if command == "figures" else [command]:
            if fresh or not tables.has_table(profile, name):
                why = "FRESH=1 was given" if fresh else f"there is no table in {_short(tables.folder(profile))}"
                print(f"{name}: measuring, because {why}")
                compute(name, profile, replicates)
            else:
                print(f"{name}: drawing the table that is there, measuring nothing (FRESH=1 measures again)")
            draw(name, profile)


def compute_models(profile: Profile, replicates: range) -> None:
    """Trains what is missing and writes models.csv."""
    from benchmarks.lab.build import Replicate, build
    from benchmarks.lab.quality import model_quality

    start = time.monotonic()
    build([Replicate(profile, index) for index in replicates])
    tables.write_table(profile, "models", None, model_quality(profile, replicates), replicates, time.monotonic() - start)
    print(f"models: {_short(tables.folder(profile) / 'models.csv')}")


def compute(name: str, profile: Profile, replicates: range) -> None:
    """Measures what is missing and writes the table."""
    from benchmarks.lab.build import Replicate, build
    from benchmarks.sweep import Results

    start = time.monotonic()
    build([Replicate(profile, index) for index in replicates])
    rows = FIGURES[name].compute(profile, replicates, Results(profile))
    summary = FIGURES[name].summarize(rows, profile)
    tables.write_table(profile, name, rows, summary, replicates, time.monotonic() - start)
    if len(replicates) == profile.replicates > 1:
        tables.write_text(tables.reference_path(profile, name), summary.to_csv(index=False))
    print(f"{name}: {len(rows)} rows in {_short(tables.folder(profile))}/{name}.parquet, summary in {name}.csv")


def draw(name: str, profile: Profile) -> None:
    summary, stale = tables.read_table(profile, name)
    if stale:
        print(
            f"warning: {name}.csv was measured under another version of the profile {profile.name}; the figure is marked as stale",
            file=sys.stderr,
        )
    note: Callable[[str], str] = lambda caption: ("STALE (the profile has changed since): " if stale else "") + caption
    paths = [tables.FIGURES / profile.name / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    FIGURES[name].plot(summary, profile, note, paths)
    for sentence in FIGURES[name].verdict(summary, profile):
        print(f"  {sentence}")
    print(f"{name}: {', '.join(_short(path) for path in paths)}")


def compare(name: str, profile: Profile, replicates: range) -> None:
    """How this run lies against the committed intervals over all replicates."""
    import pandas as pd

    path = tables.reference_path(profile, name)
    if len(replicates) == profile.replicates or not path.exists():
        return
    summary, _ = tables.read_table(profile, name)
    keys = ["objective", "family", "setting", "method", "target_ratio", "versus", "metric"]
    reference = pd.read_csv(path, keep_default_na=False, na_values=[""]).fillna({"setting": ""})
    both = summary.merge(reference, on=keys, suffixes=("", "_reference"))
    judged = both[(both["metric"] == "judge") & both["versus"].isna()]
    inside = judged["estimate"].between(judged["low_reference"], judged["high_reference"])
    overlap = (judged["low"] <= judged["high_reference"]) & (judged["high"] >= judged["low_reference"])
    print(
        f"{name}: against the committed table of {profile.replicates} replicates, of {len(judged)} judge scores {inside.mean():.0%} lie inside the committed interval and {overlap.mean():.0%} of the intervals overlap"
    )


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
