"""Reports the progress of a conversion and counts the numbers that it rounds to 0."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import FLOATS, Tensor, blocks, count_vanishing, is_finite


def with_progress(tensors: Mapping[str, Tensor], label: str, source: Path,
                  vanished: dict[str, int]) -> dict[str, Tensor]:
    """Returns the same tensors; reading them advances a progress bar, which is shown on a terminal only.

    Reading raises InputError if a number is not finite, since no command accepts such a model.

    Args:
        tensors: of any type; floating-point ones are checked.
        label: text before the progress bar.
        source: path of the source, for error messages.
        vanished: receives, for each tensor that was read, how many nonzero numbers become 0 in its type.
    """
    bar = tqdm(total=sum(tensor.nbytes for tensor in tensors.values()), desc=label, unit="B", unit_scale=True,
               disable=not sys.stderr.isatty(), leave=False)

    def with_checks(name: str, tensor: Tensor) -> Callable[[], Iterator[np.ndarray]]:
        def parts() -> Iterator[np.ndarray]:
            count = 0
            for part in tensor.parts():
                for block in blocks(part) if tensor.dtype in FLOATS else ():
                    if not is_finite(block):
                        raise InputError(f"{source}: {name}: contains numbers that are not finite")
                    count += count_vanishing(block, tensor.dtype)
                yield part
            vanished[name] = count
            bar.update(tensor.nbytes)
        return parts

    return {name: Tensor(tensor.shape, tensor.dtype, with_checks(name, tensor), label=f"{source}: {name}")
            for name, tensor in tensors.items()}
