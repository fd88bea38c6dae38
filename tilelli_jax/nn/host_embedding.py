"""An embedding table in host memory or on disk, read by row from within jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class HostRows:
    """Reads rows of an array, which may be a memory map. jit does not trace the array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.array[np.clip(ids, 0, len(self.array) - 1)])  # clips, as devices do


class HostEmbedding(nnx.Module):
    """An embedding `[vocab, width]` whose table is never on a device; loading a model sets `rows`."""

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
