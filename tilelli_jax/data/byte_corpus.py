"""A byte corpus: several memory-mapped segments, read as one long array."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class ByteCorpus:
    """A concatenation of byte segments, read as one array.

    The segments are uint8 [length], usually memory-mapped, so a read touches only the requested bytes.
    """

    def __init__(self, segments: Sequence[np.ndarray]) -> None:
        self.segments = [segment for segment in segments if len(segment)]
        self.ends = np.cumsum([len(segment) for segment in self.segments], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns a copy of the bytes [start, start + length), uint8 [length].

        Raises:
            IndexError: the range exceeds the corpus.
        """
        return self.gather([start], length)[0]

    def gather(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Returns `length` bytes from each of `starts` [n]: uint8 [n, length].

        Raises:
            IndexError: a range exceeds the corpus.
        """
        starts = np.asarray(starts, np.int64)
        if length < 0 or (starts < 0).any() or (starts + length > len(self)).any():
            raise IndexError(f"{length} bytes from {starts.tolist()}: the corpus has {len(self)}")
        out = np.empty((len(starts), length), np.uint8)
        for row, start in zip(out, starts.tolist(), strict=True):
            self._read_into(row, start)
        return out

    def fingerprint(self) -> str:
        """Returns the length and a hash of 256 evenly spaced stretches of 4 KiB, which identify the text."""
        length = min(len(self), 4096)
        starts = np.linspace(0, len(self) - length, 256, dtype=np.int64)
        stretches = self.gather(np.unique(starts), length)
        return f"{len(self)}:{hashlib.sha256(stretches.tobytes()).hexdigest()[:16]}"

    def _read_into(self, row: np.ndarray, start: int) -> None:
        done = 0
        at = int(np.searchsorted(self.ends, start, side="right"))
        while done < len(row):
            segment = self.segments[at]
            offset = start + done - (int(self.ends[at]) - len(segment))
            piece = segment[offset:offset + len(row) - done]
            row[done:done + len(piece)] = piece
            done += len(piece)
            at += 1
