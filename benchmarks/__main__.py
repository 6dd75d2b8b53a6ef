"""The command line: python -m benchmarks COMMAND [--profile NAME] [options]. `make help` lists the same."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.analysis import claims, tables
from benchmarks.checks import regression
from benchmarks.figures.registry import FIGURES
from benchmarks.report import render
from benchmarks.runtime.command_line import Parser, exit_code
from benchmarks.runtime.files import write_text
from benchmarks.runtime.fingerprints import ROOT
from benchmarks.spec.profile import Profile, load_profile

# torch and what needs it are imported only where something is measured: drawing takes seconds

ARCHITECTURES = "architectures"  # the profile that has shapes and no models
FROM_TABLES = (
    "figures",
    "summaries",
    "claims",
    "report",
)  # what needs tables, and measures nothing
COMMANDS = {
    "reproduce": "train the models, measure every table, draw every figure",
    "models": "train the models and report their quality",
    "figures": "draw every figure, and say what became of the claims",
    "summaries": "write the summaries again from the rows of the tables, and draw",
    "claims": "hold the paper's claims against the tables",
    "report": "write the page that shows verdicts, junctions and every figure",
    "check": "measure the check profile again and tell a broken metric from noise (FRESH=1: make what it compares with)",
    "estimate": "GPU hours of the figures of a profile of real models",
    **{name: f"draw {name}, measuring only what has no table" for name in FIGURES},
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 2 for bad input, 130 when interrupted."""
    listing = "\n".join(f"  {name:12} {what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog="python -m benchmarks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"commands:\n{listing}",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument(
        "--profile", default="lab", help="a file of benchmarks/spec/profiles (default: lab)"
    )
    parser.add_argument(
        "--replicates",
        type=int,
        default=1,
        help="measure the first N of the profile's replicates (default: 1)",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--fresh", action="store_true", help="measure again, whatever has been measured"
    )
    again.add_argument(
        "--keep",
        action="store_true",
        help="keep the replicates that the tables have, and add the missing ones",
    )
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="this machine, or the Ray cluster at RAY_ADDRESS",
    )
    hub = parser.add_argument_group("profiles of real models")
    hub.add_argument(
        "--limit",
        type=int,
        help="only so many prompts of each objective; tables go to results/PROFILE-limitN",
    )
    hub.add_argument("--device", default="", help="cpu or cuda (default: what there is)")
    hub.add_argument(
        "--dtype", default="", help="float32, bfloat16 or float16 (default: bfloat16 on a GPU)"
    )
    hub.add_argument(
        "--batch-size", type=int, help="responses decoded together (default: what should fit)"
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: follow(options), "what was finished is kept")


def follow(options: argparse.Namespace) -> int:
    """Checks what is asked, and does it."""
    if options.command == "check":
        return regression.run(FIGURES, options.fresh)
    if options.profile == ARCHITECTURES:
        return measure_architectures(options)
    profile = load_profile(options.profile)
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options.batch_size}")
    given = options.limit, options.device or None, options.dtype or None, options.batch_size
    if profile.trains_models and any(value is not None for value in given):
        raise ValueError(
            f"--limit, --device, --dtype and --batch-size are for profiles of real models, {profile.name} is not one"
        )
    profile = limited(profile, options.limit)
    if options.command in FIGURES and (reason := FIGURES[options.command].why_unsupported(profile)):
        raise ValueError(f"profile {profile.name}: {reason}")
    if not 1 <= options.replicates <= profile.replicates:
        raise ValueError(
            f"replicates must be 1 to {profile.replicates} for the profile {profile.name}, got {options.replicates}"
        )
    run(options.command, profile, range(options.replicates), options)
    return 0


def measure_architectures(options: argparse.Namespace) -> int:
    """The one thing that is measured of architectures without weights."""
    if options.command != "cost":
        raise ValueError(
            f"profile {ARCHITECTURES} has random weights: only its cost can be measured (make cost PROFILE={ARCHITECTURES})"
        )
    given = (
        options.limit is not None
        or options.device
        or options.dtype
        or options.batch_size is not None
        or options.executor != "local"
    )
    if given or options.keep or options.replicates != 1:
        raise ValueError(
            f"profile {ARCHITECTURES} takes what there is: of all options it knows --fresh alone"
        )
    from benchmarks.perf import architectures

    architectures.run(options.fresh)
    return 0


