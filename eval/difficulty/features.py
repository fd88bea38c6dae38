"""An item's activations as one row: raw, and as an autoencoder's codes.

An item with one position is that position. Of several, mean, maximum and last stand side by side. Codes
are pooled after every position has been encoded, a few items at a time: all codes of all positions never
exist at once.
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
from tilelli_jax.tensors import in_memory, read_file, write_file

from ..checks import Floats
from .extract import Extraction

FILE = "features.safetensors"
ROWS = 8192  # positions that are encoded at once


class Features(NamedTuple):
    """Of all items: `raw` f32 `[items, d]` and `codes` CSR `[items, n]` as pooled for probes; `most` CSR
    `[items, n_latents]`, each latent's largest value at any position."""

    raw: Floats
    codes: scipy.sparse.csr_array | None
    most: scipy.sparse.csr_array | None


def pooled(values: np.ndarray, several: bool) -> np.ndarray:
    """`[positions, d]` → f32 `[d]`, the last; or `[3 d]` where items have several: mean, maximum, last."""
    values = np.asarray(values, np.float32)
    if not several:
        return values[-1]
    return np.concatenate([values.mean(axis=0, dtype=np.float64).astype(np.float32), values.max(axis=0),
                           values[-1]])


def encoded(sae: TopKSAE, items: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each item the codes of its positions: values f32 and latents int32, `[positions, k]`."""
    graph, params = nnx.split(sae)

    @jax.jit
    def encode(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes = nnx.merge(graph, params).encode(x)
        return codes.values, codes.latents

    def run(held: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows = np.concatenate(held).astype(np.float32)
        size = max(ROWS, -(-len(rows) // ROWS) * ROWS)
        whole = np.zeros((size, rows.shape[1]), np.float32)
        whole[:len(rows)] = rows
        values, latents = jax.device_get(encode(params, jnp.asarray(whole)))
        ends = np.cumsum([len(part) for part in held])
        yield from ((values[end - len(part):end], latents[end - len(part):end])
                    for part, end in zip(held, ends, strict=True))

    held: list[np.ndarray] = []
    waiting = 0
    for values in items:
        if held and waiting + len(values) > ROWS:
            yield from run(held)
            held, waiting = [], 0
        held.append(values)
        waiting += len(values)
    if held:
        yield from run(held)


def make_features(path: Path, found: Extraction, layer: int, sae: TopKSAE | None) -> None:
    """Writes what `read_features` reads."""
    several = bool((found.positions > 1).any())
    raw = np.stack([pooled(values, several) for values in found.activations(layer)])
    arrays: dict[str, np.ndarray] = {"raw": raw}
    if sae is not None:
        rows = [_pooled_codes(values, latents, sae.config.n_latents, several)
                for values, latents in encoded(sae, found.activations(layer))]
        for name, matrices in (("codes", [codes for codes, _ in rows]), ("most", [most for _, most in rows])):
            whole = scipy.sparse.vstack(matrices, format="csr")
            arrays |= {f"{name}.values": whole.data.astype(np.float32),
                       f"{name}.columns": whole.indices.astype(np.int32),
                       f"{name}.starts": whole.indptr.astype(np.int64),
                       f"{name}.shape": np.array(whole.shape)}
    write_file(path / FILE, {name: in_memory(array) for name, array in arrays.items()})


def read_features(path: Path) -> Features:
    """What `make_features` wrote."""
    tensors = {name: tensor.read() for name, tensor in read_file(path / FILE).items()}

    def sparse(name: str) -> scipy.sparse.csr_array | None:
        if f"{name}.values" not in tensors:
            return None
        # liblinear reads 32-bit rows only.
        parts = (tensors[f"{name}.values"].astype(np.float64), tensors[f"{name}.columns"],
                 tensors[f"{name}.starts"].astype(np.int32))
        return scipy.sparse.csr_array(parts, shape=tuple(tensors[f"{name}.shape"].tolist()))
    return Features(tensors["raw"], sparse("codes"), sparse("most"))


def _pooled_codes(values: np.ndarray, latents: np.ndarray, n: int,
                  several: bool) -> tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]:
    """One item's rows `[1, n or 3 n]` and `[1, n]`."""
    positions = len(values)
    total, most = np.zeros(n), np.zeros(n, np.float32)
    np.add.at(total, latents.ravel(), values.ravel())
    np.maximum.at(most, latents.ravel(), values.ravel())
    largest = scipy.sparse.csr_array(most[None])
    if not several:
        return largest, largest
    last = np.zeros(n)
    last[latents[-1]] = values[-1]
    return scipy.sparse.csr_array(np.concatenate([total / positions, most, last])[None]), largest
