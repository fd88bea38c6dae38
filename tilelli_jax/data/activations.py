"""Activations on disk: rows of one width in shards, written sequentially and read at random.

    DIR/activations.json          description of the activations, and the list of shards with their sizes
        shard-00000.safetensors   one tensor, `activations [rows, d_model]`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from tilelli_jax.config import Section, setting
from tilelli_jax.data.reading import ALL, ENDLESS, Batches, Rows, shuffled
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import new_directory, write_json
from tilelli_jax.io.json_text import read_json
from tilelli_jax.io.tensors import FLOATS, in_memory, is_finite, read_file, write_file

INDEX = "activations.json"
TENSOR = "activations"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ActivationsConfig(Section):
    """Activations to train an autoencoder on."""

    source: str = setting("", "directory of activations")
    valid_fraction: float = setting(
        0.1, "fraction of the rows, at the end, held out for validation", above=0, below=1)
    shuffle_seed: int = setting(0, "seed of the order of training rows", min=0, max=2**32 - 1)
    prefetch: int = setting(2, "batches to read ahead of the current update; 0: none", min=0, max=1000)


@dataclasses.dataclass(frozen=True)
class Activations:
    """Rows `[start, stop)` of a directory of activations, as memory maps.

    Attributes:
        info: description from the index: `source_model`, `hook`, `layer` and more.
    """

    path: Path
    shards: tuple[np.ndarray, ...]
    info: dict[str, Any]
    fingerprint: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def d_model(self) -> int:
        return self.shards[0].shape[1]

    def part(self, start: int, stop: int) -> Activations:
        """Returns rows `[start, stop)` of these."""
        return dataclasses.replace(self, start=self.start + start, stop=self.start + stop)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Returns rows by index, `[n]` → `[n, d_model]`, in their stored type."""
        rows = np.asarray(rows) + self.start
        ends = np.cumsum([len(shard) for shard in self.shards])
        shard_of_row = np.searchsorted(ends, rows, side="right")
        out = np.empty((len(rows), self.d_model), self.shards[0].dtype)
        for shard in np.unique(shard_of_row):
            in_shard = shard_of_row == shard
            first = ends[shard] - len(self.shards[shard])
            out[in_shard] = self.shards[shard][rows[in_shard] - first]
        return out

    def blocks(self, rows: int = 8192) -> Iterator[np.ndarray]:
        """Yields all rows in order, in blocks of `rows`."""
        for start in range(0, len(self), rows):
            yield self.gather(np.arange(start, min(start + rows, len(self))))


def write_activations(out: Path, parts: Iterable[np.ndarray], info: dict[str, Any], *,
                      shard_rows: int = 1 << 17) -> None:
    """Writes a directory of activations, which appears only when it is complete.

    Args:
        parts: arrays `[rows, d_model]`, in order, all of one width and type.
        info: description of the activations; JSON.

    Raises:
        InputError: `out` already exists, there are no rows, or they differ in width or type or are not
            finite.
    """
    with new_directory(out) as directory:
        shards: list[dict[str, Any]] = []
        for rows in _regrouped(parts, shard_rows):
            if rows.dtype not in FLOATS or not is_finite(rows):
                raise InputError(f"{out}: activations: expected finite floating-point numbers")
            name = f"shard-{len(shards):05}.safetensors"
            write_file(directory / name, {TENSOR: in_memory(rows)})
            shards.append({"file": name, "rows": len(rows),
                           "sha256": hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()})
        if not shards:
            raise InputError(f"{out}: activations: expected at least one row, found none")
        write_json(directory / INDEX, {"format": FORMAT, "d_model": rows.shape[1], "shards": shards,
                                       "info": info})


def _regrouped(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    buffer: list[np.ndarray] = []
    for part in parts:
        if part.ndim != 2 or (buffer and (part.shape[1], part.dtype) !=
                              (buffer[0].shape[1], buffer[0].dtype)):
            raise InputError("activations: expected rows of one width and type, "
                             f"found {part.dtype} {part.shape}")
        buffer.append(part)
        while sum(map(len, buffer)) >= size:
            rows = np.concatenate(buffer)
            buffer = [rows[size:]]
            yield rows[:size]
    if sum(map(len, buffer)):
        yield np.concatenate(buffer)


def open_activations(path: str | Path) -> Activations:
    """Opens a directory of activations. Raises InputError if it is not one, or differs from its index."""
    path = Path(path)
    if not os.path.lexists(path / INDEX):
        raise InputError(f"{path}: expected a directory of activations, which has {INDEX}")
    index = read_json(path / INDEX)
    try:
        if index["format"] != FORMAT:
            raise InputError(f"{path / INDEX}: format: expected {FORMAT}, found {index['format']!r}")
        shards = []
        for entry in index["shards"]:
            shard = _map(path / entry["file"])
            expected = (entry["rows"], index["d_model"])
            if shard.shape != expected:
                raise InputError(f"{path / entry['file']}: expected shape {expected}, found {shard.shape}")
            shards.append(shard)
        info = dict(index["info"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path / INDEX}: expected an index of activations, found an invalid one: "
                         f"{error!r}") from None
    if len({shard.dtype for shard in shards}) != 1:
        raise InputError(f"{path / INDEX}: expected shards of one type")
    digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
    return Activations(path, tuple(shards), info, digest, 0, sum(map(len, shards)))


def _map(path: Path) -> np.ndarray:
    tensors = read_file(path)
    tensor = tensors.get(TENSOR)
    if len(tensors) != 1 or tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) != 2:
        raise InputError(f"{path}: expected one tensor, '{TENSOR}', of floating-point rows")
    assert tensor.mapped is not None
    return tensor.mapped()


def training_rows(source: Activations, *, batch_size: int, seed: int, rows: Rows | None = None,
                  prefetch: int = 2) -> grain.IterDataset[np.ndarray]:
    """Returns endless batches of rows in random order, each row once per epoch: `[rows, d_model]` as stored.

    Args:
        rows: indices of a batch's rows that this process reads; None: all.
    """
    chosen = ALL if rows is None else rows
    order = shuffled(len(source), seed).repeat(-(-ENDLESS // len(source)))
    return Batches(order, batch_size, lambda indices: source.gather(indices[chosen]), prefetch=prefetch)
