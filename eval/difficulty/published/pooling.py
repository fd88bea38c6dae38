"""Features from activations: encoded, and pooled in the dtype on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import TopKSAE
from tilelli_jax.io.tensors import Tensor

POSITIONS = 4096  # in one batch of the encoder


def pooled(tensor: Tensor, lengths: NDArray[np.int64], sae: TopKSAE | None,
           path: Path) -> dict[str, np.ndarray]:
    """Pools the activations of each item, and their codes if there is an autoencoder.

    Args:
        tensor: `[items, positions, d]`, float16 or float32.
        lengths: `[items]`, the number of positions to use, at least 1.
        path: the tensor's file, for error messages.

    Returns:
        `raw` `[items, d or 3 d]`, in the tensor's dtype, and `sae` f32 `[items, n or 3 n]`. With one position
        it is that position; with several, mean, maximum and last of the first `lengths` are concatenated.

    Raises:
        InputError: a number is not finite.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("raw", "sae")[:1 if sae is None else 2]}
    for name, item, values in _encoded(tensor, sae, path):
        used = values[:lengths[item]]
        rows[name].append(used[0] if len(values) == 1 else
                          np.concatenate([used.mean(axis=0), used.max(axis=0), used[-1]]))
    return {name: np.stack(block) for name, block in rows.items()}


def _encoded(tensor: Tensor, sae: TopKSAE | None, path: Path) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields (block, item, `[positions, d or n]`): activations and, with an autoencoder, codes."""
    items, positions, _ = tensor.shape
    activations = tensor.mapped() if tensor.mapped else tensor.read()
    encode = None if sae is None else _encoder(sae)
    step = max(1, POSITIONS // positions)
    for start in range(0, items, step):
        values = np.asarray(activations[start:start + step])
        finite = np.isfinite(values).all(axis=(1, 2))
        if not finite.all():
            raise InputError(f"{path}: item {start + int(np.argmin(finite))}: expected finite numbers only")
        blocks = {"raw": values}
        if encode is not None:
            blocks["sae"] = encode(values.astype(np.float32))
        for name, block in blocks.items():
            yield from ((name, start + i, rows) for i, rows in enumerate(block))


def _encoder(sae: TopKSAE) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from `[items, positions, d]` to dense codes `[items, positions, n]`, both f32."""
    graph, params = nnx.split(sae)

    @jax.jit
    def encode(params: Any, x: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return model.dense(model.encode(x))
    return lambda values: jax.device_get(encode(params, jnp.asarray(values)))