def run(command: str, profile: Profile, replicates: range, options: argparse.Namespace) -> None:
    tables.tidy(profile)
    fresh, keep = options.fresh, options.keep
    all_names = [name for name in FIGURES if not FIGURES[name].why_unsupported(profile)]
    there = [name for name in FIGURES if tables.has_table(profile, name)]
    names = {"reproduce": all_names, "figures": there, "summaries": there}.get(
        command, [command] if command in FIGURES else []
    )
    if command == "estimate":
        estimate(profile, all_names)
    if command == "models" and not profile.trains_models:
        raise ValueError(
            f"the models of profile {profile.name} are given, there is nothing to train"
        )
    if command in FROM_TABLES:
        if not there:
            where = short(tables.folder(profile))
            raise FileNotFoundError(
                f"there is no table in {where} to draw or judge: make reproduce PROFILE={profile.name} measures them"
            )
        for name in there:
            tables.read_provenance(
                profile, name
            )  # before anything is written: whether all are whole
    if command in ("models", "reproduce"):
        measure(profile, replicates, names, options, quality=profile.trains_models)
    elif command == "figures":
        for name in (name for name in all_names if name not in there):
            print(
                f"{name}: not drawn, {short(tables.folder(profile))} has no table of it (make {name} PROFILE={profile.name} measures it)"
            )
    elif command == "summaries":
        for name in names:
            tables.rewrite_summary(profile, name, FIGURES[name].summarize)
    elif names:
        where = short(tables.folder(profile))
        wanted = [name for name in names if fresh or keep or not tables.has_table(profile, name)]
        for name in names:
            if name not in wanted:
                print(
                    f"{name}: drawing the table in {where}, nothing is measured (FRESH=1 measures again)"
                )
            elif tables.has_table(profile, name):
                print(f"{name}: measuring, as {'FRESH=1' if fresh else 'KEEP=1'} asks")
            else:
                print(f"{name}: measuring, for {where} has no table of it")
        if wanted:
            measure(profile, replicates, wanted, options)
    for name in names:
        draw(name, profile)
    if command in ("reproduce", "figures", "summaries", "claims"):
        judge_claims(profile)
    if command in ("reproduce", "figures", "summaries", "report"):
        written = render.write(profile, FIGURES)
        tables.record_drawing(profile, "report", [written], "claims.csv")
        print(f"report: {short(written)}")


def measure(
    profile: Profile,
    replicates: range,
    names: list[str],
    options: argparse.Namespace,
    quality: bool = False,
) -> None:
    from benchmarks.engine.run import RunOptions, run_experiment

    figures = {name: FIGURES[name] for name in names}
    run_options = RunOptions(
        options.fresh,
        options.keep,
        quality,
        options.executor,
        options.device,
        options.dtype,
        options.batch_size or 0,
    )
    run_experiment(figures, profile, replicates, run_options)


def limited(profile: Profile, limit: int | None) -> Profile:
    """The profile with so many prompts of each objective at most, under a name of its own."""
    if limit is None:
        return profile
    if limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    evaluation, sweep = profile.evaluation, profile.sweep
    counts = {
        name: min(limit, count)
        for name, count in vars(evaluation).items()
        if name in ("prompts_per_objective", "validation_prompts_per_objective")
    }
    return replace(
        profile,
        name=f"{profile.name}-limit{limit}",
        evaluation=replace(evaluation, **counts),
        sweep=replace(sweep, rollout_prompts=min(limit, sweep.rollout_prompts)),
    )


def estimate(profile: Profile, names: list[str]) -> None:
    """Prints about how many GPU hours each figure takes alone, and all together, where cells are shared."""
    if profile.trains_models:
        raise ValueError(
            f"GPU hours are estimated for profiles of real models, {profile.name} is not one"
        )
    from benchmarks.engine.estimate import H100, figure_hours

    needs = {name: FIGURES[name].cells(profile, 0) for name in names}
    print(
        f"{profile.name}: about so many hours of one {H100.name}, at {H100.share:.0%} of what it "
        f"can do and {1000 * H100.launch:.0f} ms to launch a pass (an estimate, not measured)"
    )
    for name, hours in figure_hours(profile, needs).items():
        print(f"  {name:12} {hours:6.1f}")


def draw(name: str, profile: Profile) -> None:
    """Draws the figure from its table."""
    summary, stale = tables.read_table(profile, name)
    if stale:
        print(
            f"warning: {name}.csv was measured under other settings than profile {profile.name} has now; it is drawn as stale",
            file=sys.stderr,
        )
    made = FIGURES[name].plot(summary, profile, stale, tables.FIGURES / profile.name)
    tables.record_drawing(profile, name, made)
    print(f"{name}: {', '.join(short(path) for path in made) or 'shown in the report'}")


def judge_claims(profile: Profile) -> None:
    """Prints what became of every claim, and writes claims.csv."""
    wanted = claims.claims_for(
        profile, [name for name, figure in FIGURES.items() if figure.why_unsupported(profile)]
    )
    summaries = {
        name: tables.read_table(profile, name)[0]
        for name in FIGURES
        if tables.has_table(profile, name)
    }
    found = claims.verdicts(summaries, wanted)
    path = tables.folder(profile) / "claims.csv"
    write_text(path, found.to_csv(index=False))
    if profile.name == "smoke":
        print(
            "smoke: its models talk near-nonsense; what follows shows that everything runs, not what the lab shows"
        )
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
