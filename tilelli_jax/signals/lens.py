"""The logit lens (nostalgebraist 2020): unembeds intermediate activations as if they were the last.

Each row passes the final norm and the unembedding. The statistics of its distribution are accumulated over
slices of the vocabulary, so no array is as wide as the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tilelli_jax.nn.unembed import Unembedding

CHUNK = 2048  # tokens per slice of the vocabulary


class LensStats(NamedTuple):
    """Statistics of the distribution p = softmax(z) of each row, f32 `[rows]`.

    Attributes:
        entropy: entropy of p, in nats.
        best: the most likely token, int32; of equals the first.
        margin: z of the best token minus the second largest z.
        top: p of the best token.
    """

    entropy: jax.Array
    best: jax.Array
    margin: jax.Array
    top: jax.Array


class _Sums(NamedTuple):
    """Running sums over the tokens so far; exponentials are relative to the largest z, `top`."""

    top: jax.Array
    total: jax.Array  # Σ e^z
    weighted: jax.Array  # Σ z·e^z
    crossed: jax.Array  # Σ z'·e^z, with z' of the reference row
    best: jax.Array  # token of the largest z
    second: jax.Array  # second largest z


def logit_lens(unembedding: Unembedding, rows: jax.Array, *, chunk: int = CHUNK,
               rounded: bool = False) -> LensStats:
    """Statistics of the logit lens for rows `[rows, d_model]`, before the final norm."""
    return _accumulate(unembedding, rows, None, chunk, rounded)[0]


def logit_lens_from(unembedding: Unembedding, rows: jax.Array, before: jax.Array, *, chunk: int = CHUNK,
                    rounded: bool = False) -> tuple[LensStats, jax.Array]:
    """As `logit_lens`, and the divergence KL(p ‖ p') from a reference row, f32 `[rows]`, in nats.

    Args:
        before: int `[rows]`, index of the reference row with distribution p'.
    """
    stats, divergence = _accumulate(unembedding, rows, before, chunk, rounded)
    assert divergence is not None
    return stats, divergence


def _accumulate(unembedding: Unembedding, rows: jax.Array, before: jax.Array | None, chunk: int,
                rounded: bool) -> tuple[LensStats, jax.Array | None]:
    normed = unembedding.norm(rows)
    n, vocab = len(rows), unembedding.vocab_size
    chunk = min(chunk, vocab)
    zero = jnp.zeros(n, jnp.float32)
    low = jnp.full(n, -jnp.inf, jnp.float32)

    def add(sums: _Sums, start: jax.Array | int, size: int) -> _Sums:
        z = unembedding.logits(normed, start, size, rounded=rounded)
        chunk_top = jnp.max(z, axis=1)
        # Maxima and minima of float32 indices (exact up to 2²⁴): XLA does not vectorise an argmax, and
        # integer reductions are slower on a CPU.
        index = jnp.arange(size, dtype=jnp.float32)
        best = jnp.min(jnp.where(z == chunk_top[:, None], index, size), axis=1)
        second = jnp.max(jnp.where(index == best[:, None], -jnp.inf, z), axis=1)  # equals the top in a tie
        top = jnp.maximum(sums.top, chunk_top)
        e = jnp.exp(z - top[:, None])
        rescale = jnp.where(sums.total > 0, jnp.exp(sums.top - top), 0.0)
        crossed = sums.crossed
        if before is not None:
            crossed = crossed * rescale + jnp.sum(e * z[before], axis=1)
        return _Sums(
            top, sums.total * rescale + jnp.sum(e, axis=1), sums.weighted * rescale + jnp.sum(e * z, axis=1),
            crossed,
            jnp.where(chunk_top > sums.top, best.astype(jnp.int32) + start, sums.best),
            jnp.maximum(jnp.minimum(sums.top, chunk_top),
                        jnp.where(chunk_top >= sums.top, second, sums.second)))

    sums = _Sums(low, zero, zero, zero, jnp.zeros(n, jnp.int32), low)
    full_chunks = vocab // chunk
    sums, _ = jax.lax.scan(lambda sums, i: (add(sums, i * chunk, chunk), None), sums, jnp.arange(full_chunks))
    if vocab % chunk:
        sums = add(sums, full_chunks * chunk, vocab % chunk)
    log_total = jnp.log(sums.total) + sums.top
    mean = sums.weighted / sums.total
    stats = LensStats(log_total - mean, sums.best, sums.top - sums.second, 1 / sums.total)
    if before is None:
        return stats, None
    # Σ p (log p − log p') = Σ p z − log Z − Σ p z' + log Z'
    return stats, mean - log_total - sums.crossed / sums.total + log_total[before]
