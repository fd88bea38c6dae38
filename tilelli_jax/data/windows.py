"""The order in which a corpus is read: batches of windows, as Grain pipelines.

Training and validation go through the global batch: every process computes the (few, cheap)
starts of the whole batch, picks its rows, and reads the bytes of those alone. So the batch at a
position is the same for any number of processes, and a position is how many windows were read.
"""

from __future__ import annotations

from typing import NamedTuple

import grain
import numpy as np

from tilelli_jax.data.corpus import ByteCorpus
from tilelli_jax.data.reading import ALL, ENDLESS, Batches, Rows, read_ahead, shuffled
from tilelli_jax.errors import InputError


class TrainingBatch(NamedTuple):
    """Rows of a batch: byte t of a row is to predict byte t + 1."""

    bytes: np.ndarray  # uint8 [rows, seq_len + 1]
    starts: np.ndarray  # int64 [rows]: where in the corpus each row begins


class ValidationBatch(NamedTuple):
    """Rows of a batch; `mask` is true where a byte is to be predicted, false in the padding."""

    bytes: np.ndarray  # uint8 [rows, seq_len + 1]
    mask: np.ndarray  # bool [rows, seq_len]: of the predictions, byte t + 1 from byte t


def training_batches(corpus: ByteCorpus, *, batch_size: int, seq_len: int, seed: int,
                     rows: Rows | None = None, start: int = 0, prefetch: int = 2,
                     ) -> grain.IterDataset[TrainingBatch]:
    """Endless random batches. An epoch reads windows that begin at i · seq_len + jitter, once each.

    The starts that leave room for a window are cut into strata of `seq_len` (the last one takes
    the remainder as well). An epoch visits each stratum once, in random order, at a start drawn
    uniformly from it.

    Args:
        batch_size: rows of the global batch.
        rows: those that this process reads; all of them by default.
        start: windows that were read before an iterator begins.
        prefetch: batches read ahead by a thread; 0 reads when asked.

    The state of an iterator (`get_state`, `set_state`) is a small dict of how many windows it has read: it
    may be set on another number of processes, or with another batch size. With another `seq_len` the windows
    are others; it then goes on after as many bytes.

    Raises:
        InputError: the corpus is shorter than one window.
    """
    n_starts = len(corpus) - seq_len
    if n_starts < 1:
        raise InputError(f"train.seq_len: {seq_len} needs {seq_len + 1} bytes to learn from, found "
                         f"{len(corpus)}: choose a shorter one, or a longer text")
    n_windows = max(1, n_starts // seq_len)
    chosen = ALL if rows is None else rows

    def jittered(window: int, rng: np.random.Generator) -> np.int64:
        low = window * seq_len
        high = low + seq_len if window < n_windows - 1 else n_starts
        return rng.integers(low, high)

    def batch(starts: np.ndarray) -> TrainingBatch:
        return TrainingBatch(corpus.gather(starts[chosen], seq_len + 1), starts[chosen])

    # A finite length, since Grain overflows on batches of 1 of an infinite one.
    windows = shuffled(n_windows, seed).repeat(-(-ENDLESS // n_windows))
    return Batches(windows.random_map(jittered), batch_size, batch, prefetch=prefetch, size=seq_len,
                   start=start)


def validation_batches(corpus: ByteCorpus, *, batch_size: int, seq_len: int,
                       rows: Rows | None = None, max_bytes: int | None = None, prefetch: int = 2,
                       ) -> grain.IterDataset[ValidationBatch]:
    """The corpus from its beginning, each byte but the first predicted exactly once.

    Window w holds the bytes w · seq_len … (w + 1) · seq_len, so neighbours share one byte. The
    last window and the last batch are padded with zeros under a false mask: all batches have one
    shape.

    Args:
        batch_size: rows of the global batch.
        rows: those that this process reads; all of them by default.
        max_bytes: look at so many bytes only.
        prefetch: batches read ahead by a thread; 0 reads when asked.

    Raises:
        InputError: there is no byte to predict.
    """
    size = len(corpus) if max_bytes is None else min(len(corpus), max_bytes)
    if size < 2:
        raise InputError(f"the validation part has {size} bytes, and a prediction needs 2")
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
