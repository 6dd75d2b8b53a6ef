"""The command line: python -m benchmarks COMMAND [--profile NAME] [--replicates N] [--fresh]. `make help` lists the same."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import figure2, tables
from benchmarks.digests import ROOT
from benchmarks.profile import Profile, load_profile
from benchmarks.store import CACHE

# torch and what needs it are imported only where something is measured: drawing takes seconds

FIGURES = {"figure2": figure2}
COMMANDS = {
    "reproduce": "train the models, measure every table, draw every figure",
    "models": "train the models and report their quality",
    "figures": "draw every figure",
    "summaries": "write the summaries again from the rows of the tables, and draw",
    **{name: f"draw {name}, measuring only what has no table" for name in FIGURES},
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted."""
    listing = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", formatter_class=argparse.RawDescriptionHelpFormatter, description=f"commands:\n{listing}"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--profile", default="lab", help="a file of benchmarks/profiles (default: lab)")
    parser.add_argument("--replicates", type=int, default=1, help="measure the first N of the profile's replicates (default: 1)")
    parser.add_argument("--fresh", action="store_true", help="measure again, whatever has been measured")
    options = parser.parse_args(arguments)
    try:
        profile = load_profile(options.profile)
        if not 1 <= options.replicates <= profile.replicates:
            raise ValueError(f"replicates must be 1 to {profile.replicates} for the profile {profile.name}, got {options.replicates}")
        run(options.command, profile, range(options.replicates), options.fresh)
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def run(command: str, profile: Profile, replicates: range, fresh: bool) -> None:
    names = [command] if command in FIGURES else [] if command == "models" else list(FIGURES)
    if command in ("models", "reproduce"):
        measure(profile, replicates, names, fresh, quality=True)
    elif command == "summaries":
        for name in names:
            tables.rewrite_summary(profile, name, FIGURES[name].summarize)
    else:
        where = short(tables.folder(profile))
        wanted = [name for name in names if fresh or not tables.has_table(profile, name)]
        for name in names:
            if name in wanted:
                print(f"{name}: measuring, {'as FRESH=1 asks' if fresh else f'for {where} has no table of it'}")
            else:
                print(f"{name}: drawing the table in {where}, nothing is measured (FRESH=1 measures again)")
        if wanted:
            measure(profile, replicates, wanted, fresh, quality=False)
    for name in names:
        draw(name, profile)


def measure(profile: Profile, replicates: range, names: list[str], fresh: bool, quality: bool) -> None:
    """Trains what is missing, measures what is missing (all, if `fresh`) for these figures, writes the tables.

    quality: also report how good the models are, in models.csv.
    """
    from benchmarks.lab.build import Replicate, build
    from benchmarks.lab.quality import model_quality
    from benchmarks.parallel import Workers
    from benchmarks.sweep import Results

    start = time.monotonic()
    # begun by FRESH=1 and there until its end: cells older than this do not count, and a killed run goes on
    begun = CACHE / profile.name / "measuring-again"
    if fresh and not begun.exists():
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
    since = begun.stat().st_mtime if fresh else 0.0
    with Workers() as workers:
        build([Replicate(profile, index) for index in replicates], workers)
        if quality:
            tables.write_table(profile, "models", None, model_quality(profile, replicates, workers), replicates, time.monotonic() - start)
            print(f"models: quality in {short(tables.folder(profile) / 'models.csv')}")
        for name in names:
            start = time.monotonic()
            rows = FIGURES[name].compute(profile, replicates, Results(profile, workers, since))
            summary = FIGURES[name].summarize(rows, profile)
            tables.write_table(profile, name, rows, summary, replicates, time.monotonic() - start)
            print(f"{name}: {len(rows):,} rows in {short(tables.folder(profile))}/{name}.parquet, summary in {name}.csv")
            if len(replicates) < profile.replicates and (reference := tables.read_reference(profile, name)) is not None:
                print(f"{name}: {FIGURES[name].agreement(summary, reference)}")
    if fresh:
        begun.unlink()


def draw(name: str, profile: Profile) -> None:
    """Draws the figure from its table and prints what it says."""
    summary, stale = tables.read_table(profile, name)
    if stale:
        print(
            f"warning: {name}.csv was measured under other settings than profile {profile.name} has now; it is drawn as stale",
            file=sys.stderr,
        )
    paths = [tables.FIGURES / profile.name / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    FIGURES[name].plot(summary, profile, stale, paths)
    if profile.name == "smoke":
        print("smoke: its models talk near-nonsense; what follows shows that everything runs, not what the lab shows")
    print(f"{name}: judge score, SIA − dense, paired, with {profile.statistics.level:.0%} intervals; profile {profile.name}")
    for sentence in FIGURES[name].verdict(summary, profile):
        print(f"  {sentence}")
    print(f"{name}: {', '.join(short(path) for path in paths)}")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
