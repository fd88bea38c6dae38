"""Diagonal state-space model: the state pathway."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class DiagonalSSM(nnx.Module):
    """h_t = a·h_{t-1} + b·x_t, y_t = c·h_t, channel by channel, a = tanh(a_raw), in f32.

    Three vectors `[d_model]`, never quantised. Equal to the causal convolution with the kernel
    K[c, i] = c·aⁱ·b. Cache: h, `[batch, d_model]`.
    """

    def __init__(self, d_model: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        normal = nnx.initializers.normal(stddev=d_model**-0.5)
        self.a_raw = nnx.Param(jnp.full(d_model, 1.5))
        self.b = nnx.Param(normal(rngs.params(), (d_model,), jnp.float32))
        self.c = nnx.Param(normal(rngs.params(), (d_model,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → `[batch, time, d_model]`."""
        return (self._states(x) * self.c[...]).astype(self.dtype)

    def empty_cache(self, batch: int, size: int) -> jax.Array:
        del size
        return jnp.zeros((batch, self.b.shape[0]), jnp.float32)

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """As `__call__`, and the state after `lengths [batch]` inputs of each row (0 for none)."""
        states = self._states(x)
        last = jnp.take_along_axis(states, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        return ((states * self.c[...]).astype(self.dtype),
                jnp.where((lengths > 0)[:, None], last, 0.0))

    def step(self, x: jax.Array, cache: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One input `[batch, 1, d_model]` → its output and the next state."""
        del position
        state = jnp.tanh(self.a_raw[...]) * cache + self.b[...] * x[:, 0].astype(jnp.float32)
        return (state * self.c[...])[:, None].astype(self.dtype), state

    def _states(self, x: jax.Array) -> jax.Array:
        decay = jnp.tanh(self.a_raw[...])
        drive = self.b[...] * x.astype(jnp.float32)
        # A step costs a kernel launch on an accelerator and next to nothing on a CPU.
        return jax.lax.platform_dependent(decay, drive, cpu=recurrence, default=associative)


def recurrence(decay: jax.Array, drive: jax.Array) -> jax.Array:
    """h_t = decay·h_{t-1} + drive_t, one step after the other; drive `[batch, time, d]`."""
    def step(h, u):
        h = decay * h + u
        return h, h
    _, states = jax.lax.scan(step, jnp.zeros_like(drive[:, 0]), jnp.swapaxes(drive, 0, 1), unroll=8)
    return jnp.swapaxes(states, 0, 1)


def associative(decay: jax.Array, drive: jax.Array) -> jax.Array:
    """The same in log₂(time) passes (Blelloch 1990)."""
    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]
    _, states = jax.lax.associative_scan(join, (jnp.broadcast_to(decay, drive.shape), drive), axis=1)
    return states
