"""Depthwise causal convolution: the local and the wide pathway."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.nn.linear import Weight, fan_in_normal
from tilelli_jax.nn.quantize import Quantizer


class CausalConv(Weight):
    """y_t = Σ_k kernel[k] · x_{t-K+1+k} (+ bias), channel by channel; x is 0 before time 0.

    kernel `[K, d_model]`; tap K-1 meets the current position. Cache: the last K-1 inputs,
    `[batch, K-1, d_model]`.
    """

    def __init__(self, d_model: int, kernel_size: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 dtype: jnp.dtype = jnp.float32, bias: bool = False):
        # No rotation along the taps: a Hadamard transform mixes features, and these are times.
        super().__init__((kernel_size, d_model), quantizer, init=fan_in_normal(kernel_size),
                         rngs=rngs, rotates=False)
        self.bias = nnx.Param(jnp.zeros(d_model)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → `[batch, time, d_model]`."""
        reach = self.kernel.shape[0] - 1
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (reach, 0), (0, 0)))
        return self._combine(padded, x.shape[1])

    def empty_cache(self, batch: int, size: int) -> jax.Array:
        del size
        return jnp.zeros((batch, self.kernel.shape[0] - 1, self.kernel.shape[1]), self.dtype)

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """As `__call__`, and the cache after `lengths [batch]` inputs of each row."""
        reach = self.kernel.shape[0] - 1
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (reach, 0), (0, 0)))
        window = lengths[:, None] + jnp.arange(reach)  # padded[i + reach] is x[i]
        cache = jnp.take_along_axis(padded, window[..., None], axis=1)
        return self._combine(padded, x.shape[1]), cache

    def step(self, x: jax.Array, cache: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One input `[batch, 1, d_model]` → its output and the next cache."""
        del position
        window = jnp.concatenate([cache, x.astype(self.dtype)], axis=1)
        return self._combine(window, 1), window[:, 1:]

    def _combine(self, padded: jax.Array, time: int) -> jax.Array:
        # Shifted slices, not lax.conv: a depthwise convolution is far slower on CPU.
        kernel = self.quantized().astype(self.dtype)
        y = kernel[0] * padded[:, :time]
        for k in range(1, kernel.shape[0]):
            y = y + kernel[k] * jax.lax.slice_in_dim(padded, k, k + time, axis=1)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
