"""Stores results for many items shard by shard, so that an interrupted computation resumes after its last
shard.

    shard-00000.safetensors     `item` int64 [items of this shard], and arrays with one row per item
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tilelli_jax.cli import interrupts
from tilelli_jax.errors import InputError
from tilelli_jax.io.tensors import Tensor, in_memory, read_file, write_file


def fill(path: Path, items: Sequence[int], shard_items: int,
         work: Callable[[Sequence[int]], Mapping[str, np.ndarray]]) -> Shards:
    """Computes and writes the missing shards of a directory, and returns all shards.

    Existing shards are reused, even if they have another number of items than `shard_items`.

    Args:
        shard_items: number of items in a new shard.
        work: computes the arrays of some items: name → array.

    Raises:
        InputError: existing shards contain other items.
    """
    number = done = 0
    while done < len(items):
        file = _shard(path, number)
        interrupts.raise_if_received()
        if not file.is_file():
            chosen = items[done:done + shard_items]
            arrays = {"item": np.asarray(chosen, np.int64), **work(chosen)}
            write_file(file, {name: in_memory(np.ascontiguousarray(array)) for name, array in arrays.items()})
        number, done = number + 1, done + read_file(file)["item"].shape[0]
    shards = Shards(path)
    if shards.items.tolist() != list(items):
        raise InputError(f"{path}: expected shards of the study's items, in order, found shards of other "
                         "items; delete the shards to recompute them")
    return shards


def stored_items(path: Path) -> int:
    """Returns the number of items in the shards that a directory has, up to the first missing one."""
    files = itertools.takewhile(Path.is_file, (_shard(path, number) for number in itertools.count()))
    return sum(read_file(file)["item"].shape[0] for file in files)


def _shard(path: Path, number: int) -> Path:
    return path / f"shard-{number:05}.safetensors"


class Shards:
    """The shards of a directory, in order.

    Attributes:
        parts: one dictionary per shard, name → tensor.
        items: int64 `[items]`.

    Raises:
        InputError: the directory contains no shards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: list[dict[str, Tensor]] = [read_file(file) for file in sorted(path.glob("shard-*"))]
        if not self.parts:
            raise InputError(f"{path}: expected shards of an extraction, found none")
        self.items = self.joined("item")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return tuple(self.parts[0])

    def joined(self, name: str) -> np.ndarray:
        """Returns an array over the items of all shards."""
        return np.concatenate([part[name].read() for part in self.parts])
