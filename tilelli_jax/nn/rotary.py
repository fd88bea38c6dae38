"""Rotary positions (Su et al. 2021, arXiv:2104.09864), in the half-split form of GPT-NeoX and Gemma."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(width: int, theta: float, *, of: int | None = None, pairs: int | None = None) -> np.ndarray:
    """Angle per position of each pair of channels, f32 `[width / 2]`: theta^(−2i / of).

    Args:
        of: what the exponents are taken of; by default the width.
        pairs: how many pairs turn; the frequencies of the others are 0 ("proportional" rotary).
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(of or width)
    turning = 1.0 / np.power(np.float32(theta), exponents)
    if pairs is not None:
        turning[pairs:] = 0.0
    return turning.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, inverse_frequencies: jax.Array | np.ndarray) -> jax.Array:
    """Turns the first 2n channels, channel i with channel i + n, by position · frequency.

    Args:
        x: `[batch, time, heads, d_head]`; channels past 2n are left as they are.
        positions: `[batch, time]`, or `[1, time]` where they are the same for all rows.
        inverse_frequencies: `[n]`.

    Returns:
        As `x`. Angles are in f32, their sines and cosines in the type of `x`.
    """
    half = len(inverse_frequencies)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(inverse_frequencies)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)
