"""Batches of texts: which texts form a batch, and the sizes to which it is padded.

Every size of a batch is compiled, so there are few of them. Lengths are padded to 16, 24, 32, 48, 64, 96, …
(`bucket`); of long texts at most a third is padding. All batches of a call have the same number of rows, the
batch size, unless memory limits them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tilelli_jax.parallel.sharding import Mesh, place_rows, whole_batch

SHORTEST = 16  # padded length of shorter texts
RUN = 32  # with random order, texts are sorted by length within runs of this number of batches


class Batch(NamedTuple):
    """A batch of texts.

    Attributes:
        indices: the texts.
        rows: number of rows, at least one for each text.
        time: padded length, in tokens.
    """

    indices: list[int]
    rows: int
    time: int

    @property
    def filled(self) -> list[int]:
        """The text of each row: surplus rows repeat the last text."""
        return [*self.indices, *self.indices[-1:] * (self.rows - len(self.indices))]


def max_time(model: Any) -> int | None:
    """The context length of a network with learned positions; None for all others, which have no limit."""
    return model.config.max_seq_len if getattr(model.config, "positions", "") == "learned" else None


def bucket(length: int, limit: int | None = None, shortest: int = SHORTEST) -> int:
    """The padded length: 0 for 0, else the next of 16, 24, 32, 48, 64, 96, … (2ⁿ and 3 · 2ⁿ⁻¹).

    Args:
        limit: longest padded length; a longer text is not padded.
        shortest: shortest padded length.
    """
    power = _next_power(length)
    size = max(3 * power // 4 if length <= 3 * power // 4 else power, shortest) if length else 0
    return size if limit is None else max(length, min(size, limit))


def batches(lengths: Sequence[int], batch_size: int, *, limit: int | None = None, shortest: int = SHORTEST,
            mesh: Mesh | None = None, seed: int | None = None, widths: Sequence[int] | None = None,
            max_rows: Callable[[list[int]], int] | None = None, shrink: bool = False) -> Iterator[Batch]:
    """Yields batches of texts of similar length, the longest first, to allocate most memory at once.

    Args:
        lengths: number of tokens of each text.
        batch_size: maximum number of rows, rounded up to a multiple of the mesh's devices.
        limit, shortest: longest and shortest padded length; see `max_time` for the limit.
        mesh: devices that share each batch.
        seed: of a random order of the texts, sorted by length only within runs of RUN batches.
        widths: second sizes by which texts of equal length are sorted, the largest first.
        max_rows: (texts that could be next) → maximum number of rows that fits memory; rounded down to a
            power of two if it is less than the batch size, and up to a multiple of the mesh's devices.
        shrink: whether fewer texts than the batch size get fewer rows, the next power of two. That is faster
            for single texts, but compiles once more.
    """
    n, devices = len(lengths), whole_batch(1, mesh)
    full = whole_batch(min(batch_size, _next_power(n)) if shrink else batch_size, mesh)

    def key(i: int) -> tuple[int, int]:
        return -lengths[i], 0 if widths is None else -widths[i]
    order = range(n) if seed is None else np.random.default_rng(seed).permutation(n).tolist()
    run = RUN * whole_batch(batch_size, mesh) if seed is not None else max(n, 1)
    sorted_texts = [i for start in range(0, n, run) for i in sorted(order[start:start + run], key=key)]
    start, previous = 0, full
    while start < n:
        candidates = sorted_texts[start:start + full]
        fit = full if max_rows is None else max(1, max_rows(candidates))
        rows = full if fit >= full else max(1, (1 << (fit.bit_length() - 1)) // devices) * devices
        if len(candidates) <= previous:  # the last texts: a larger batch would hold no more of them
            rows = min(rows, previous)
        indices, previous = candidates[:rows], rows
        yield Batch(indices, rows, bucket(max(lengths[i] for i in indices), limit, shortest))
        start += rows


def padded_ids(texts: Sequence[Sequence[int]], time: int) -> np.ndarray:
    """Token ids as int32 `[texts, time]`, zeros after each text."""
    ids = np.zeros((len(texts), time), np.int32)
    for row, text in enumerate(texts):
        ids[row, :len(text)] = text
    return ids


def on_devices(arrays: Sequence[np.ndarray], mesh: Mesh | None) -> list[Any]:
    """The arrays `[rows, …]` with their rows shared by the devices of the mesh; unchanged without a mesh."""
    return list(arrays) if mesh is None else [place_rows(array, mesh, len(array)) for array in arrays]


def _next_power(n: int) -> int:
    """The smallest power of two ≥ n."""
    return 1 << max(n - 1, 0).bit_length()
