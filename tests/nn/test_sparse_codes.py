"""Compares the sparse-code functions with the dense formulas, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerance import noise
from tilelli_jax.nn import sparse_codes


@pytest.fixture(params=["sparse", "dense"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces all products to be sparse, or all to be dense."""
    monkeypatch.setattr(sparse_codes, "DENSE_FRACTION", 0.0 if request.param == "dense" else 1.0)


def random_inputs(n: int = 7, d: int = 5, features: int = 24) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)
                 for shape in ((n, d), (d,), (d, features), (features,), (features, d)))


def reconstruct(top: Callable, mix: Callable) -> Callable:
    """A scalar function of an autoencoder; its gradients use both functions."""
    def objective(x: Any, center: Any, kernel: Any, bias: Any, decoder: Any) -> jax.Array:
        values, indices = top(x, center, kernel, bias)
        return jnp.sum(jnp.sin(mix(jax.nn.relu(values), indices, decoder) + center) * x)
    return objective


@pytest.mark.usefixtures("method")
@pytest.mark.parametrize("k", [1, 4, 24])
def test_values_and_gradients_match_the_dense_formulas(k: int) -> None:
    sparse = reconstruct(lambda *a: sparse_codes.top_features(*a, k), sparse_codes.weighted_rows)
    dense = reconstruct(lambda x, c, w, b: jax.lax.top_k((x - c) @ w + b, k),
                        lambda values, indices, w: sparse_codes.dense_codes(values, indices, len(w)) @ w)
    inputs = random_inputs()
    arguments = tuple(range(5))
    result, expected = (jax.jit(jax.value_and_grad(objective, arguments))(*inputs)
                        for objective in (sparse, dense))
    chex.assert_trees_all_close(result, expected, atol=noise(10.0), rtol=0)  # sums of up to 10


@pytest.mark.usefixtures("method")
def test_sums_match_loops() -> None:
    rng = np.random.default_rng(1)
    values, rows = rng.standard_normal((6, 3)), rng.standard_normal((6, 4))
    indices = np.stack([rng.permutation(9)[:3] for _ in range(6)])
    kernel = rng.standard_normal((9, 4))
    expected, mixed = np.zeros((9, 4)), np.zeros((6, 4))
    for i in range(6):
        for j in range(3):
            expected[indices[i, j]] += values[i, j] * rows[i]
            mixed[i] += values[i, j] * kernel[indices[i, j]]
    jax_values, jax_indices = jnp.asarray(values), jnp.asarray(indices)
    np.testing.assert_allclose(sparse_codes.add_rows(jax_values, jax_indices, jnp.asarray(rows), 9),
                               expected, rtol=0, atol=noise(expected, 3.0))
    np.testing.assert_allclose(sparse_codes.weighted_rows(jax_values, jax_indices, jnp.asarray(kernel)),
                               mixed, rtol=0, atol=noise(mixed, 3.0))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_batch_top_k_keeps_the_largest_and_their_gradients(k: int) -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal((8, 5)), 0).astype(np.float32)
    order = np.argsort(-values.ravel())[:8 * k]
    expected = np.where(np.isin(np.arange(40), order).reshape(8, 5), values, 0)
    result, back = jax.vjp(jax.jit(lambda v: sparse_codes.largest_of_all(v, jnp.int32(k))),
                           jnp.asarray(values))
    np.testing.assert_array_equal(result, expected)
    slope, = back(jnp.ones((8, 5)))
    np.testing.assert_array_equal(np.where(values > 0, slope, 0), (expected > 0).astype(np.float32))
    assert sparse_codes.largest_of_all(jnp.ones((2, 3)), 1).all()  # equal values stay


def test_ties_go_to_the_lower_index() -> None:
    values, indices = sparse_codes.top_features(jnp.ones((2, 1)), jnp.zeros(1), jnp.ones((1, 6)),
                                                jnp.zeros(6), 3)
    assert indices.tolist() == [[0, 1, 2]] * 2 and (values == 1).all()
    chex.assert_shape((values, indices), (2, 3))


def test_bfloat16_operands() -> None:
    """Operands are rounded to bfloat16; sums are in f32."""
    x, center, kernel, bias, decoder = random_inputs()
    exact, _ = sparse_codes.top_features(x, center, kernel, bias, 4)
    rough, indices = sparse_codes.top_features(x, center, kernel, bias, 4, jnp.bfloat16)
    assert rough.dtype == jnp.float32 and 0 < np.abs(rough - exact).max() < 0.1
    mixed = sparse_codes.weighted_rows(rough, indices, decoder, jnp.bfloat16)
    assert 0 < np.abs(mixed - sparse_codes.weighted_rows(rough, indices, decoder)).max() < 0.1
