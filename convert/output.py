"""Where conversions go: directories that appear whole or not at all, and progress on the way."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tilelli_jax.errors import InputError
from tilelli_jax.tensors import FLOATS, Tensor, blocks, is_finite


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when all went well and is gone otherwise.

    Raises:
        InputError: `out` is there and not empty, or cannot be made.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; choose another OUT")
    made: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        yield made
        os.chmod(made, 0o755)
        if out.is_dir():
            out.rmdir()
        os.replace(made, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        if made is not None and made.exists():
            shutil.rmtree(made, ignore_errors=True)


def with_progress(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The same tensors, which move a bar along as they are read; silent where nobody looks.

    Read, they raise InputError where numbers are not finite: no command would take the result.
    """
    bar = tqdm(total=sum(tensor.nbytes for tensor in tensors.values()), desc=what, unit="B", unit_scale=True,
               disable=not sys.stderr.isatty(), leave=False)

    def watched(name: str, tensor: Tensor) -> Callable[[], Iterator[np.ndarray]]:
        def parts() -> Iterator[np.ndarray]:
            for part in tensor.parts():
                if part.dtype in FLOATS and not all(map(is_finite, blocks(part))):
                    raise InputError(f"{name}: holds numbers that are not finite")
                yield part
            bar.update(tensor.nbytes)
        return parts

    return {name: Tensor(tensor.shape, tensor.dtype, watched(name, tensor))
            for name, tensor in tensors.items()}
