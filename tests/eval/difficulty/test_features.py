"""Rows of items: pooled after every position has been encoded, as dense numpy has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from tilelli_jax.eval.difficulty import features
from tilelli_jax.eval.difficulty.features import make_features, read_features

from tests.restated.random_weights import random_weights
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.store import from_arrays

D, N, K = 8, 24, 3
ARRAYS = random_weights({"encoder.kernel": (D, N), "encoder.bias": (N,), "decoder.kernel": (N, D),
                         "bias": (D,)}, 0)


@pytest.fixture(scope="module")
def sae() -> Any:
    return from_arrays(SAEConfig(d_model=D, n_latents=N, k=K), ARRAYS)


def extraction(counts: list[int], dtype: type = np.float16) -> Any:
    """Items with so many positions; layer 3 and, to be told apart, layer 4."""
    rng = np.random.default_rng(1)
    values = {layer: [rng.standard_normal((count, D)).astype(dtype) for count in counts] for layer in (3, 4)}

    def activations(layer: int) -> Iterator[np.ndarray]:
        return iter(values[layer])
    return SimpleNamespace(positions=np.array(counts), activations=activations)


def dense_codes(x: np.ndarray) -> np.ndarray:
    before = (x.astype(np.float64) - ARRAYS["bias"]) @ ARRAYS["encoder.kernel"] + ARRAYS["encoder.bias"]
    least = np.sort(before, axis=-1)[:, -K, None]
    return np.where(before >= least, np.maximum(before, 0), 0)


def pooled(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x.mean(axis=0), x.max(axis=0), x[-1]])


@pytest.mark.parametrize("rows", [1, 4, 8192])
@pytest.mark.parametrize("counts", [[2, 1, 9, 3, 3, 1, 5, 4], [4] * 6])
def test_several_positions(counts: list[int], rows: int, sae: Any, tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Items longer than a block of positions among them."""
    monkeypatch.setattr(features, "ROWS", rows)
    given = extraction(counts)
    make_features(tmp_path, given, 3, sae)
    found = read_features(tmp_path)
    assert found.codes is not None and found.most is not None
    assert found.raw.shape == (len(counts), 3 * D) and found.raw.dtype == np.float32
    assert found.codes.shape == (len(counts), 3 * N) and found.most.shape == (len(counts), N)
    for i, values in enumerate(given.activations(3)):
        np.testing.assert_allclose(found.raw[i], pooled(values.astype(float)), atol=1e-6)
        codes = dense_codes(values)
        np.testing.assert_allclose(found.codes.toarray()[i], pooled(codes), atol=1e-6)
        np.testing.assert_allclose(found.most.toarray()[i], codes.max(axis=0), atol=1e-6)
    # A latent that is active somewhere but not at the last position is told by mean and maximum alone.
    assert ((found.codes.toarray()[:, N:2 * N] > 0) & (found.codes.toarray()[:, 2 * N:] == 0)).any()


def test_a_single_position(sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "ROWS", 4)
    given = extraction([1] * 11, np.float32)
    make_features(tmp_path, given, 4, sae)
    found = read_features(tmp_path)
    assert found.codes is not None and found.most is not None
    values = np.concatenate(list(given.activations(4)))
    np.testing.assert_array_equal(found.raw, values)
    np.testing.assert_allclose(found.codes.toarray(), dense_codes(values), atol=1e-6)
    np.testing.assert_array_equal(found.most.toarray(), found.codes.toarray())


def test_without_an_autoencoder(tmp_path: Path) -> None:
    make_features(tmp_path, extraction([1, 2]), 3, None)
    found = read_features(tmp_path)
    assert found.raw.shape == (2, 3 * D) and found.codes is None and found.most is None


def test_what_is_read_serves_a_probe(sae: Any, tmp_path: Path) -> None:
    """liblinear reads 32-bit indices and f64 only; zeros are not kept."""
    given = extraction([2, 3] * 10)
    make_features(tmp_path, given, 3, sae)
    found = read_features(tmp_path)
    for matrix in (found.codes, found.most):
        assert matrix is not None and matrix.format == "csr" and matrix.has_canonical_format
        assert matrix.indices.dtype == matrix.indptr.dtype == np.int32 and matrix.dtype == np.float64
        assert (matrix.data > 0).all() and 0 < matrix.nnz < matrix.toarray().size / 2
        dense = matrix.toarray()
        again = scipy.sparse.csr_array(dense)
        np.testing.assert_array_equal(again.indices, matrix.indices)
        np.testing.assert_array_equal(again.indptr, matrix.indptr)
        np.testing.assert_array_equal(dense, dense.astype(np.float32))  # all that is on disk
        labels = np.arange(20) % 2
        probe = LogisticRegression(solver="liblinear", l1_ratio=1.0, C=1.0, random_state=0)
        by_rows = probe.fit(matrix[::2], labels[:10]).predict_proba(matrix[1::2])
        by_dense = probe.fit(dense[::2], labels[:10]).predict_proba(dense[1::2])
        np.testing.assert_allclose(by_rows, by_dense, atol=1e-6)
