"""Rotary positions (Su et al. 2021, arXiv:2104.09864) in the half-split form of GPT-NeoX, Llama and Gemma."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def frequencies(width: int, theta: float, *, denominator: int | None = None,
                pairs: int | None = None) -> np.ndarray:
    """Angle per position of each channel pair, f32 `[width / 2]`: theta^(−2i / denominator).

    Args:
        denominator: denominator of the exponents; by default the width.
        pairs: number of rotated pairs; the other frequencies are 0 ("proportional" rotary).
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(denominator or width)
    result = 1.0 / np.power(np.float32(theta), exponents)
    if pairs is not None:
        result[pairs:] = 0.0
    return result.astype(np.float32)


def rotate(x: jax.Array, positions: jax.Array, inverse_frequencies: jax.Array | np.ndarray,
           amplitude: jax.Array | float = 1.0) -> jax.Array:
    """Rotates the channel pairs (i, i + n), for i < n, by position · frequency.

    Args:
        x: `[batch, time, heads, d_head]`; channels from 2n on are unchanged.
        positions: `[batch, time]`, or `[1, time]` if all rows have the same positions.
        inverse_frequencies: `[n]`.
        amplitude: factor of the rotated channels, a scalar.

    Returns:
        Shape and type of `x`. Angles are in f32, sines and cosines in the type of `x`.
    """
    half = len(inverse_frequencies)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(inverse_frequencies)
    cos, sin = ((amplitude * wave).astype(x.dtype) for wave in (jnp.cos(angles), jnp.sin(angles)))
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)
