"""Synthetic activations with a known dictionary."""

from __future__ import annotations

import numpy as np


def mixtures(n: int, d: int, atoms: int, active: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are sums of a few unit atoms, and the atoms."""
    rng = np.random.default_rng(seed)
    dictionary = rng.standard_normal((atoms, d))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    indices = np.argsort(rng.random((n, atoms)), axis=1)[:, :active]
    weights = rng.uniform(0.5, 1.5, (n, active))
    return np.einsum("nk,nkd->nd", weights, dictionary[indices]).astype(np.float32) + 0.3, dictionary
