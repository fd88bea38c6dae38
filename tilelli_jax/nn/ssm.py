"""Diagonal state-space model: the state pathway."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

Pair = tuple[jax.Array, jax.Array]


class DiagonalSSM(nnx.Module):
    """h_t = a·h_{t-1} + b·x_t, y_t = c·h_t, channel by channel, a = tanh(a_raw), in f32.

    Three vectors `[d_model]`, never quantised. Equivalent to a causal convolution with the kernel
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

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Returns the output of `__call__` and the state after `lengths [batch]` inputs (0 for none)."""
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
        return linear_recurrence(jnp.tanh(self.a_raw[...]), self.b[...] * x.astype(jnp.float32))


@jax.custom_vjp
def linear_recurrence(decay: jax.Array, drive: jax.Array) -> jax.Array:
    """h_t = decay·h_{t-1} + drive_t from h = 0: decay `[d]`, drive `[batch, time, d]` → the states.

    The gradient with respect to the drive is the same recurrence in reverse order, so that only the
    states are saved (reverse mode only).
    """
    return _run(decay, drive, reverse=False)


def _forward(decay: jax.Array, drive: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    states = _run(decay, drive, reverse=False)
    return states, (decay, states)


def _backward(saved: tuple[jax.Array, jax.Array], d_states: jax.Array) -> tuple[jax.Array, jax.Array]:
    decay, states = saved
    d_drive = _run(decay, d_states, reverse=True)
    return jnp.sum(d_drive[:, 1:] * states[:, :-1], (0, 1)), d_drive


linear_recurrence.defvjp(_forward, _backward)


def _run(decay: jax.Array, drive: jax.Array, reverse: bool) -> jax.Array:
    # On an accelerator each step costs a kernel launch; on a CPU a step is almost free.
    return jax.lax.platform_dependent(
        decay, drive, cpu=functools.partial(stepwise, reverse=reverse),
        default=functools.partial(associative, reverse=reverse))


def stepwise(decay: jax.Array, drive: jax.Array, reverse: bool = False) -> jax.Array:
    """The recurrence step by step; from the last step backwards if `reverse`."""
    def step(h: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = decay * h + u
        return h, h
    _, states = jax.lax.scan(step, jnp.zeros_like(drive[:, 0]), jnp.swapaxes(drive, 0, 1), unroll=8,
                             reverse=reverse)
    return jnp.swapaxes(states, 0, 1)


def associative(decay: jax.Array, drive: jax.Array, reverse: bool = False) -> jax.Array:
    """The same recurrence in log₂(time) passes (Blelloch 1990)."""
    def join(first: Pair, second: Pair) -> Pair:
        return first[0] * second[0], second[0] * first[1] + second[1]
    _, states = jax.lax.associative_scan(join, (jnp.broadcast_to(decay, drive.shape), drive), axis=1,
                                         reverse=reverse)
    return states
