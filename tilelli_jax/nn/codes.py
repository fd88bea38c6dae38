"""Sparse codes: the k largest of many features, and the rows that they mix.

A product with codes of which 1 % are not zero is 99 % waste. Forward and backward, these functions
touch only the k columns or rows that are active; what is dense is the one product whose outcome says
which they are. Their gradients are those of the dense formulas, exactly.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

# From this share of active features on, dense products are faster (a CPU, 2048 × 1024 by 4096).
DENSE = 1 / 48


def top_features(x: jax.Array, center: jax.Array, kernel: jax.Array, bias: jax.Array, k: int,
                 dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """The k largest of (x − center) · kernel + bias: values `[rows, k]` f32, falling, and which, int32.

    Equals go to the feature that comes first.

    Args:
        x: `[rows, d]`; center `[d]`.
        kernel: `[d, features]`; bias `[features]`.
        dtype: of the product's operands; sums are in f32.
    """
    return _top_features(x, center, kernel, bias, k, jnp.dtype(dtype).name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _top_features(x: jax.Array, center: jax.Array, kernel: jax.Array, bias: jax.Array, k: int, dtype: str,
                  ) -> tuple[jax.Array, jax.Array]:
    product = jnp.matmul((x - center).astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    values, which = jax.lax.top_k(product + bias, k)
    return values, which


def _top_forward(x: jax.Array, center: jax.Array, kernel: jax.Array, bias: jax.Array, k: int, dtype: str,
                 ) -> tuple[Any, Any]:
    values, which = _top_features(x, center, kernel, bias, k, dtype)
    return (values, which), (x, center, kernel, which)


def _top_backward(k: int, dtype: str, saved: Any, slopes: Any) -> tuple[jax.Array, ...]:
    x, center, kernel, which = saved
    slope = slopes[0]
    to_kernel = add_rows(slope, which, x - center, kernel.shape[1]).T
    to_bias = jnp.zeros(kernel.shape[1]).at[which].add(slope)
    # Of the sum over the rows the center needs one product with a vector; what x needs is left out of
    # the program where nobody asks for it.
    to_x = mixed_rows(slope, which, kernel.T, dtype)
    return to_x.astype(x.dtype), -(kernel @ to_bias), to_kernel.astype(kernel.dtype), to_bias


_top_features.defvjp(_top_forward, _top_backward)


def largest_of_all(values: jax.Array, k: int | jax.Array) -> jax.Array:
    """All but the rows · k largest set to 0: values `[rows, columns]` ≥ 0, same shape.

    Equals of the smallest of them stay as well. Rows are those of all devices.
    """
    # Of the gradient the choice is no part, as in the k largest of one row.
    rising = jnp.sort(jax.lax.stop_gradient(values).reshape(-1))
    return jnp.where(values >= rising[values.size - len(values) * k], values, 0.0)


def mixed_rows(values: jax.Array, which: jax.Array, kernel: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Σ over the k of value · row: values and which `[rows, k]`, kernel `[features, d]` → `[rows, d]` f32."""
    return _mixed_rows(values, which, kernel, jnp.dtype(dtype).name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mixed_rows(values: jax.Array, which: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    kernel = kernel.astype(dtype)
    if _is_dense(values, len(kernel)):
        codes = dense_codes(values, which, len(kernel)).astype(dtype)
        return jnp.matmul(codes, kernel, preferred_element_type=jnp.float32)

    # One code of each row at a time: gathered all at once, the rows are k times the activations, and
    # XLA's CPU compiler writes them to memory first.
    def add(j: int, mixed: jax.Array) -> jax.Array:
        value = jax.lax.dynamic_index_in_dim(values, j, axis=1).astype(dtype)
        row = kernel[jax.lax.dynamic_index_in_dim(which, j, axis=1, keepdims=False)]
        return mixed + (value * row).astype(jnp.float32)
    return jax.lax.fori_loop(0, values.shape[1], add, jnp.zeros((len(values), kernel.shape[1])))


def _mixed_forward(values: jax.Array, which: jax.Array, kernel: jax.Array, dtype: str) -> tuple[Any, Any]:
    return _mixed_rows(values, which, kernel, dtype), (values, which, kernel)


def _mixed_backward(dtype: str, saved: Any, slope: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    values, which, kernel = saved
    rows = kernel.astype(dtype)
    to_kernel = add_rows(values, which, slope, len(kernel)).astype(kernel.dtype)
    if _is_dense(values, len(kernel)):
        every = jnp.matmul(slope.astype(dtype), rows.T, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(every, which, axis=1).astype(values.dtype), None, to_kernel

    def one(j: jax.Array) -> jax.Array:
        row = rows[jax.lax.dynamic_index_in_dim(which, j, axis=1, keepdims=False)]
        return jnp.sum(slope.astype(dtype) * row, axis=1, dtype=jnp.float32)
    to_values = jax.lax.map(one, jnp.arange(values.shape[1])).T
    return to_values.astype(values.dtype), None, to_kernel


_mixed_rows.defvjp(_mixed_forward, _mixed_backward)


def add_rows(values: jax.Array, which: jax.Array, rows: jax.Array, n: int) -> jax.Array:
    """codesᵀ · rows: each active code adds its row times its value to the row of its feature.

    Args:
        values, which: `[rows, k]`.
        rows: `[rows, d]`.

    Returns:
        `[n, d]` f32.
    """
    values, rows = values.astype(jnp.float32), rows.astype(jnp.float32)
    if _is_dense(values, n):
        return dense_codes(values, which, n).T @ rows

    def add(j: int, total: jax.Array) -> jax.Array:
        value = jax.lax.dynamic_index_in_dim(values, j, axis=1)
        feature = jax.lax.dynamic_index_in_dim(which, j, axis=1, keepdims=False)
        return total.at[feature].add(value * rows)
    return jax.lax.fori_loop(0, values.shape[1], add, jnp.zeros((n, rows.shape[1])))


def dense_codes(values: jax.Array, which: jax.Array, n: int) -> jax.Array:
    """All codes, zero where they are not active: `[rows, k]` → `[rows, n]` f32."""
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], n), jnp.float32).at[rows, which].set(values.astype(jnp.float32))


def _is_dense(values: jax.Array, n: int) -> bool:
    return values.shape[1] > DENSE * n
