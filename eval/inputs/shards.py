"""What was found of many items, a shard at a time: what was there before an interruption is not made anew.

    shard-00000.safetensors     `item` int64 [items of this shard], and arrays of theirs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tilelli_jax import interrupts
from tilelli_jax.errors import InputError
from tilelli_jax.tensors import Tensor, in_memory, read_file, write_file


def fill(path: Path, items: Sequence[int], shard_items: int,
         work: Callable[[Sequence[int]], Mapping[str, np.ndarray]]) -> Shards:
    """Shards of all items in a directory; those that are there are taken as they are, whole as each is.

    They may be of another size.

    Args:
        work: some of the items → their arrays, by name.

    Raises:
        InputError: shards that are there hold other items.
    """
    number = done = 0
    while done < len(items):
        file = path / f"shard-{number:05}.safetensors"
        interrupts.raise_if_received()
        if not file.is_file():
            chosen = items[done:done + shard_items]
            arrays = {"item": np.asarray(chosen, np.int64), **work(chosen)}
            write_file(file, {name: in_memory(np.ascontiguousarray(array)) for name, array in arrays.items()})
        number, done = number + 1, done + read_file(file)["item"].shape[0]
    found = Shards(path)
    if found.items.tolist() != list(items):
        raise InputError(f"{path}: its shards do not hold the items in order; without them all are asked "
                         "anew")
    return found


class Shards:
    """The shards of a directory, in order; `items` int64 `[items]`.

    Raises:
        InputError: there are none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: list[dict[str, Tensor]] = [read_file(file) for file in sorted(path.glob("shard-*"))]
        if not self.parts:
            raise InputError(f"{path}: expected shards of an extraction, found none")
        self.items = self.joined("item")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arrays."""
        return tuple(self.parts[0])

    def joined(self, name: str) -> np.ndarray:
        """An array of all items."""
        return np.concatenate([part[name].read() for part in self.parts])
