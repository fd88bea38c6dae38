"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450), in f32.

    The default eps is PyTorch's 1e-5, not Flax's 1e-6. The result is in `dtype`.
    """

    def __init__(self, d_model: int, *, dtype: jnp.dtype = jnp.float32, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(d_model))
        self.bias = nnx.Param(jnp.zeros(d_model))
        self.dtype = dtype
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), -1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...] + self.bias[...]
        return y.astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / √(mean x² + eps) · scale over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467), in f32.

    The result is in `dtype`.

    Args:
        offset: added to `scale`, which is initialised with 1 − offset. Gemma up to 3 stores scales minus 1.
    """

    def __init__(self, d_model: int, *, dtype: jnp.dtype = jnp.float32, eps: float = 1e-6,
                 offset: float = 0.0):
        self.scale = nnx.Param(jnp.full(d_model, 1.0 - offset))
        self.dtype = dtype
        self.eps = eps
        self.offset = offset

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.scale[...].astype(jnp.float32) + self.offset if self.offset else self.scale[...]
        return (rms_normalized(x, self.eps) * scale).astype(self.dtype)


def rms_normalized(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / √(mean x² + eps) over the last axis, f32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
