"""Features of an item from its activations: pooled raw values, and pooled codes of an autoencoder.

If every item has one position, its values are kept; otherwise mean, maximum and last position of each item
are concatenated. Every position is encoded before pooling, a few items at a time, so that the codes of all
positions never need to be in memory together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from flax import nnx

from tilelli_jax.estimators.sae import TopKSAE
from tilelli_jax.io.tensors import in_memory, read_file, write_file

from ..checks import Floats
from .extract import Extraction

FILE = "features.safetensors"
ROWS = 8192  # positions in one batch of the encoder


class Features(NamedTuple):
    """Features of all items.

    Attributes:
        raw: f32 `[items, d or 3 d]`, pooled activations.
        codes: CSR `[items, n or 3 n]`, pooled codes; None without autoencoder.
        max_codes: CSR `[items, n_latents]`, the maximum of each latent over the positions.
    """

    raw: Floats
    codes: scipy.sparse.csr_array | None
    max_codes: scipy.sparse.csr_array | None


def pooled(values: np.ndarray, several: bool) -> np.ndarray:
    """Pools `[positions, d]` to f32 `[d]`, the last; with `several` to mean, maximum and last `[3 d]`."""
    values = np.asarray(values, np.float32)
    if not several:
        return values[-1]
    return np.concatenate([values.mean(axis=0, dtype=np.float64).astype(np.float32), values.max(axis=0),
                           values[-1]])


def encoded(sae: TopKSAE, items: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the codes of each item's positions: values f32 and latent indices int32, `[positions, k]`."""
    graph, params = nnx.split(sae)

    @jax.jit
    def encode(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = nnx.merge(graph, params).encode(x)
        return codes.values, codes.latents

    def run(batch: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows = np.concatenate(batch).astype(np.float32)
        size = max(ROWS, -(-len(rows) // ROWS) * ROWS)
        padded = np.zeros((size, rows.shape[1]), np.float32)
        padded[:len(rows)] = rows
        values, latents = jax.device_get(encode(params, jnp.asarray(padded)))
        ends = np.cumsum([len(item) for item in batch])
        yield from ((values[end - len(item):end], latents[end - len(item):end])
                    for item, end in zip(batch, ends, strict=True))

    batch: list[np.ndarray] = []
    positions = 0
    for values in items:
        if batch and positions + len(values) > ROWS:
            yield from run(batch)
            batch, positions = [], 0
        batch.append(values)
        positions += len(values)
    if batch:
        yield from run(batch)


def make_features(path: Path, extraction: Extraction, layer: int, sae: TopKSAE | None) -> None:
    """Computes the features of all items and writes them to `path`; `read_features` reads them."""
    several = bool((extraction.positions > 1).any())
    raw = np.stack([pooled(values, several) for values in extraction.activations(layer)])
    arrays: dict[str, np.ndarray] = {"raw": raw}
    if sae is not None:
        rows = [_pooled_codes(values, latents, sae.config.n_latents, several)
                for values, latents in encoded(sae, extraction.activations(layer))]
        for name, matrices in (("codes", [codes for codes, _ in rows]),
                               ("max_codes", [max_codes for _, max_codes in rows])):
            matrix = scipy.sparse.vstack(matrices, format="csr")
            arrays |= {f"{name}.values": matrix.data.astype(np.float32),
                       f"{name}.columns": matrix.indices.astype(np.int32),
                       f"{name}.starts": matrix.indptr.astype(np.int64),
                       f"{name}.shape": np.array(matrix.shape)}
    write_file(path / FILE, {name: in_memory(array) for name, array in arrays.items()})


def read_features(path: Path) -> Features:
    """Reads the features that `make_features` wrote."""
    tensors = {name: tensor.read() for name, tensor in read_file(path / FILE).items()}

    def sparse(name: str) -> scipy.sparse.csr_array | None:
        if f"{name}.values" not in tensors:
            return None
        # liblinear accepts 32-bit indices only.
        parts = (tensors[f"{name}.values"].astype(np.float64), tensors[f"{name}.columns"],
                 tensors[f"{name}.starts"].astype(np.int32))
        return scipy.sparse.csr_array(parts, shape=tuple(tensors[f"{name}.shape"].tolist()))
    return Features(tensors["raw"], sparse("codes"), sparse("max_codes"))


def _pooled_codes(values: np.ndarray, latents: np.ndarray, n: int,
                  several: bool) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
    """Returns one item's pooled codes `[1, n or 3 n]` and its maximum codes `[1, n]`."""
    positions = len(values)
    total, maximum = np.zeros(n), np.zeros(n, np.float32)
    np.add.at(total, latents.ravel(), values.ravel())
    np.maximum.at(maximum, latents.ravel(), values.ravel())
    max_codes = scipy.sparse.csr_array(maximum[None])
    if not several:
        return max_codes, max_codes
    last = np.zeros(n)
    last[latents[-1]] = values[-1]
    return scipy.sparse.csr_array(np.concatenate([total / positions, maximum, last])[None]), max_codes
