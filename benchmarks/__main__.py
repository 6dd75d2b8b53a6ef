"""The command line: python -m benchmarks COMMAND [--profile NAME] [--replicates N] [--fresh | --keep]. `make help` lists the same."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pandas as pd

from benchmarks import (
    best_of_n,
    claims,
    cost,
    entropy,
    figure1,
    figure2,
    figure3,
    figure4,
    figure5,
    mechanism,
    plan,
    table1,
    tables,
    theory,
    threshold,
    value_error,
)
from benchmarks.digests import ROOT
from benchmarks.profile import Profile, load_profile
from benchmarks.store import CACHE, write_text

# torch and what needs it are imported only where something is measured: drawing takes seconds

FIGURES = {
    "figure1": figure1,
    "figure2": figure2,
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "best-of-n": best_of_n,
    "cost": cost,
    "table1": table1,
    "entropy": entropy,
    "theory": theory,
    "mechanism": mechanism,
    "value-error": value_error,
    "threshold": threshold,
}
COMMANDS = {
    "reproduce": "train the models, measure every table, draw every figure",
    "models": "train the models and report their quality",
    "figures": "draw every figure, and say what became of the claims",
    "summaries": "write the summaries again from the rows of the tables, and draw",
    "claims": "hold the paper's claims against the tables",
    **{name: f"draw {name}, measuring only what has no table" for name in FIGURES},
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted."""
    listing = "\n".join(f"  {name:12} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", formatter_class=argparse.RawDescriptionHelpFormatter, description=f"commands:\n{listing}"
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("--profile", default="lab", help="a file of benchmarks/profiles (default: lab)")
    parser.add_argument("--replicates", type=int, default=1, help="measure the first N of the profile's replicates (default: 1)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="measure again, whatever has been measured")
    again.add_argument("--keep", action="store_true", help="keep the replicates that the tables have, and add the missing ones")
    options = parser.parse_args(arguments)
    try:
        profile = load_profile(options.profile)
        if not 1 <= options.replicates <= profile.replicates:
            raise ValueError(f"replicates must be 1 to {profile.replicates} for the profile {profile.name}, got {options.replicates}")
        run(options.command, profile, range(options.replicates), options.fresh, options.keep)
    except (ValueError, ArithmeticError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def run(command: str, profile: Profile, replicates: range, fresh: bool, keep: bool) -> None:
    names = [command] if command in FIGURES else [] if command in ("models", "claims") else list(FIGURES)
    if command in ("models", "reproduce"):
        measure(profile, replicates, names, fresh, keep, quality=True)
    elif command == "summaries":
        names = [name for name in names if tables.has_table(profile, name)]
        for name in names:
            tables.rewrite_summary(profile, name, FIGURES[name].summarize)
    elif names:
        where = short(tables.folder(profile))
        wanted = [name for name in names if fresh or keep or not tables.has_table(profile, name)]
        for name in names:
            if name not in wanted:
                print(f"{name}: drawing the table in {where}, nothing is measured (FRESH=1 measures again)")
            elif tables.has_table(profile, name):
                print(f"{name}: measuring, as {'FRESH=1' if fresh else 'KEEP=1'} asks")
            else:
                print(f"{name}: measuring, for {where} has no table of it")
        if wanted:
            measure(profile, replicates, wanted, fresh, keep, quality=False)
    for name in names:
        draw(name, profile)
    if command in ("reproduce", "figures", "summaries", "claims"):
        judge_claims(profile)


def measure(profile: Profile, replicates: range, names: list[str], fresh: bool, keep: bool, quality: bool) -> None:
    """Trains what is missing, measures what is missing (all, if `fresh`) for these figures, writes the tables.

    keep: rows of replicates that the tables have already, measured by the same code and profile, stay as they are, and only the others
    are measured. quality: also report how good the models are, in models.csv.
    """
    from benchmarks.lab.build import build, missing
    from benchmarks.lab.quality import model_quality
    from benchmarks.lab.replicate import Replicate
    from benchmarks.parallel import Workers
    from benchmarks.sweep import Results

    start = time.monotonic()
    # begun by FRESH=1 and there until its end: cells older than this do not count, and a killed run goes on
    begun = CACHE / profile.name / "measuring-again"
    if fresh and not begun.exists():
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.touch()
    since = begun.stat().st_mtime if fresh else 0.0
    kept = {name: tables.kept_rows(profile, name) for name in (["models"] if quality else []) + names} if keep else {}
    there = {name: set() if frame is None else set(frame["replicate"]) for name, frame in kept.items()}
    new = [r for r in replicates if any(r not in there.get(name, set()) for name in (names or ["models"]))]
    # a run that was interrupted may have added to some tables and not to others
    kept = {name: frame[~frame["replicate"].isin(new)] for name, frame in kept.items() if frame is not None}
    with Workers() as workers:
        results = Results(profile, workers, since)
        needs = [FIGURES[name].cells(profile, replicate) for name in names for replicate in new]
        wanted = plan.Wanted(*([cell for need in needs for cell in need[i]] for i in range(len(plan.Wanted._fields))))
        models = [Replicate(profile, index) for index in new]
        training = sum(task.work for stage in missing(models) for task in stage) if models else 0.0
        with workers.progress(training + results.work(*wanted)):
            if models:
                build(models, workers)
            if quality:
                rows = pd.concat([*_kept(kept, "models"), model_quality(profile, new, workers)], ignore_index=True)
                tables.write_table(profile, "models", None, rows, range(len(set(rows["replicate"]))), time.monotonic() - start)
            results.measure(*wanted)
            tables_made = {name: FIGURES[name].collect(profile, new, results) for name in names}
        for name, rows in tables_made.items():
            rows = tables.stack([*_kept(kept, name), rows])
            summary = FIGURES[name].summarize(rows, profile)
            measured = range(rows["replicate"].nunique())
            tables.write_table(profile, name, rows, summary, measured, time.monotonic() - start)
            print(f"{name}: {len(rows):,} rows in {short(tables.folder(profile))}/{name}.parquet, summary in {name}.csv")
            reference = tables.read_reference(profile, name) if len(measured) < profile.replicates else None
            if reference is not None and "low" in reference:
                print(f"{name}: {tables.agreement(summary, reference)}")
    if fresh:
        begun.unlink()


def _kept(kept: dict[str, pd.DataFrame], name: str) -> list[pd.DataFrame]:
    return [kept[name]] if name in kept and len(kept[name]) else []


def draw(name: str, profile: Profile) -> None:
    """Draws the figure from its table."""
    summary, stale = tables.read_table(profile, name)
    if stale:
        print(
            f"warning: {name}.csv was measured under other settings than profile {profile.name} has now; it is drawn as stale",
            file=sys.stderr,
        )
    made = FIGURES[name].plot(summary, profile, stale, tables.FIGURES / profile.name)
    print(f"{name}: {', '.join(short(path) for path in made)}")


def judge_claims(profile: Profile) -> None:
    """Prints what became of every claim, and writes claims.csv."""
    wanted = claims.read_claims()
    summaries = {name: tables.read_table(profile, name)[0] for name in FIGURES if tables.has_table(profile, name)}
    found = claims.verdicts(summaries, wanted)
    path = tables.folder(profile) / "claims.csv"
    write_text(path, found.to_csv(index=False))
    if profile.name == "smoke":
        print("smoke: its models talk near-nonsense; what follows shows that everything runs, not what the lab shows")
    for source, part in found.groupby("source", sort=False):
        print(f"{source}:")
        for _, row in part.iterrows():
            print(f"  {claims.sentence(row)}")
    counts = found["verdict"].value_counts()
    listed = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in claims.VERDICTS)
    print(f"claims: {listed}; in {short(path)}")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
