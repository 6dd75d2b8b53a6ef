"""Command line of the suite: `python -m benchmarks COMMAND [options]`, as `make` calls it."""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.analysis import claims, tables
from benchmarks.checks import regression, verify
from benchmarks.figures.registry import FIGURES
from benchmarks.report import editions, forest, render, results_page
from benchmarks.runtime.command_line import RESUMES, Parser, exit_code, require_counts
from benchmarks.runtime.files import write_text
from benchmarks.runtime.fingerprints import ROOT
from benchmarks.runtime.workers import available_cores, interrupts_withheld
from benchmarks.spec.cells import FigureCells
from benchmarks.spec.profile import LIMITED, Hardware, Profile, load_profile

# torch is imported only where something is measured: drawing takes seconds

ARCHITECTURES = "architectures"  # the profile that has shapes and no models
HUB_OPTIONS = ("limit", "device", "dtype", "batch_size")
Options = argparse.Namespace


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 2 for bad input, 130 when interrupted."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"{options.command} does not take {' '.join(unknown)}")
    kept, setting = f"what was finished is kept, {RESUMES}", "BATCH_SIZE"
    if options.profile == ARCHITECTURES:
        kept, setting = "nothing was written", f"`batches` in profiles/{ARCHITECTURES}.toml"
    return exit_code(lambda: run(options), kept, setting)


def run(options: Options) -> int | None:
    """Run the requested command on the requested profile."""
    if options.profile == ARCHITECTURES:
        return measure_architectures(options)
    return options.run(selected_profile(options), options)


