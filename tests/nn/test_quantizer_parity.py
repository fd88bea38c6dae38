"""Compares quantisers with loops, and their gradients with closed forms.

tests/models compares the gradients of whole networks with PyTorch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference_impl import loops
from tests.tolerance import noise
from tilelli_jax.nn.quantize import hadamard, quantizer, random_rotation

HEADS, IN, OUT = 2, 8, 5
EVERY: list[Any] = ["none", "ternary", "ternary_row", "hadamard", "lsq", "power3", "power3_row"]


def kernel() -> Any:
    """Heads and columns of very different scale, with a heavy tail that reaches level 9."""
    rng = np.random.default_rng(0)
    size = np.array([1, 30])[:, None, None] * np.array([0.1, 1, 2, 5, 0.3])
    return (size * rng.standard_t(2, (HEADS, IN, OUT))).astype(np.float32)


def arguments(kind: str) -> dict[str, Any]:
    if kind == "lsq":
        return {"alpha": np.array([0.4, 7.0], np.float32)}
    return {"rotation": loops.sylvester(IN).astype(np.float32)} if kind == "hadamard" else {}


@pytest.mark.parametrize("kind", EVERY)
def test_values_match_the_loops(kind: Any) -> None:
    result = quantizer(kind)(jnp.asarray(kernel()), **arguments(kind))
    expected = loops.quantize(kernel().astype(np.float64), kind, **arguments(kind))
    np.testing.assert_allclose(result, expected, rtol=1e-5,
                               atol=noise(kernel()) if kind == "hadamard" else 0)


@pytest.mark.parametrize("kind", ["ternary", "power3"])
def test_values_on_a_boundary(kind: Any) -> None:
    """The mean magnitude is exactly 1, so the boundaries are exactly 0.5, and 2 and 6 for powers of three."""
    weights = np.zeros(32, np.float32)
    weights[:9] = 0.5, -0.5, 2, -2, 6, -6, 9, 3, 3
    levels = [0, 0, 1, -1, 1, -1, 1, 1, 1] if kind == "ternary" else [0, 0, 1, -1, 3, -3, 9, 3, 3]
    result = quantizer(kind)(jnp.asarray(weights[:, None]))
    np.testing.assert_array_equal(result[:, 0], np.r_[levels, np.zeros(23)])


@pytest.mark.parametrize("kind", EVERY)
def test_gradient_passes_straight_through(kind: Any) -> None:
    """The gradient of the kernel is the identity, also outside the clipping range; none passes the scale."""
    probe = np.random.default_rng(1).standard_normal((HEADS, IN, OUT)).astype(np.float32)
    gradient = jax.grad(lambda w: jnp.sum(quantizer(kind)(w, **arguments(kind)) * probe))(
        jnp.asarray(kernel()))
    if kind == "hadamard":  # rotated and rotated back
        np.testing.assert_allclose(gradient, probe, rtol=0, atol=noise(probe))
    else:
        np.testing.assert_array_equal(gradient, probe)


def test_gradient_of_the_learned_scale() -> None:
    """Esser et al. 2020, eq. 3, by hand, with the factor 1/√(n·Q) of their section 2.2, Q = 1."""
    weight, alpha = jnp.array([[-9, -0.8], [-0.1, 0.2], [0.7, 1.5]]), 0.5
    # w/α is -18, -1.6, -0.2, 0.4, 1.4, 3: clipped to ±1, or round(w/α) - w/α.
    slope = np.array([[-1, -1], [0.2, -0.4], [1, 1]])
    probe = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    gradient = jax.grad(lambda a: jnp.sum(quantizer("lsq")(weight, alpha=a) * probe))(
        jnp.float32(alpha))
    np.testing.assert_allclose(gradient, (slope * probe).sum() / np.sqrt(6), rtol=0,
                               atol=noise(probe / np.sqrt(6)))


def test_gradients_of_learned_scales_match_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    from tilelli_jax.convert import torch_layers

    probe = np.random.default_rng(1).standard_normal((HEADS, IN, OUT)).astype(np.float32)
    alpha = arguments("lsq")["alpha"]
    result = jax.grad(lambda a: jnp.sum(quantizer("lsq")(kernel(), alpha=a) * probe))(alpha)
    theirs = torch.from_numpy(alpha).requires_grad_()
    y = torch_layers.quantised(torch.from_numpy(kernel()), "lsq", theirs)
    (y * torch.from_numpy(probe)).sum().backward()
    np.testing.assert_allclose(result, theirs.grad.numpy(), rtol=0, atol=noise(probe))


def test_learned_scale_starts_at_the_mean_magnitude() -> None:
    result = quantizer("lsq").initial_alpha(jnp.asarray(kernel()))
    np.testing.assert_allclose(result, np.abs(kernel()).mean((1, 2)), rtol=1e-5)


def test_ties_round_to_even_and_a_zero_kernel_stays_zero() -> None:
    # The mean magnitude is 1, so 0.5 and 1.5 are exact ties.
    weight = jnp.array([[0.5, -0.5, 1.5, -1.5, 1.0, 1.0]])
    np.testing.assert_array_equal(quantizer("ternary")(weight), [[0, 0, 1, -1, 1, 1]])
    for kind in EVERY[1:3] + EVERY[5:]:
        np.testing.assert_array_equal(quantizer(kind)(jnp.zeros((4, 3))), np.zeros((4, 3)))


@pytest.mark.parametrize("size", [1, 2, 64])
def test_hadamard_matches_sylvesters_construction(size: int) -> None:
    matrix = hadamard(size)
    np.testing.assert_allclose(matrix, loops.sylvester(size), rtol=1e-6)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), rtol=0, atol=noise(1.0))
    np.testing.assert_array_equal(matrix, matrix.T)


def test_stored_rotation_is_orthogonal() -> None:
    rotation = np.asarray(random_rotation(jax.random.key(0), 12), np.float64)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(12), rtol=0, atol=noise(1.0, steps=2))
    assert np.abs(rotation - np.eye(12)).max() > 0.1
