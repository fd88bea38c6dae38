"""Tensors on their way from one file to another: how far they are, and what of them would be lost."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tilelli_jax.errors import InputError
from tilelli_jax.tensors import Tensor, blocks, count_vanishing, is_finite


def with_progress(tensors: Mapping[str, Tensor], what: str, source: Path,
                  vanished: dict[str, int]) -> dict[str, Tensor]:
    """The same tensors, which move a bar along as they are read; silent where nobody looks.

    Read, they raise InputError where numbers are not finite: no command would take the result.

    Args:
        tensors: of floating-point numbers.
        source: where they are from, for errors.
        vanished: gets, of each tensor that was read, how many numbers become 0 in its type and were not.
    """
    bar = tqdm(total=sum(tensor.nbytes for tensor in tensors.values()), desc=what, unit="B", unit_scale=True,
               disable=not sys.stderr.isatty(), leave=False)

    def watched(name: str, tensor: Tensor) -> Callable[[], Iterator[np.ndarray]]:
        def parts() -> Iterator[np.ndarray]:
            count = 0
            for part in tensor.parts():
                for block in blocks(part):
                    if not is_finite(block):
                        raise InputError(f"{source}: {name}: holds numbers that are not finite")
                    count += count_vanishing(block, tensor.dtype)
                yield part
            vanished[name] = count
            bar.update(tensor.nbytes)
        return parts

    return {name: Tensor(tensor.shape, tensor.dtype, watched(name, tensor), label=f"{source}: {name}")
            for name, tensor in tensors.items()}
