"""Shared parts of the Grain pipelines: shuffling, resumable batches and reading ahead."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from tilelli_jax.errors import InputError

Rows = slice | Sequence[int] | np.ndarray
ALL = slice(None)
ENDLESS = 1 << 48  # examples: more than any run reads

PLACE = 400  # bytes that Grain needs for the index of each row of a global batch; measured: 460


def check_batches(batch_size: int, eval_batch_size: int, row_bytes: int, n_processes: int) -> None:
    """Checks batch sizes before a batch is allocated: one that is too large fills the memory, slowly.

    Args:
        batch_size, eval_batch_size: rows of a global batch.
        row_bytes: bytes of one row.
        n_processes: processes that share the rows; each has the indices of all rows.

    Raises:
        InputError: a single batch is larger than this machine's memory.
    """
    memory = memory_bytes()
    for key, rows in (("train.batch_size", batch_size), ("train.eval_batch_size", eval_batch_size)):
        needed = rows * PLACE + rows * row_bytes // n_processes
        if needed > memory:
            raise InputError(f"{key}: expected a batch that fits into the {memory / 1e9:.3g} GB of memory, "
                             f"found {rows:,} rows of {row_bytes:,} bytes, which take {needed / 1e9:.3g} GB")


def memory_bytes() -> float:
    """Returns this machine's memory in bytes; infinite if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return math.inf


def shuffled(n: int, seed: int) -> grain.MapDataset[int]:
    """Returns 0 … n − 1 in a random order that differs between epochs."""
    examples = grain.MapDataset.range(n).seed(seed)
    if n >= 1 << 16:
        return examples.shuffle()
    # Grain's shuffle searches a cycle of 2 ** 16 for an index below n: milliseconds for small n.
    order = functools.lru_cache(maxsize=2)(
        lambda epoch: np.random.default_rng((seed, epoch)).permutation(n))
    return examples.map_with_index(lambda index, example: int(order(index // n)[example]))


def read_ahead(batches: grain.MapDataset, prefetch: int) -> grain.IterDataset:
    """Reads up to `prefetch` batches ahead, in one thread; 0 reads on demand."""
    # One thread is enough: a batch is copied in far less time than a step takes.
    return batches.to_iter_dataset(grain.ReadOptions(
        num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch))


class Batches(grain.IterDataset):
    """Consecutive batches of examples; an iterator's state is the number of examples it has returned.

    So a run with another batch size or number of processes resumes with the first unread example.

    Args:
        examples: an endless data set of examples.
        make: stacked examples of a global batch → the batch, with the rows that this process reads.
        size: size of an example in bytes, pairs or rows; a state saved with another size is converted by it.
        start: number of examples to skip before the first.
    """

    def __init__(self, examples: grain.MapDataset, batch_size: int, make: Callable[[np.ndarray], Any], *,
                 prefetch: int, size: float = 1, start: int = 0) -> None:
        super().__init__()
        self.examples, self.batch_size, self.make = examples, batch_size, make
        self.prefetch, self.size, self.start = prefetch, size, start

    def __iter__(self) -> grain.DatasetIterator:
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches, self._n_read = batches, batches.start
        self._reader: Any = None  # the iterator that reads ahead, created on first use

    def __next__(self) -> Any:
        source = self._batches
        if self._reader is None:
            self._reader = iter(read_ahead(
                source.examples[self._n_read:].batch(source.batch_size).map(source.make), source.prefetch))
        batch = next(self._reader)
        self._n_read += source.batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the number of examples read and their size."""
        return {"examples": self._n_read, "size": self._batches.size}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes from a state of `get_state`. Raises KeyError if a key is missing."""
        examples, size = state["examples"], state["size"]
        # With another example size, resume after the same number of bytes or pairs.
        new_size = self._batches.size
        self._n_read = examples if size == new_size else math.ceil(examples * size / new_size)
        self._reader = None
