"""All figures and tables by name: importing a module of this package registers its own."""

from importlib import import_module
from pkgutil import iter_modules

from benchmarks import figures
from benchmarks.figures.base import REGISTERED, Figure

for module in iter_modules(figures.__path__):
    import_module(f"{figures.__name__}.{module.name}")

# the paper's own, which are numbered, come first
FIGURES: dict[str, Figure] = {
    name: REGISTERED[name]
    for name in sorted(REGISTERED, key=lambda name: (not name[-1].isdigit(), name))
}
