"""Hooks of mkdocs: the pages show figures that lie beside docs/, not inside it."""

from pathlib import Path

from mkdocs.structure.files import File

FIGURES = Path(__file__).parents[1] / "figures"


def on_files(files, config):
    """Add the drawn figures to the site."""
    for path in sorted(FIGURES.rglob("*.png")):
        name = f"figures/{path.relative_to(FIGURES)}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    """Point at the copies inside the site."""
    return markdown.replace("](../figures/", "](figures/")
