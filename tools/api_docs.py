"""Writes the API reference as HTML, from docstrings: python tools/api_docs.py OUT.

Every warning is an error, such as a name in `__all__` that cannot be imported.
"""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import tilelli_jax


def write(out: Path) -> None:
    """Writes a page for every module of the package below `out`."""
    for name in tilelli_jax.__all__:  # pdoc does not call a module's __getattr__
        setattr(tilelli_jax, name, getattr(tilelli_jax, name))
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # The methods that NamedTuple generates have their class's annotations, but not its module's names.
        warnings.filterwarnings("ignore", "Error parsing type annotation ForwardRef", UserWarning)
        pdoc.pdoc("tilelli_jax", *modules(), output_directory=out)


def modules() -> list[str]:
    """The modules and packages directly inside the package: pdoc finds none where `__all__` names none."""
    names = [name for _, name, _ in pkgutil.iter_modules(tilelli_jax.__path__, "tilelli_jax.")]
    return sorted({*names, "tilelli_jax.convert", "tilelli_jax.eval"})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
