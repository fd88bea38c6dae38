"""Distances between results."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx


def distance(result: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest expected magnitude."""
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    assert result.shape == expected.shape, (result.shape, expected.shape)
    return float(np.max(np.abs(result - expected)) / max(np.max(np.abs(expected)), 1e-30))


def farthest(result: Mapping[str, np.ndarray],
             expected: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest `distance` and the name of its array; both mappings must have the same names."""
    assert set(result) == set(expected), sorted(set(result) ^ set(expected))
    return max((distance(result[name], expected[name]), name) for name in expected)


def assert_same_weights(result: nnx.Module, expected: nnx.Module) -> None:
    """Asserts that all weights are bit-identical."""
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(result)),
                 nnx.to_pure_dict(nnx.state(expected)))
