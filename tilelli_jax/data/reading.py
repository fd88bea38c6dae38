"""What all pipelines share: an order that a position tells, and reading ahead."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import grain
import numpy as np

Rows = slice | Sequence[int] | np.ndarray
ALL = slice(None)
ENDLESS = 1 << 48  # examples


def shuffled(n: int, seed: int) -> grain.MapDataset[int]:
    """0 … n − 1 in an order that differs between epochs."""
    examples = grain.MapDataset.range(n).seed(seed)
    if n >= 1 << 16:
        return examples.shuffle()
    # Grain's shuffle searches a cycle of 2 ** 16 for an index below n: milliseconds for small n.
    order = functools.lru_cache(maxsize=2)(
        lambda epoch: np.random.default_rng((seed, epoch)).permutation(n))
    return examples.map_with_index(lambda index, example: int(order(index // n)[example]))


def read_ahead(batches: grain.MapDataset, prefetch: int) -> grain.IterDataset:
    """Batches read by one thread, so many ahead; 0 reads when asked."""
    # One thread is enough: a batch is copied in far less time than a step takes.
    return batches.to_iter_dataset(grain.ReadOptions(
        num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch))


class From(grain.IterDataset):
    """An IterDataset whose iterators begin at a position; their states count from zero."""

    def __init__(self, parent: grain.IterDataset, start: int) -> None:
        super().__init__(parent)
        self._start = start

    def __iter__(self) -> grain.DatasetIterator:
        iterator = iter(self._parent)
        grain.experimental.set_next_index(iterator, self._start)
        return iterator
