"""Depthwise causal convolution: the local and wide pathways."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.nn.linear import Weight, fan_in_normal
from tilelli_jax.nn.quantize import Quantizer


class CausalConv(Weight):
    """y_t = Σ_k kernel[k] · x_{t-K+1+k} (+ bias), channel by channel; x is 0 before time 0.

    kernel `[K, d_model]`; tap K-1 multiplies the current position. Cache: the last K-1 inputs,
    `[batch, K-1, d_model]`.
    """

    def __init__(self, d_model: int, kernel_size: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 dtype: jnp.dtype = jnp.float32, bias: bool = False):
        # No rotation: a Hadamard transform mixes features, and the axis of the taps is time.
        super().__init__((kernel_size, d_model), quantizer, init=fan_in_normal(kernel_size),
                         rngs=rngs, rotates=False)
        self.bias = nnx.Param(jnp.zeros(d_model)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → `[batch, time, d_model]`."""
        return self._biased(causal_convolution(self._taps(), x.astype(self.dtype)))

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Returns the output of `__call__` and the cache after `lengths [batch]` inputs of each row."""
        x, reach = x.astype(self.dtype), self.shape[0] - 1
        window = lengths[:, None] + jnp.arange(reach)  # padded[i + reach] is x[i]
        cache = jnp.take_along_axis(_padded(x, reach, 0), window[..., None], axis=1)
        return self._biased(causal_convolution(self._taps(), x)), cache

    def step(self, x: jax.Array, cache: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One input `[batch, 1, d_model]` → its output and the updated cache."""
        del position
        window = jnp.concatenate([cache, x.astype(self.dtype)], axis=1)
        return self._biased(_slide(self._taps(), window, 1)), window[:, 1:]

    def _taps(self) -> jax.Array:
        return self.quantized().astype(self.dtype)

    def _biased(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


@jax.custom_vjp
def causal_convolution(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """y_t = Σ_k kernel[k] · x_{t-K+1+k}: kernel `[K, d]`, x `[batch, time, d]` → `[batch, time, d]`.

    Products and sums are in f32; the result has the type of x. The custom gradient (reverse mode only)
    saves x, while automatic differentiation of the slices would save a shifted copy for every tap. It
    slides over d_y padded once; automatic differentiation would pad every tap's term to full length,
    which XLA:CPU does not vectorise.
    """
    return _slide(kernel, _padded(x, kernel.shape[0] - 1, 0), x.shape[1])


def _forward(kernel: jax.Array, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return causal_convolution(kernel, x), (kernel, x)


def _backward(saved: tuple[jax.Array, jax.Array], d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel, x = saved
    reach, time = kernel.shape[0] - 1, x.shape[1]
    d_x = _slide(kernel[::-1], _padded(d_y, 0, reach), time)
    shifts = [min(reach - k, time) for k in range(reach + 1)]  # how far back tap k reads
    d_kernel = jnp.stack([jnp.sum(x[:, :time - s].astype(jnp.float32) * d_y[:, s:], (0, 1))
                          for s in shifts])
    return d_kernel.astype(kernel.dtype), d_x


causal_convolution.defvjp(_forward, _backward)


def _padded(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (before, after), (0, 0)))


def _slide(kernel: jax.Array, padded: jax.Array, time: int) -> jax.Array:
    # Shifted slices, not lax.conv: a depthwise convolution is far slower on CPU.
    y = jnp.zeros((), jnp.float32)
    for k in range(kernel.shape[0]):
        y = y + kernel[k].astype(jnp.float32) * jax.lax.slice_in_dim(padded, k, k + time, axis=1)
    return y.astype(padded.dtype)
