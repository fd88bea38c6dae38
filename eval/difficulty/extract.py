"""Asking a network all items, a shard at a time; what was asked before an interruption is not asked again.

    metadata.parquet            one row for each item: its numbers, and where its inner values are
    shard-00000.safetensors     the numbers of some items (`numbers.NAME`), how many positions each has
                                (`positions`), and `layer.11 [positions of all of them, d_model]`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.difficulty.subject import Measured, Numbers, Subject
from eval.tables import write_columns
from tilelli_jax.errors import InputError
from tilelli_jax.tensors import Tensor, in_memory, read_file, write_file

METADATA = "metadata.parquet"


def extract(path: Path, subject: Subject, network: Any, items: Sequence[int], layers: Sequence[int],
            shard_items: int) -> None:
    """Fills a directory; shards that are there are taken as they are, whole as each of them is.

    They may be of another size: what they hold is not asked again.

    Raises:
        InputError: shards that are there hold other items.
    """
    number = done = 0
    while done < len(items):
        file = path / f"shard-{number:05}.safetensors"
        if not file.is_file():
            chosen = items[done:done + shard_items]
            write_file(file, _tensors(chosen, subject.measure(network, chosen, layers)))
        number, done = number + 1, done + read_file(file)["item"].shape[0]
    found = Extraction(path)
    if found.items.tolist() != list(items):
        raise InputError(f"{path}: its shards do not hold the items in order; without them all are asked "
                         "anew")
    shard = np.repeat(np.arange(len(found.shards)), [len(part["item"].read()) for part in found.shards])
    about = {name: [values[i] for i in found.items.tolist()] for name, values in subject.about.items()}
    write_columns(path / METADATA, {"item": found.items, **about, **found.numbers,
                                  "positions": found.positions, "shard": shard})


class Extraction:
    """What was extracted: `items` `[n]` as they were asked, `numbers` and `positions` in their order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards: list[dict[str, Tensor]] = [read_file(file) for file in sorted(path.glob("shard-*"))]
        if not self.shards:
            raise InputError(f"{path}: expected shards of an extraction, found none")
        self.items = self._joined("item")
        self.positions = self._joined("positions")
        self.numbers: Numbers = {name.removeprefix("numbers."): self._joined(name)
                                 for name in self.shards[0] if name.startswith("numbers.")}

    def activations(self, layer: int) -> Iterator[np.ndarray]:
        """Of each item in order, `[positions, d_model]` in the type on disk: read as they are asked for."""
        for shard in self.shards:
            tensor = shard[f"layer.{layer}"]
            whole = tensor.mapped() if tensor.mapped else tensor.read()
            yield from np.split(whole, np.cumsum(shard["positions"].read())[:-1])

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([shard[name].read() for shard in self.shards])


def _tensors(items: Sequence[int], found: Measured) -> dict[str, Tensor]:
    layers = found.activations
    counts = [len(rows) for rows in next(iter(layers.values()))] if layers else [0] * len(items)
    arrays = {"item": np.asarray(items, np.int64), "positions": np.asarray(counts, np.int64),
              **{f"numbers.{name}": values for name, values in found.numbers.items()},
              **{f"layer.{layer}": np.concatenate(rows) for layer, rows in layers.items()}}
    return {name: in_memory(np.ascontiguousarray(array)) for name, array in arrays.items()}
