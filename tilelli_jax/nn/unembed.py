"""Unembedding: logits from the residual stream, one slice of the vocabulary at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tilelli_jax.nn.matmul import contract


@dataclasses.dataclass(frozen=True)
class Unembedding:
    """logits = cap · tanh(norm(x) · tableᵀ / cap), or norm(x) · tableᵀ without a cap.

    Attributes:
        norm: the final norm, `[rows, d_model]` → `[rows, d_model]`.
        table: `[vocab, d_model]`, or `[d_model, vocab]` if `by_column`.
        cap: the soft cap of the logits, or None.
        dtype: type of the product's operands.
    """

    norm: Callable[[jax.Array], jax.Array]
    table: jax.Array
    by_column: bool = False
    cap: float | None = None
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))

    @property
    def vocab_size(self) -> int:
        return self.table.shape[1 if self.by_column else 0]

    @jax.named_scope("unembedding")
    def logits(self, normed: jax.Array, start: jax.Array | int, size: int, *,
               rounded: bool = False) -> jax.Array:
        """Logits of the tokens start … start + size − 1: normed `[rows, d_model]` → f32 `[rows, size]`.

        Args:
            rounded: round every step to bfloat16, as PyTorch does for a bfloat16 network.
        """
        axis = 1 if self.by_column else 0
        table_slice = jax.lax.dynamic_slice_in_dim(self.table, start, size, axis)
        subscripts = "nd,dv->nv" if self.by_column else "nd,vd->nv"
        dtype = jnp.dtype(jnp.bfloat16) if rounded else self.dtype
        logits = contract(subscripts, normed, table_slice, dtype=dtype, result=jnp.float32)

        def step(x: jax.Array) -> jax.Array:
            return x.astype(jnp.bfloat16).astype(jnp.float32) if rounded else x
        logits = step(logits)
        if self.cap is not None:
            logits = step(step(jnp.tanh(step(logits / self.cap))) * self.cap)
        return logits
