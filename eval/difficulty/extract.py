"""Asking a network all items, a shard at a time; what was asked before an interruption is not asked again.

    metadata.parquet            one row for each item: its numbers, and where its activations are
    shard-00000.safetensors     the numbers of some items (`numbers.NAME`), how many positions each has
                                (`positions`), and `layer.11 [positions of all of them, d_model]`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..inputs.shards import Shards, fill
from ..tables import write_columns
from .subject import Measured, Numbers, Subject

METADATA = "metadata.parquet"


def extract(path: Path, subject: Subject, network: Any, items: Sequence[int], layers: Sequence[int],
            shard_items: int) -> None:
    """Fills a directory; see `shards.fill`.

    Raises:
        InputError: shards that are there hold other items.
    """
    fill(path, items, shard_items,
         lambda chosen: _arrays(subject.measure(network, chosen, layers), len(chosen)))
    found = Extraction(path)
    parts = found.shards.parts
    shard = np.repeat(np.arange(len(parts)), [part["item"].shape[0] for part in parts])
    about = {name: [values[i] for i in found.items.tolist()] for name, values in subject.about.items()}
    write_columns(path / METADATA, {"item": found.items, **about, **found.numbers,
                                  "positions": found.positions, "shard": shard})


class Extraction:
    """What was extracted: `items` `[n]` as they were asked, `numbers` and `positions` in their order."""

    def __init__(self, path: Path) -> None:
        self.path, self.shards = path, Shards(path)
        self.items, self.positions = self.shards.items, self.shards.joined("positions")
        self.numbers: Numbers = {name.removeprefix("numbers."): self.shards.joined(name)
                                 for name in self.shards.names if name.startswith("numbers.")}

    def activations(self, layer: int) -> Iterator[np.ndarray]:
        """Of each item in order, `[positions, d_model]` in the type on disk: read as they are asked for."""
        for shard in self.shards.parts:
            tensor = shard[f"layer.{layer}"]
            whole = tensor.mapped() if tensor.mapped else tensor.read()
            yield from np.split(whole, np.cumsum(shard["positions"].read())[:-1])


def _arrays(found: Measured, n: int) -> dict[str, np.ndarray]:
    layers = found.activations
    counts = [len(rows) for rows in next(iter(layers.values()))] if layers else [0] * n
    return {"positions": np.asarray(counts, np.int64),
            **{f"numbers.{name}": values for name, values in found.numbers.items()},
            **{f"layer.{layer}": np.concatenate(rows) for layer, rows in layers.items()}}