def build_parser() -> Parser:
    """Return the parser; each command accepts only the options that apply to it."""
    of_profile, of_measuring = Parser(add_help=False), Parser(add_help=False)
    of_profile.add_argument("--profile", default="lab", help="a file of benchmarks/spec/profiles")
    of_profile.add_argument(
        "--limit", type=int, help="of real models: prompts of each objective, for a trial"
    )
    of_measuring.add_argument("--replicates", type=int, default=1, help="measure the first N")
    again = of_measuring.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="measure again")
    again.add_argument("--keep", action="store_true", help="measure only missing replicates")
    of_measuring.add_argument(
        "--executor", choices=("local", "ray"), default="local", help="ray: uses RAY_ADDRESS"
    )
    of_measuring.add_argument("--device", help="of real models: cpu or cuda")
    of_measuring.add_argument("--dtype", help="of real models: float32, bfloat16 or float16")
    of_measuring.add_argument(
        "--batch-size", type=int, help="of real models: responses decoded together"
    )

    parser = Parser(
        prog="python -m benchmarks",
        description="Measure, draw and judge. `python -m benchmarks COMMAND --help`: its options.",
        epilog=f"One figure, measured if it has no table: {', '.join(FIGURES)}",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    parser.set_defaults(profile="check", replicates=1, **dict.fromkeys(HUB_OPTIONS))

    def add(name: str, run: Callable, parents: list, **texts: str) -> Parser:
        command = commands.add_parser(name, parents=parents, **texts)
        command.set_defaults(run=run)
        return command

    both = [of_profile, of_measuring]
    add("reproduce", reproduce, both, help="train the models, measure every table, draw")
    add("models", train_models, both, help="train the models and report their quality")
    add("figures", draw_figures, [of_profile], help="draw every figure that has a table")
    add("summaries", rewrite_summaries, [of_profile], help="summarize the rows of tables, draw")
    add("claims", judge_claims, [of_profile], help="print the verdict on every claim")
    add("report", write_report, [of_profile], help="write one page with verdicts and figures")
    add("verify", run_verify, [of_profile], help="check that tables, verdicts and figures agree")
    add("estimate", estimate, [of_profile], help="estimate GPU hours of real models")
    check = add("check", run_check, [], help="compare a small run with its committed rows")
    check.add_argument("--fresh", action="store_true", help="replace the committed rows")
    for name in FIGURES:
        add(name, draw_one, both)
    return parser


# --- commands


def reproduce(profile: Profile, options: Options) -> None:
    """Train, measure everything, draw, judge, and write the report."""
    names = supported_figures(profile)
    measure(profile, names, options, quality=profile.trains_models)
    publish(profile, names)


def train_models(profile: Profile, options: Options) -> None:
    """Train the models of the lab and report their quality."""
    if not profile.trains_models:
        raise ValueError(f"profile {profile.name} uses existing models, there is nothing to train")
    measure(profile, [], options, quality=True)


def draw_one(profile: Profile, options: Options) -> None:
    """Draw a figure from its table, measuring the table first if there is none."""
    name, folder = options.command, relative(tables.folder(profile))
    if reason := FIGURES[name].why_unsupported(profile):
        raise ValueError(f"profile {profile.name}: {reason}")
    request = "FRESH=1" if options.fresh else "KEEP=1" if options.keep else ""
    has_table = tables.has_table(profile, name)
    if has_table and not request:
        check_hardware(profile, name, options)
        warn_of_stale(profile, [name])
        print(
            f"{name}: drawing from the table in {folder} without measuring (FRESH=1 measures again)"
        )
    else:
        reason = f"as {request} asks" if has_table else f"because {folder} has no table for it"
        print(f"{name}: measuring, {reason}")
        measure(profile, [name], options)
    (paths,) = draw([name], profile)
    print(f"{name}: {', '.join(map(relative, paths)) or 'shown in the report'}")


def draw_figures(profile: Profile, options: Options) -> None:
    """Draw every figure that has a table, judge, and write the report."""
    names = require_tables(profile)
    for name in [name for name in supported_figures(profile) if name not in names]:
        print(
            f"{name}: not drawn, {relative(tables.folder(profile))} has no table for it "
            f"(make {name} {profile.make_options} measures it)"
        )
    publish(profile, names)


def rewrite_summaries(profile: Profile, options: Options) -> None:
    """Summarize the rows of tables again, draw, judge, and write the report."""
    names = existing_tables(profile)
    for name in names:
        tables.read_table(profile, name)  # refuses a damaged table before any is changed
    for name in names:
        tables.rewrite_summary(profile, name, FIGURES[name].summarize)
    warn_of_stale(profile, names)
    publish(profile, names)


def judge_claims(profile: Profile, options: Options) -> None:
    """Print the verdict on every claim, and write claims.csv."""
    require_tables(profile)
    verdicts = write_verdicts(profile)
    lines = verdicts.apply(claims.verdict_line, axis=1)
    sources = verdicts.apply(claims.source_text, axis=1)
    for source, of_source in lines.groupby(sources, sort=False):
        print(f"{source}:", *of_source, sep="\n  ")
    print_counts(profile, verdicts)
    if profile.name == "lab":
        results_page.write(profile, verdicts)


def write_report(profile: Profile, options: Options) -> None:
    """Write the page that shows verdicts, junctions and every figure."""
    require_tables(profile)
    render_report(profile)


def estimate(profile: Profile, options: Options) -> None:
    """Print the estimated GPU hours of each figure alone and of all together."""
    if profile.trains_models:
        raise ValueError(
            f"GPU hours are estimated for profiles of real models, {profile.name} is not one"
        )
    from benchmarks.engine.estimate import (
        GPU,
        LAUNCH,
        RESPONSES,
        SHARE,
        figure_hours,
        value_model_hours,
    )
    from benchmarks.engine.forecast import models_of
    from benchmarks.subjects.hub.memory import unknown_sizes

    needs = {name: FIGURES[name].cells(profile, 0) for name in supported_figures(profile)}
    print(
        f"{profile.name}: estimated hours on one {GPU} at {SHARE:.0%} utilisation, with "
        f"{1000 * LAUNCH:.0f} ms to launch a pass (an estimate, not measured)"
    )
    if unknown := unknown_sizes(profile, models_of(FigureCells.union(needs.values()))):
        print(unknown)
    for name, hours in figure_hours(profile, needs).items():
        print(f"  {name:12} {hours:6.1f}")
    print(f"your own value model, from {RESPONSES:,} responses, and a junction gate:")
    for name, hours in value_model_hours(profile).items():
        print(f"  {name:12} {hours:6.2f}")


def run_check(profile: Profile, options: Options) -> int:
    """Measure the check profile again and compare."""
    return regression.run(profile, FIGURES, options.fresh)


def run_verify(profile: Profile, options: Options) -> int:
    """Check that tables, verdicts and drawings belong together; change nothing."""
    existing_tables(profile)
    return verify.run(profile, FIGURES)


def measure_architectures(options: Options) -> int:
    """Measure and draw the cost of architectures without weights.

    Raises:
        ValueError: For another command than cost, and for options but --fresh.
    """
    if options.command != "cost":
        raise ValueError(
            f"profile {ARCHITECTURES} has random weights: only its cost can be measured "
            f"(make cost PROFILE={ARCHITECTURES})"
        )
    given = options.executor != "local" or options.replicates != 1
    if given or options.keep or has_hub_options(options):
        raise ValueError(
            f"profile {ARCHITECTURES} detects the hardware: --fresh is its only option"
        )
    from benchmarks.perf import architectures

    architectures.run(options.fresh)
    return 0


# --- helpers of the commands


def has_hub_options(options: Options) -> bool:
    """Return whether any option of real models was given."""
    return any(vars(options)[name] is not None for name in HUB_OPTIONS)


def selected_profile(options: Options) -> Profile:
    """Return the profile that the options name.

    Validates the options for it and finishes interrupted writes of its tables.

    Raises:
        ValueError: If an option is invalid for the profile.
    """
    profile = load_profile(options.profile)
    if profile.trains_models and has_hub_options(options):
        raise ValueError(
            "--limit, --device, --dtype and --batch-size are for profiles of real models, "
            f"{profile.name} is not one"
        )
    require_counts(options, "batch_size", "limit")
    requested_hardware(options)  # also where nothing will be measured
    if not 1 <= options.replicates <= profile.replicates:
        raise ValueError(
            f"replicates must be 1 to {profile.replicates} for the profile {profile.name}, "
            f"got {options.replicates}"
        )
    if options.limit:
        profile = limited(profile, options.limit)
    tables.finish_interrupted_writes(profile)
    return profile


def requested_hardware(options: Options) -> Hardware:
    """Return the hardware that the options request; settings left open are empty or 0."""
    return Hardware(options.device or "", options.dtype or "", options.batch_size or 0)


def limited(profile: Profile, limit: int) -> Profile:
    """Return the profile under another name, with at most `limit` prompts per objective."""
    evaluation, sweep = profile.evaluation, profile.sweep
    names = ("prompts_per_objective", "validation_prompts_per_objective")
    counts = {name: min(limit, getattr(evaluation, name)) for name in names}
    return replace(
        profile,
        name=f"{profile.name}{LIMITED}{limit}",
        evaluation=replace(evaluation, **counts),
        sweep=replace(sweep, rollout_prompts=min(limit, sweep.rollout_prompts)),
    )


def supported_figures(profile: Profile) -> list[str]:
    """Return the names of the figures that a profile can measure."""
    return [name for name, figure in FIGURES.items() if not figure.why_unsupported(profile)]


def existing_tables(profile: Profile) -> list[str]:
    """Return the names of the figures that have tables.

    Raises:
        FileNotFoundError: If no figure has one.
    """
    names = tables.with_tables(profile, FIGURES)
    if not names:
        raise FileNotFoundError(
            f"there is no table in {relative(tables.folder(profile))} to draw or judge: "
            f"make reproduce {profile.make_options} measures them"
        )
    return names


def require_tables(profile: Profile) -> list[str]:
    """Return the names of the figures that have tables; warn of stale and refuse damaged ones."""
    names = existing_tables(profile)
    warn_of_stale(profile, names)
    return names


def warn_of_stale(profile: Profile, names: Sequence[str]) -> None:
    """Check that tables are intact, and print a warning for each stale one."""
    for name in names:
        _, stale = tables.read_table(profile, name)
        if stale:
            print(f"warning: {name}.csv is stale, it was {stale}", file=sys.stderr)


def check_hardware(profile: Profile, name: str, options: Options) -> None:
    """Raise ValueError if a table was measured on other hardware than the options request."""
    provenance = tables.read_provenance(profile, name)
    for option in ("device", "dtype", "batch_size"):
        requested, measured = vars(options)[option], provenance.get(option)
        if requested not in (None, measured):
            raise ValueError(
                f"{name} was measured with {option.upper()}={measured}, not {requested}: "
                "FRESH=1 measures it again"
            )


def measure(
    profile: Profile, names: Sequence[str], options: Options, quality: bool = False
) -> None:
    """Train and measure what is missing for these figures, and write their tables."""
    from benchmarks.engine.run import RunOptions, run_experiment

    if options.keep:
        for name in tables.with_tables(profile, names):
            check_hardware(profile, name, options)
    hardware = requested_hardware(options)
    run_options = RunOptions(options.fresh, options.keep, quality, options.executor, hardware)
    figures = {name: FIGURES[name] for name in names}
    run_experiment(figures, profile, range(options.replicates), run_options)


def draw(names: Sequence[str], profile: Profile) -> list[Sequence[Path]]:
    """Draw figures from their tables in parallel, and return the files of each."""
    tasks: list[tuple[Any, ...]] = []  # methods of figures, and their arguments
    for name in names:
        summary, stale = tables.read_table(profile, name)
        folder = tables.FIGURES / profile.name
        tasks.append((FIGURES[name].plot, summary, profile, bool(stale), folder))
    processes = min(available_cores(), len(tasks))
    if processes == 1:
        drawn = [plot(*arguments) for plot, *arguments in tasks]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            with interrupts_withheld():  # this process handles them
                futures = [pool.submit(plot, *arguments) for plot, *arguments in tasks]
            drawn = [future.result() for future in futures]
    for name, paths in zip(names, drawn, strict=True):
        tables.record_drawing(profile, name, paths)
    return drawn


def publish(profile: Profile, names: Sequence[str]) -> None:
    """Draw figures, judge, print the count of verdicts, and write the report."""
    drawn = [name for name, paths in zip(names, draw(names, profile), strict=True) if paths]
    print(f"figures: {', '.join(drawn)} drawn in {relative(tables.FIGURES / profile.name)}")
    verdicts = write_verdicts(profile)
    counts = pd.crosstab(verdicts["source"], verdicts["verdict"])
    counts = counts.loc[verdicts["source"].unique()]
    shown = [verdict for verdict in claims.VERDICTS if verdict in counts]
    print(counts[shown].rename_axis(index=None, columns=None).to_string())
    print_counts(profile, verdicts)
    render_report(profile)


def write_verdicts(profile: Profile) -> pd.DataFrame:
    """Decide all claims, write claims.csv, draw forest plots, and return the pooled verdicts."""
    measured = {
        name: tables.read_table(profile, name) for name in tables.with_tables(profile, FIGURES)
    }
    summaries = {name: summary for name, (summary, _) in measured.items()}
    verdicts = claims.judge(profile, FIGURES, summaries)
    write_text(tables.folder(profile) / "claims.csv", verdicts.to_csv(index=False))
    verdicts = claims.pooled_verdicts(verdicts)
    stale = any(why for _, why in measured.values())
    paths = forest.draw(verdicts, profile, stale, tables.FIGURES / profile.name)
    tables.record_drawing(profile, forest.NAME, paths, "claims.csv")
    first = editions.first_verdicts(profile)
    if first is not None:
        paths = editions.draw(verdicts, first, profile, stale, tables.FIGURES / profile.name)
        tables.record_drawing(profile, editions.NAME, paths, "claims.csv")
    return verdicts


def print_counts(profile: Profile, verdicts: pd.DataFrame) -> None:
    """Print how many claims have each verdict."""
    counts = verdicts["verdict"].value_counts()
    listed = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in claims.VERDICTS)
    path = relative(tables.folder(profile) / "claims.csv")
    print(f"claims: {listed}; in {path} (make claims {profile.make_options} prints each)")


def render_report(profile: Profile) -> None:
    """Write the report and print its path."""
    path = render.write(profile, FIGURES)
    tables.record_drawing(profile, "report", [path], "claims.csv")
    print(f"report: {relative(path)}")


def relative(path: Path) -> str:
    """Return a path relative to the checkout."""
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
