"""Features of items: encoding and pooling agree with dense NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from tests.reference_impl.random_weights import random_weights
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.eval.difficulty import features
from tilelli_jax.eval.difficulty.features import make_features, read_features
from tilelli_jax.loading.store import from_arrays

D, N, K = 8, 24, 3
ARRAYS = random_weights({"encoder.kernel": (D, N), "encoder.bias": (N,), "decoder.kernel": (N, D),
                         "bias": (D,)}, 0)


@pytest.fixture(scope="module")
def sae() -> Any:
    return from_arrays(SAEConfig(d_model=D, n_latents=N, k=K), ARRAYS)


def extraction(counts: list[int], dtype: type = np.float16) -> Any:
    """Items with the items numbers of positions, with different values in layers 3 and 4."""
    rng = np.random.default_rng(1)
    values = {layer: [rng.standard_normal((count, D)).astype(dtype) for count in counts] for layer in (3, 4)}

    def activations(layer: int) -> Iterator[np.ndarray]:
        return iter(values[layer])
    return SimpleNamespace(positions=np.array(counts), activations=activations)


def dense_codes(x: np.ndarray) -> np.ndarray:
    centred = x.astype(np.float64) - ARRAYS["bias"]
    preactivations = centred @ ARRAYS["encoder.kernel"] + ARRAYS["encoder.bias"]
    threshold = np.sort(preactivations, axis=-1)[:, -K, None]
    return np.where(preactivations >= threshold, np.maximum(preactivations, 0), 0)


def pooled(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x.mean(axis=0), x.max(axis=0), x[-1]])


@pytest.mark.parametrize("rows", [1, 4, 8192])
@pytest.mark.parametrize("counts", [[2, 1, 9, 3, 3, 1, 5, 4], [4] * 6])
def test_several_positions(counts: list[int], rows: int, sae: Any, tmp_path: Path,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Some items are longer than a batch of positions."""
    monkeypatch.setattr(features, "ROWS", rows)
    items = extraction(counts)
    make_features(tmp_path, items, 3, sae)
    stored = read_features(tmp_path)
    assert stored.codes is not None and stored.max_codes is not None
    assert stored.raw.shape == (len(counts), 3 * D) and stored.raw.dtype == np.float32
    assert stored.codes.shape == (len(counts), 3 * N) and stored.max_codes.shape == (len(counts), N)
    for i, values in enumerate(items.activations(3)):
        np.testing.assert_allclose(stored.raw[i], pooled(values.astype(float)), atol=1e-6)
        codes = dense_codes(values)
        np.testing.assert_allclose(stored.codes.toarray()[i], pooled(codes), atol=1e-6)
        np.testing.assert_allclose(stored.max_codes.toarray()[i], codes.max(axis=0), atol=1e-6)
    # Some latents are active, but not at the last position.
    assert ((stored.codes.toarray()[:, N:2 * N] > 0) & (stored.codes.toarray()[:, 2 * N:] == 0)).any()


def test_a_single_position(sae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "ROWS", 4)
    items = extraction([1] * 11, np.float32)
    make_features(tmp_path, items, 4, sae)
    stored = read_features(tmp_path)
    assert stored.codes is not None and stored.max_codes is not None
    values = np.concatenate(list(items.activations(4)))
    np.testing.assert_array_equal(stored.raw, values)
    np.testing.assert_allclose(stored.codes.toarray(), dense_codes(values), atol=1e-6)
    np.testing.assert_array_equal(stored.max_codes.toarray(), stored.codes.toarray())


def test_without_an_autoencoder(tmp_path: Path) -> None:
    make_features(tmp_path, extraction([1, 2]), 3, None)
    stored = read_features(tmp_path)
    assert stored.raw.shape == (2, 3 * D) and stored.codes is None and stored.max_codes is None


def test_stored_codes_fit_liblinear(sae: Any, tmp_path: Path) -> None:
    """liblinear accepts 32-bit indices and f64 only; zeros are not stored."""
    items = extraction([2, 3] * 10)
    make_features(tmp_path, items, 3, sae)
    stored = read_features(tmp_path)
    for matrix in (stored.codes, stored.max_codes):
        assert matrix is not None and matrix.format == "csr" and matrix.has_canonical_format
        assert matrix.indices.dtype == matrix.indptr.dtype == np.int32 and matrix.dtype == np.float64
        assert (matrix.data > 0).all() and 0 < matrix.nnz < matrix.toarray().size / 2
        dense = matrix.toarray()
        again = scipy.sparse.csr_array(dense)
        np.testing.assert_array_equal(again.indices, matrix.indices)
        np.testing.assert_array_equal(again.indptr, matrix.indptr)
        np.testing.assert_array_equal(dense, dense.astype(np.float32))  # the precision on disk
        labels = np.arange(20) % 2
        probe = LogisticRegression(solver="liblinear", l1_ratio=1.0, C=1.0, random_state=0)
        by_rows = probe.fit(matrix[::2], labels[:10]).predict_proba(matrix[1::2])
        by_dense = probe.fit(dense[::2], labels[:10]).predict_proba(dense[1::2])
        np.testing.assert_allclose(by_rows, by_dense, atol=1e-6)
