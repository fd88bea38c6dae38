"""Position-wise feed-forward network: the dense pathway."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.nn.linear import Linear
from tilelli_jax.nn.quantize import Quantizer


class FeedForward(nnx.Module):
    """y = GELU(x · up) · down, exact-erf GELU, no biases; up widens by `expand`. Needs no cache."""

    def __init__(self, d_model: int, expand: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 dtype: jnp.dtype = jnp.float32):
        self.up = Linear(d_model, expand * d_model, quantizer, rngs=rngs, dtype=dtype)
        self.down = Linear(expand * d_model, d_model, quantizer, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → `[batch, time, d_model]`."""
        return self.down(jax.nn.gelu(self.up(x), approximate=False))

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, tuple[()]]:
        del lengths, size
        return self(x), ()

    def step(self, x: jax.Array, cache: tuple[()], position: jax.Array) -> tuple[jax.Array, tuple[()]]:
        del position
        return self(x), cache
