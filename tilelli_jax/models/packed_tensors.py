"""Packed weights as they are stored: codes as bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from tilelli_jax.errors import InputError
from tilelli_jax.io import packing
from tilelli_jax.io.tensors import CONFIG, Tensor, in_memory
from tilelli_jax.models.arrays import abstract_arrays, check_sizes, packed_names
from tilelli_jax.nn.linear import PACKED
from tilelli_jax.nn.quantize import quantizer


def packed_tensors(arrays: Mapping[str, np.ndarray], config: Any) -> dict[str, Tensor]:
    """The arrays as they are stored: codes of packed weights as bytes (`io.packing`)."""
    def stored(name: str, array: np.ndarray) -> Tensor:
        levels = quantizer(getattr(config, "quantizer", "none")).levels
        return in_memory(packing.pack(array, levels) if levels and name.endswith(PACKED) else array)
    return {name: stored(name, array) for name, array in arrays.items()}


def unpacked_tensors(tensors: Mapping[str, Tensor], build: Callable[..., nnx.Module], config: Any,
                     source: str) -> dict[str, Tensor]:
    """The inverse of `packed_tensors`.

    Args:
        build: the network's class.
        source: named in errors.

    Raises:
        InputError: there are packed codes and no quantiser, or (where a tensor is read) it is damaged.
    """
    if not packed_names(tensors):
        return dict(tensors)
    levels = quantizer(getattr(config, "quantizer", "none")).levels
    if levels is None:
        raise InputError(f"{source}: packed weights need a quantizer in {CONFIG}, found none")
    check_sizes(config, {name: tensor.shape for name, tensor in tensors.items()}, source)
    shapes = abstract_arrays(build, config, packed=True)

    def unpacked(name: str, tensor: Tensor) -> Tensor:
        shape = shapes[name].shape

        def read() -> Iterator[np.ndarray]:
            if tensor.dtype != np.uint8:
                raise InputError(f"{source}: {name}: expected packed codes (U8), found {tensor.dtype}")
            try:
                yield packing.unpack(tensor.read(), math.prod(shape), levels).reshape(shape)
            except InputError as error:
                raise InputError(f"{source}: {name}: {error}") from None
        return Tensor(shape, np.dtype(np.int8), read)
    return {name: unpacked(name, tensor) if name.endswith(PACKED) and name in shapes else tensor
            for name, tensor in tensors.items()}
