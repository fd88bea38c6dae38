"""How far two results are apart."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest expected magnitude."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-30))


def farthest(found: Mapping[str, np.ndarray],
             expected: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest `distance` and its name; the names must be the same."""
    assert set(found) == set(expected), sorted(set(found) ^ set(expected))
    return max((distance(found[name], expected[name]), name) for name in expected)


def assert_same_weights(found: nnx.Module, expected: nnx.Module) -> None:
    """To the last bit."""
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(found)),
                 nnx.to_pure_dict(nnx.state(expected)))
