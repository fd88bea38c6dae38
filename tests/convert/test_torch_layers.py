"""The PyTorch quantisers of --check, compared with plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference_impl import loops

torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")


@pytest.mark.parametrize("kind", ["ternary", "ternary_row", "power3", "power3_row"])
def test_quantised_values_equal_the_loops(kind: str) -> None:
    from tilelli_jax.convert import torch_layers
    kernel = np.random.default_rng(0).standard_t(1.5, (2, 8, 5)).astype(np.float32)  # [heads, in, out]
    levels = np.abs(loops.quantize(kernel.astype(float), kind) / np.abs(kernel).mean((1, 2), keepdims=True))
    assert kind != "power3" or set(levels.round().ravel()) == {0, 1, 3, 9}
    weight = torch.from_numpy(np.swapaxes(kernel, 1, 2).copy())
    actual = torch_layers.quantised(weight, kind).numpy()
    expected = loops.quantize(kernel.astype(np.float64), kind)
    np.testing.assert_allclose(np.swapaxes(actual, 1, 2), expected, rtol=1e-5)
