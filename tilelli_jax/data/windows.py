"""Batches of windows of a corpus, read as Grain pipelines.

Every process computes the starts of the whole global batch, which is cheap, selects its rows and reads the
bytes of those only. So the batch at a position is the same for any number of processes, and a position is the
number of windows read.
"""

from __future__ import annotations

from typing import NamedTuple

import grain
import numpy as np

from tilelli_jax.data.corpus import ByteCorpus
from tilelli_jax.data.reading import ALL, ENDLESS, Batches, Rows, read_ahead, shuffled
from tilelli_jax.errors import InputError


class TrainingBatch(NamedTuple):
    """Rows of a batch: position t reads byte t and predicts byte t + 1."""

    bytes: np.ndarray  # uint8 [rows, seq_len + 1]
    starts: np.ndarray  # int64 [rows]: position of each row's first byte in the corpus


class ValidationBatch(NamedTuple):
    """Rows of a batch; `mask` is true where a byte is predicted, false in the padding."""

    bytes: np.ndarray  # uint8 [rows, seq_len + 1]
    mask: np.ndarray  # bool [rows, seq_len]: whether position t predicts byte t + 1


def training_batches(corpus: ByteCorpus, *, batch_size: int, seq_len: int, seed: int,
                     rows: Rows | None = None, start: int = 0, prefetch: int = 2,
                     ) -> grain.IterDataset[TrainingBatch]:
    """Returns endless random batches. An epoch reads windows that begin at i · seq_len + jitter, once each.

    The possible starts are divided into strata of `seq_len`; the last one also has the remainder. An epoch
    visits each stratum once, in random order, at a start drawn uniformly from it.

    The state of an iterator (`get_state`, `set_state`) is a small dict with the number of windows read. It
    can be restored with another number of processes or batch size. With another `seq_len` the windows differ;
    reading then resumes after the same number of bytes.

    Args:
        batch_size: rows of the global batch.
        rows: indices of the rows that this process reads; None: all.
        start: number of windows to skip before the first.
        prefetch: batches that a thread reads ahead; 0 reads on demand.

    Raises:
        InputError: the corpus is shorter than one window.
    """
    n_starts = len(corpus) - seq_len
    if n_starts < 1:
        raise InputError(f"train.seq_len: {seq_len} needs {seq_len + 1} bytes to train on, found "
                         f"{len(corpus)}: choose a shorter one, or a longer text")
    n_windows = max(1, n_starts // seq_len)
    chosen = ALL if rows is None else rows

    def jittered(window: int, rng: np.random.Generator) -> np.int64:
        low = window * seq_len
        high = low + seq_len if window < n_windows - 1 else n_starts
        return rng.integers(low, high)

    def batch(starts: np.ndarray) -> TrainingBatch:
        return TrainingBatch(corpus.gather(starts[chosen], seq_len + 1), starts[chosen])

    # A finite length, because Grain overflows on batches of size 1 of an infinite data set.
    windows = shuffled(n_windows, seed).repeat(-(-ENDLESS // n_windows))
    return Batches(windows.random_map(jittered), batch_size, batch, prefetch=prefetch, size=seq_len,
                   start=start)


def validation_batches(corpus: ByteCorpus, *, batch_size: int, seq_len: int,
                       rows: Rows | None = None, max_bytes: int | None = None, prefetch: int = 2,
                       ) -> grain.IterDataset[ValidationBatch]:
    """Returns the corpus in order; each byte except the first is predicted exactly once.

    Window w holds the bytes w · seq_len … (w + 1) · seq_len, so neighbours share one byte. The last window
    and the last batch are padded with zeros under a false mask, so that all batches have the same shape.

    Args:
        batch_size: rows of the global batch.
        rows: indices of the rows that this process reads; None: all.
        max_bytes: use at most this many bytes; None uses all.
        prefetch: batches that a thread reads ahead; 0 reads on demand.

    Raises:
        InputError: there is no byte to predict.
    """
    size = len(corpus) if max_bytes is None else min(len(corpus), max_bytes)
    if size < 2:
        raise InputError(f"the validation split: expected at least 2 bytes, found {size}")
    n_windows = -(-(size - 1) // seq_len)
    chosen = ALL if rows is None else rows

    def batch(index: int) -> ValidationBatch:
        starts = (np.arange(index * batch_size, (index + 1) * batch_size) * seq_len)[chosen]
        lengths = np.clip(size - starts, 0, seq_len + 1)
        out = np.zeros((len(starts), seq_len + 1), np.uint8)
        for row, start, length in zip(out, starts, lengths, strict=True):
            if length:
                row[:length] = corpus.read(int(start), int(length))
        return ValidationBatch(out, np.arange(1, seq_len + 1) < lengths[:, None])

    return read_ahead(grain.MapDataset.range(-(-n_windows // batch_size)).map(batch), prefetch)
