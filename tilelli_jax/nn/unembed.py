"""How a stream becomes logits, in pieces of the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tilelli_jax.nn.contract import contract


@dataclasses.dataclass(frozen=True)
class Unembedding:
    """logits = cap · tanh(norm(x) · tableᵀ / cap), or without a cap norm(x) · tableᵀ.

    Attributes:
        norm: the final norm: `[rows, d_model]` → likewise.
        table: `[vocab, d_model]`, or `[d_model, vocab]` where `by_column`.
        cap: the soft cap of the logits, or None.
        dtype: of the product's operands.
    """

    norm: Callable[[jax.Array], jax.Array]
    table: jax.Array
    by_column: bool = False
    cap: float | None = None
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))

    @property
    def vocab_size(self) -> int:
        return self.table.shape[1 if self.by_column else 0]

    def logits(self, normed: jax.Array, start: jax.Array | int, size: int, *,
               rounded: bool = False) -> jax.Array:
        """Logits of some tokens: normed `[rows, d_model]` → f32 `[rows, size]`, tokens from `start` on.

        Args:
            rounded: every step rounded to bfloat16, as PyTorch has it for a network in bfloat16.
        """
        axis = 1 if self.by_column else 0
        piece = jax.lax.dynamic_slice_in_dim(self.table, start, size, axis)
        subscripts = "nd,dv->nv" if self.by_column else "nd,vd->nv"
        dtype = jnp.dtype(jnp.bfloat16) if rounded else self.dtype
        found = contract(subscripts, normed, piece, dtype=dtype, result=jnp.float32)

        def step(x: jax.Array) -> jax.Array:
            return x.astype(jnp.bfloat16).astype(jnp.float32) if rounded else x
        found = step(found)
        if self.cap is not None:
            found = step(step(jnp.tanh(step(found / self.cap))) * self.cap)
        return found
