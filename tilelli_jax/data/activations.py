"""Activations on disk: rows of one width in shards, written as they come and read at random.

    DIR/activations.json        what they are, and the shards with their rows
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
from tilelli_jax.files import new_directory, write_json
from tilelli_jax.json_text import read_json
from tilelli_jax.tensors import FLOATS, in_memory, is_finite, read_file, write_file

INDEX = "activations.json"
TENSOR = "activations"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ActivationsConfig(Section):
    """Activations to learn from."""

    source: str = setting("", "a directory of activations")
    valid_fraction: float = setting(
        0.1, "share of the rows, at the end, that is kept for validation", above=0, below=1)
    shuffle_seed: int = setting(0, "seed of the order of training rows", min=0, max=2**32 - 1)
    prefetch: int = setting(2, "batches read ahead of the step in progress", min=0, max=1000)


@dataclasses.dataclass(frozen=True)
class Activations:
    """Rows `[start, stop)` of a directory of activations, as memory maps.

    Attributes:
        about: what the index says of them: `of_model`, `place`, `layer` and more.
    """

    path: Path
    shards: tuple[np.ndarray, ...]
    about: dict[str, Any]
    fingerprint: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def d_model(self) -> int:
        return self.shards[0].shape[1]

    def part(self, start: int, stop: int) -> Activations:
        """Some of these rows."""
        return dataclasses.replace(self, start=self.start + start, stop=self.start + stop)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """rows `[n]` → `[n, d_model]` in the type they are stored in."""
        rows = np.asarray(rows) + self.start
        ends = np.cumsum([len(shard) for shard in self.shards])
        which = np.searchsorted(ends, rows, side="right")
        out = np.empty((len(rows), self.d_model), self.shards[0].dtype)
        for shard in np.unique(which):
            here = which == shard
            before = ends[shard] - len(self.shards[shard])
            out[here] = self.shards[shard][rows[here] - before]
        return out

    def blocks(self, rows: int = 8192) -> Iterator[np.ndarray]:
        """All rows in order, some at a time."""
        for start in range(0, len(self), rows):
            yield self.gather(np.arange(start, min(start + rows, len(self))))


def write_activations(out: Path, parts: Iterable[np.ndarray], about: dict[str, Any], *,
                      shard_rows: int = 1 << 17) -> None:
    """Writes a directory that appears when it is whole.

    Args:
        parts: `[rows, d_model]`, one after the other, all of one width and type.
        about: what they are; JSON.

    Raises:
        InputError: `out` already exists, there are no rows, or they are not of one kind or not finite.
    """
    with new_directory(out) as made:
        shards: list[dict[str, Any]] = []
        for rows in _regrouped(parts, shard_rows):
            if rows.dtype not in FLOATS or not is_finite(rows):
                raise InputError(f"{out}: activations: expected finite floating-point numbers")
            name = f"shard-{len(shards):05}.safetensors"
            write_file(made / name, {TENSOR: in_memory(rows)})
            shards.append({"file": name, "rows": len(rows),
                           "sha256": hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()})
        if not shards:
            raise InputError(f"{out}: activations: expected at least one row, found none")
        write_json(made / INDEX, {"format": FORMAT, "d_model": rows.shape[1], "shards": shards,
                                  "about": about})


def _regrouped(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    held: list[np.ndarray] = []
    for part in parts:
        if part.ndim != 2 or (held and (part.shape[1], part.dtype) != (held[0].shape[1], held[0].dtype)):
            raise InputError("activations: expected rows of one width and type, "
                             f"found {part.dtype} {part.shape}")
        held.append(part)
        while sum(map(len, held)) >= size:
            rows = np.concatenate(held)
            held = [rows[size:]]
            yield rows[:size]
    if sum(map(len, held)):
        yield np.concatenate(held)


def open_activations(path: str | Path) -> Activations:
    """Raises InputError where it is no such directory, or its shards are not those of its index."""
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
        about = dict(index["about"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path / INDEX}: makes no sense: {error!r}") from None
    if len({shard.dtype for shard in shards}) != 1:
        raise InputError(f"{path / INDEX}: expected shards of one type")
    digest = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
    return Activations(path, tuple(shards), about, digest, 0, sum(map(len, shards)))


def _map(path: Path) -> np.ndarray:
    found = read_file(path)
    tensor = found.get(TENSOR)
    if len(found) != 1 or tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) != 2:
        raise InputError(f"{path}: expected one tensor, '{TENSOR}', of floating-point rows")
    assert tensor.mapped is not None
    return tensor.mapped()


def training_rows(source: Activations, *, batch_size: int, seed: int, rows: Rows | None = None,
                  prefetch: int = 2) -> grain.IterDataset[np.ndarray]:
    """Endless batches of rows in random order, each row once in an epoch: `[rows, d_model]` as stored.

    Args:
        rows: of a batch, those that this process reads; all of them by default.
    """
    chosen = ALL if rows is None else rows
    order = shuffled(len(source), seed).repeat(-(-ENDLESS // len(source)))
    return Batches(order, batch_size, lambda found: source.gather(found[chosen]), prefetch=prefetch)
