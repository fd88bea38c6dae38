"""A byte-trigram language model: the baseline of the byte-level networks.

Each order n interpolates its counts with the next lower order,

    p_n(c | h) = (count(hc) + s_n · types(h) · p_{n−1}(c | h')) / (count(h) + s_n · types(h)),

where types(h) is the number of different bytes seen after the context h (1 for an unseen context), h' is
h without its first byte, and p_0 = 1/256. With s = 1 this is Witten–Bell smoothing (Witten and Bell
1991, method C). The three strengths s_n are fitted on the end of the training bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tilelli_jax.data.corpus import ByteCorpus
from tilelli_jax.errors import InputError

CHUNK = 1 << 22  # bytes counted or looked up at a time
HELD_OUT = 1 << 18  # maximum number of bytes for fitting the strengths
STRENGTHS = tuple(2.0**n for n in range(-6, 7))


class NGramCounts(NamedTuple):
    """Counts of the n-grams of order n, indexed by their bytes."""

    counts: np.ndarray  # uint32 [256] * n: occurrences of the n-gram
    total: np.ndarray  # int64 [256] * (n - 1): occurrences of the context
    types: np.ndarray  # int64 [256] * (n - 1): number of different bytes after the context, at least 1


class Trigram(NamedTuple):
    """Counts of bytes, pairs and triples, and the weight s_n of each lower order."""

    orders: tuple[NGramCounts, ...]
    strengths: tuple[float, ...] = (1.0, 1.0, 1.0)

    def probability(self, *text: np.ndarray) -> np.ndarray:
        """The probability of the last of up to three bytes (arrays of one shape) after the others.

        Returns float64 of that shape.
        """
        p = np.full(np.shape(text[-1]), 1 / 256)
        for n, (order, strength) in enumerate(zip(self.orders, self.strengths, strict=True), 1):
            if n > len(text):
                break
            context = tuple(text[len(text) - n:-1])
            weight = strength * order.types[context]
            p = (order.counts[(*context, text[-1])] + weight * p) / (order.total[context] + weight)
        return p

    def nats_per_byte(self, corpus: ByteCorpus, max_bytes: int | None = None) -> float:
        """Mean −ln p of the first `max_bytes` bytes of `corpus`, in nats (uniform: 5.545).

        As for the networks, the first byte is not predicted. The context of the second byte is one byte,
        that of all others two bytes.

        Raises:
            InputError: there is no byte to predict.
        """
        size = len(corpus) if max_bytes is None else min(len(corpus), max_bytes)
        if size < 2:
            raise InputError(f"corpus: expected at least 2 bytes to predict, found {size}")
        nll = -np.log(self.probability(*corpus.read(0, 2)))
        for start in range(0, size - 2, CHUNK):
            text = corpus.read(start, min(CHUNK + 2, size - start))
            nll -= np.log(self.probability(text[:-2], text[1:-1], text[2:])).sum()
        return float(nll / (size - 1))


def fit_trigram(corpus: ByteCorpus, max_bytes: int = 1 << 26) -> Trigram:
    """Counts the first `max_bytes` bytes of `corpus` and fits the strengths on the end of these bytes."""
    size = min(len(corpus), max_bytes)
    held_out = min(size // 10, HELD_OUT)
    triples = np.zeros(256**3, np.uint32)
    _count(triples, corpus, 0, size - held_out)
    strengths = _fit(_orders(triples), corpus.read(size - held_out, held_out))
    _count(triples, corpus, max(0, size - held_out - 2), size)
    return Trigram(_orders(triples), strengths)


# ---------------------------------------------------------------------------------------------


def _count(triples: np.ndarray, corpus: ByteCorpus, begin: int, end: int) -> None:
    """Adds the triples within [begin, end) to `triples`, uint32 [256 ** 3]."""
    for start in range(begin, end - 2, CHUNK):
        text = corpus.read(start, min(CHUNK + 2, end - start)).astype(np.int64)
        codes = (text[:-2] * 256 + text[1:-1]) * 256 + text[2:]
        triples += np.bincount(codes, minlength=256**3).astype(np.uint32)


def _orders(triples: np.ndarray) -> tuple[NGramCounts, ...]:
    """All three orders from the counts of triples: each pair and byte is counted as the end of a triple."""
    count = triples.reshape(256, 256, 256)
    pairs = count.sum(0, dtype=np.uint32)
    return tuple(
        NGramCounts(n_grams, n_grams.sum(-1, dtype=np.int64),
              np.maximum(np.count_nonzero(n_grams, axis=-1), 1))
        for n_grams in (pairs.sum(0, dtype=np.uint32), pairs, count))


def _fit(orders: tuple[NGramCounts, ...], text: np.ndarray) -> tuple[float, ...]:
    """The strengths from STRENGTHS with the lowest NLL of `text`; two rounds of coordinate search."""
    strengths = [1.0, 1.0, 1.0]
    if len(text) < 3:
        return tuple(strengths)
    for n in (2, 1, 0) * 2:
        def nll(strength: float, n: int = n) -> float:
            model = Trigram(orders, (*strengths[:n], strength, *strengths[n + 1:]))
            return float(-np.log(model.probability(text[:-2], text[1:-1], text[2:])).sum())
        strengths[n] = min(STRENGTHS, key=nll)
    return tuple(strengths)
