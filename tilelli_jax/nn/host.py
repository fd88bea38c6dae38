"""A table that stays in the host's memory, or on its disk, and is read by row from within jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class HostRows:
    """The rows of an array, perhaps a memory map; no part of what jit compiles."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.array[np.clip(ids, 0, len(self.array) - 1)])  # as a device does it


class HostTable(nnx.Module):
    """An embedding `[vocab, width]` whose table the device never holds: `rows` is given when it is loaded."""

    def __init__(self, vocab_size: int, width: int, *, dtype: jnp.dtype = jnp.float32):
        self.shape = (vocab_size, width)
        self.rows: HostRows | None = None
        self.dtype = dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids `[batch, time]` → `[batch, time, width]`.

        Raises:
            ValueError: the table has not been loaded.
        """
        if self.rows is None:
            raise ValueError("a table on the host has no random weights: load a model to use it")
        if not isinstance(ids, jax.core.Tracer):
            return jnp.asarray(self.rows(np.asarray(ids))).astype(self.dtype)
        rows = jax.ShapeDtypeStruct((*ids.shape, self.shape[1]), self.rows.array.dtype)
        return jax.pure_callback(self.rows, rows, ids, vmap_method="broadcast_all").astype(self.dtype)
