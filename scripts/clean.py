"""Delete what runs and tools leave behind, once it has been listed and confirmed: `make clean`.

Committed files, tables of other profiles than smoke, models that scripts wrote to a folder of your
own, and .venv stay. Needs nothing but Python, so that it runs without .venv.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = (
    ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".import_linter_cache",
    "build", "dist", "site",
)  # fmt: skip


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line.

    Returns:
        Exit code: 0, 2 where there is no terminal to ask at, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    options = parser.parse_args(arguments)
    paths = dict(leftovers(root))
    if not paths:
        print("nothing to delete")
        return 0
    for path, content in paths.items():
        print(f"  {megabytes(path):8.1f} MB  {path.relative_to(root)}: {content}")
    print(
        "Tables and figures of all other profiles, models in folders of your own, and .venv stay."
    )
    if not options.yes and not sys.stdin.isatty():
        message = "nothing is deleted without a terminal to ask at: make clean YES=1 deletes"
        print(f"error: {message}", file=sys.stderr)
        return 2
    try:
        if not options.yes and input("Delete these? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was deleted")
            return 0
    except (KeyboardInterrupt, EOFError):
        print("\nnothing was deleted")
        return 130
    for path in paths:
        delete(path)
    return 0


def leftovers(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield each path to delete, and what it holds."""
    for path in sorted(root.glob(".cache/*")):
        yield path, "trained models and measured cells; a run recreates them"
    for path in (root / "results/smoke", root / "figures/smoke"):
        if path.exists():
            yield path, "of make smoke"
    for name in ("results", "figures"):
        for path in sorted((root / name).rglob(".*.unfinished")):
            yield path, "left by a run that was killed"
    for path in (root / name for name in TOOLS):
        if path.exists():
            yield path, "of a tool"


def megabytes(path: Path) -> float:
    """Return the size of a file, or of all files of a folder."""
    files = [path, *path.rglob("*")] if not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir()) / 1e6


def delete(path: Path) -> None:
    """Delete a file, a link or a folder."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
