"""Tensors on their way from one file to another: how far they are, and whether they are finite."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from tqdm import tqdm

from tilelli_jax.errors import InputError
from tilelli_jax.tensors import FLOATS, Tensor, blocks, is_finite


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
