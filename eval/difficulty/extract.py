"""Runs a network on all items, shard by shard. An interrupted extraction continues after its last shard.

    metadata.parquet            one row per item: its numbers, and the location of its activations
    shard-00000.safetensors     for some items: `numbers.NAME`, the number of positions of each item
                                (`positions`), and `layer.11 [sum of positions, d_model]`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..inputs.shards import Shards, fill
from ..tables import write_columns
from .study_data import Measurements, Numbers, StudyData

METADATA = "metadata.parquet"


def extract(path: Path, data: StudyData, network: Any, items: Sequence[int], layers: Sequence[int],
            shard_items: int) -> None:
    """Fills a directory with shards (see `shards.fill`) and writes metadata.parquet.

    Raises:
        InputError: existing shards contain other items.
    """
    fill(path, items, shard_items,
         lambda shard: _arrays(data.measure(network, shard, layers), len(shard)))
    extraction = Extraction(path)
    parts = extraction.shards.parts
    shard_numbers = np.repeat(np.arange(len(parts)), [part["item"].shape[0] for part in parts])
    metadata = {name: [values[i] for i in extraction.items.tolist()]
                for name, values in data.metadata.items()}
    write_columns(path / METADATA, {"item": extraction.items, **metadata, **extraction.numbers,
                                    "positions": extraction.positions, "shard": shard_numbers})


class Extraction:
    """The result of `extract`.

    Attributes:
        items: `[n]`, the item indices in the order of extraction.
        positions: `[n]`, the number of stored positions of each item.
        numbers: name → `[n, …]`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.shards = path, Shards(path)
        self.items, self.positions = self.shards.items, self.shards.joined("positions")
        self.numbers: Numbers = {name.removeprefix("numbers."): self.shards.joined(name)
                                 for name in self.shards.names if name.startswith("numbers.")}

    def activations(self, layer: int) -> Iterator[np.ndarray]:
        """Yields each item's activations `[positions, d_model]`, in the dtype on disk, shard by shard."""
        for shard in self.shards.parts:
            tensor = shard[f"layer.{layer}"]
            values = tensor.mapped() if tensor.mapped else tensor.read()
            yield from np.split(values, np.cumsum(shard["positions"].read())[:-1])


def _arrays(measurements: Measurements, n: int) -> dict[str, np.ndarray]:
    layers = measurements.activations
    counts = [len(rows) for rows in next(iter(layers.values()))] if layers else [0] * n
    return {"positions": np.asarray(counts, np.int64),
            **{f"numbers.{name}": values for name, values in measurements.numbers.items()},
            **{f"layer.{layer}": np.concatenate(rows) for layer, rows in layers.items()}}
