"""What all pipelines share: an order that a position tells, and reading ahead."""

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
ENDLESS = 1 << 48  # examples

PLACE = 400  # bytes that Grain takes for the place of each row of a global batch; measured: 460


def check_batches(batch_size: int, eval_batch_size: int, row_bytes: int, n_processes: int) -> None:
    """To be called before anything is made of a batch: one that is too large takes all memory, slowly.

    Args:
        batch_size, eval_batch_size: rows of a global batch.
        row_bytes: of one row.
        n_processes: that share the rows; each knows the places of all.

    Raises:
        InputError: one batch alone is larger than this machine's memory.
    """
    held = memory_bytes()
    for key, rows in (("train.batch_size", batch_size), ("train.eval_batch_size", eval_batch_size)):
        needed = rows * PLACE + rows * row_bytes // n_processes
        if needed > held:
            raise InputError(f"{key}: expected a batch that fits into the {held / 1e9:.3g} GB of memory, "
                             f"found {rows:,} rows of {row_bytes:,} bytes, which take {needed / 1e9:.3g} GB")


def memory_bytes() -> float:
    """Of this machine; infinite where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return math.inf


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


class Batches(grain.IterDataset):
    """Batches of examples one after the other; an iterator's state is how many examples it has given.

    So another batch size, or number of processes, goes on with the first example that was not given yet.

    Args:
        examples: what a batch is made of, endless.
        make: stacked examples of a global batch → the batch, of the rows that this process reads.
        size: of an example, in bytes, pairs or rows. Where it has changed, what was read is counted by it.
        start: how many examples were given before an iterator begins.
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
        self._of, self._given = batches, batches.start
        self._ahead: Any = None  # the iterator that reads; made where it is first asked

    def __next__(self) -> Any:
        of = self._of
        if self._ahead is None:
            self._ahead = iter(read_ahead(
                of.examples[self._given:].batch(of.batch_size).map(of.make), of.prefetch))
        found = next(self._ahead)
        self._given += of.batch_size
        return found

    def get_state(self) -> dict[str, Any]:
        """How many examples were given, and of which size."""
        return {"examples": self._given, "size": self._of.size}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there. Raises KeyError for what is no such state."""
        examples, size = state["examples"], state["size"]
        # Examples of another size are others: what is to come begins after as many bytes or pairs.
        self._given = examples if size == self._of.size else math.ceil(examples * size / self._of.size)
        self._ahead = None
