"""The logit lens: what activations would say if they were the last (nostalgebraist 2020).

A row is normed and unembedded as the last stream is. What is told of the distribution over the vocabulary
is put together piece by piece: no array is as wide as the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tilelli_jax.nn.unembed import Unembedding

CHUNK = 2048  # tokens at a time


class LensStats(NamedTuple):
    """Of the distribution p = softmax z of each row; f32 `[rows]`, nats.

    `entropy` of p; `best` the likeliest token, int32, of equals the first; `margin`, its z less the next
    one's; `top`, its p.
    """

    entropy: jax.Array
    best: jax.Array
    margin: jax.Array
    top: jax.Array


class _Sums(NamedTuple):
    """Over the tokens so far, with the largest z subtracted: Σe^z, Σz·e^z, Σz'·e^z of another row's z'."""

    most: jax.Array
    total: jax.Array
    weighted: jax.Array
    crossed: jax.Array
    best: jax.Array
    next: jax.Array


def logit_lens(unembedding: Unembedding, rows: jax.Array, *, chunk: int = CHUNK,
         rounded: bool = False) -> LensStats:
    """rows `[rows, d_model]`, not normed → what they say."""
    return _pass(unembedding, rows, None, chunk, rounded)[0]


def logit_lens_from(unembedding: Unembedding, rows: jax.Array, before: jax.Array, *, chunk: int = CHUNK,
              rounded: bool = False) -> tuple[LensStats, jax.Array]:
    """Also the divergence of each row's distribution from another's, KL(p ‖ p'), f32 `[rows]`, nats.

    Args:
        before: int `[rows]`: the row whose distribution is p'.
    """
    told, divergence = _pass(unembedding, rows, before, chunk, rounded)
    assert divergence is not None
    return told, divergence


def _pass(unembedding: Unembedding, rows: jax.Array, before: jax.Array | None, chunk: int,
          rounded: bool) -> tuple[LensStats, jax.Array | None]:
    normed = unembedding.norm(rows)
    n, vocab = len(rows), unembedding.vocab_size
    chunk = min(chunk, vocab)
    zero = jnp.zeros(n, jnp.float32)
    low = jnp.full(n, -jnp.inf, jnp.float32)

    def add(sums: _Sums, start: jax.Array | int, size: int) -> _Sums:
        z = unembedding.logits(normed, start, size, rounded=rounded)
        most = jnp.max(z, axis=1)
        # Plain maxima and minima of float32 (whole to 2²⁴): an argmax is no reduction that XLA vectorises,
        # and on a CPU those of integers are slower ones.
        at = jnp.arange(size, dtype=jnp.float32)
        best = jnp.min(jnp.where(z == most[:, None], at, size), axis=1)
        second = jnp.max(jnp.where(at == best[:, None], -jnp.inf, z), axis=1)  # of equals, the most again
        top = jnp.maximum(sums.most, most)
        e = jnp.exp(z - top[:, None])
        keep = jnp.where(sums.total > 0, jnp.exp(sums.most - top), 0.0)
        crossed = sums.crossed
        if before is not None:
            crossed = crossed * keep + jnp.sum(e * z[before], axis=1)
        return _Sums(
            top, sums.total * keep + jnp.sum(e, axis=1), sums.weighted * keep + jnp.sum(e * z, axis=1),
            crossed,
            jnp.where(most > sums.most, best.astype(jnp.int32) + start, sums.best),
            jnp.maximum(jnp.minimum(sums.most, most), jnp.where(most >= sums.most, second, sums.next)))

    sums = _Sums(low, zero, zero, zero, jnp.zeros(n, jnp.int32), low)
    whole = vocab // chunk
    sums, _ = jax.lax.scan(lambda sums, i: (add(sums, i * chunk, chunk), None), sums, jnp.arange(whole))
    if vocab % chunk:
        sums = add(sums, whole * chunk, vocab % chunk)
    log_total = jnp.log(sums.total) + sums.most
    mean = sums.weighted / sums.total
    told = LensStats(log_total - mean, sums.best, sums.most - sums.next, 1 / sums.total)
    if before is None:
        return told, None
    # Σ p (log p − log p') = Σ p z − log Z − Σ p z' + log Z'
    return told, mean - log_total - sums.crossed / sums.total + log_total[before]
