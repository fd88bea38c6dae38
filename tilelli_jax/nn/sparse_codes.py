"""Sparse codes: the k largest of many features, and sums of kernel rows weighted by them.

When 1 % of the codes are not zero, a dense product spends 99 % of its work on zeros. Forward and
backward, these functions read only the k active columns or rows; the one dense product is the one that
selects them. The gradients equal those of the dense formulas exactly.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Above this fraction of active features, dense products are faster (a CPU, 2048 × 1024 by 4096).
DENSE_FRACTION = 1 / 48


def top_features(x: jax.Array, center: jax.Array, kernel: jax.Array, bias: jax.Array, k: int,
                 dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """The k largest entries of (x − center) · kernel + bias in each row.

    Of equal values, the feature with the lower index comes first.

    Args:
        x: `[rows, d]`; center `[d]`.
        kernel: `[d, features]`; bias `[features]`.
        dtype: type of the product's operands; sums are in f32.

    Returns:
        Values `[rows, k]`, f32, in descending order, and their feature indices, int32, same shape.
    """
    return _top_features(x, center, kernel, bias, k, jnp.dtype(dtype).name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _top_features(x: jax.Array, center: jax.Array, kernel: jax.Array, bias: jax.Array, k: int, dtype: str,
                  ) -> tuple[jax.Array, jax.Array]:
    product = jnp.matmul((x - center).astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    values, indices = jax.lax.top_k(product + bias, k)
    return values, indices


def _top_forward(x: jax.Array, center: jax.Array, kernel: jax.Array, bias: jax.Array, k: int, dtype: str,
                 ) -> tuple[Any, Any]:
    values, indices = _top_features(x, center, kernel, bias, k, dtype)
    return (values, indices), (x, center, kernel, indices)


def _top_backward(k: int, dtype: str, saved: Any, slopes: Any) -> tuple[jax.Array, ...]:
    x, center, kernel, indices = saved
    slope = slopes[0]
    to_kernel = add_rows(slope, indices, x - center, kernel.shape[1]).T
    to_bias = jnp.zeros(kernel.shape[1]).at[indices].add(slope)
    # The gradient of the center is a sum over rows: one product with a vector. XLA removes the gradient
    # of x from the program where it is not used.
    to_x = weighted_rows(slope, indices, kernel.T, dtype)
    return to_x.astype(x.dtype), -(kernel @ to_bias), to_kernel.astype(kernel.dtype), to_bias


_top_features.defvjp(_top_forward, _top_backward)


def largest_of_all(values: jax.Array, k: int | jax.Array) -> jax.Array:
    """Keeps the rows · k largest of all values `[rows, columns]` ≥ 0 and sets the others to 0.

    Values equal to the smallest kept one stay too. The rows are those of all devices.
    """
    # The selection has no gradient, as with the k largest of one row.
    ascending = jnp.sort(jax.lax.stop_gradient(values).reshape(-1))
    return jnp.where(values >= ascending[values.size - len(values) * k], values, 0.0)


def weighted_rows(values: jax.Array, indices: jax.Array, kernel: jax.Array,
                  dtype: Any = jnp.float32) -> jax.Array:
    """Σ_k value_k · kernel[index_k] for each row.

    Args:
        values, indices: `[rows, k]`.
        kernel: `[features, d]`.

    Returns:
        `[rows, d]`, f32.
    """
    return _weighted_rows(values, indices, kernel, jnp.dtype(dtype).name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weighted_rows(values: jax.Array, indices: jax.Array, kernel: jax.Array, dtype: str) -> jax.Array:
    kernel = kernel.astype(dtype)
    if _is_dense(values, len(kernel)):
        codes = dense_codes(values, indices, len(kernel)).astype(dtype)
        return jnp.matmul(codes, kernel, preferred_element_type=jnp.float32)

    # One code of each row at a time: gathered at once, the kernel rows would take k times the memory of
    # the activations, and XLA's CPU compiler would materialise them.
    def add(j: int, mixed: jax.Array) -> jax.Array:
        value = jax.lax.dynamic_index_in_dim(values, j, axis=1).astype(dtype)
        row = kernel[jax.lax.dynamic_index_in_dim(indices, j, axis=1, keepdims=False)]
        return mixed + (value * row).astype(jnp.float32)
    return jax.lax.fori_loop(0, values.shape[1], add, jnp.zeros((len(values), kernel.shape[1])))


def _weighted_forward(values: jax.Array, indices: jax.Array, kernel: jax.Array,
                      dtype: str) -> tuple[Any, Any]:
    return _weighted_rows(values, indices, kernel, dtype), (values, indices, kernel)


def _weighted_backward(dtype: str, saved: Any, slope: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    values, indices, kernel = saved
    rows = kernel.astype(dtype)
    to_kernel = add_rows(values, indices, slope, len(kernel)).astype(kernel.dtype)
    if _is_dense(values, len(kernel)):
        all_products = jnp.matmul(slope.astype(dtype), rows.T, preferred_element_type=jnp.float32)
        return jnp.take_along_axis(all_products, indices, axis=1).astype(values.dtype), None, to_kernel

    def product(j: jax.Array) -> jax.Array:
        row = rows[jax.lax.dynamic_index_in_dim(indices, j, axis=1, keepdims=False)]
        return jnp.sum(slope.astype(dtype) * row, axis=1, dtype=jnp.float32)
    to_values = jax.lax.map(product, jnp.arange(values.shape[1])).T
    return to_values.astype(values.dtype), None, to_kernel


_weighted_rows.defvjp(_weighted_forward, _weighted_backward)


def add_rows(values: jax.Array, indices: jax.Array, rows: jax.Array, n: int) -> jax.Array:
    """codesᵀ · rows: each active code adds value · row to the output row of its feature.

    Args:
        values, indices: `[rows, k]`.
        rows: `[rows, d]`.
        n: number of features.

    Returns:
        `[n, d]`, f32.
    """
    values, rows = values.astype(jnp.float32), rows.astype(jnp.float32)
    if _is_dense(values, n):
        return dense_codes(values, indices, n).T @ rows

    def add(j: int, total: jax.Array) -> jax.Array:
        value = jax.lax.dynamic_index_in_dim(values, j, axis=1)
        feature = jax.lax.dynamic_index_in_dim(indices, j, axis=1, keepdims=False)
        return total.at[feature].add(value * rows)
    return jax.lax.fori_loop(0, values.shape[1], add, jnp.zeros((n, rows.shape[1])))


def dense_codes(values: jax.Array, indices: jax.Array, n: int) -> jax.Array:
    """All n codes of each row, 0 where a feature is not active: `[rows, k]` → `[rows, n]`, f32."""
    rows = jnp.arange(values.shape[0])[:, None]
    return jnp.zeros((values.shape[0], n), jnp.float32).at[rows, indices].set(values.astype(jnp.float32))


def _is_dense(values: jax.Array, n: int) -> bool:
    return values.shape[1] > DENSE_FRACTION * n
