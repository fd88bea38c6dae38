"""Exact top-k causal attention: every query attends to the k keys with the largest scores.

    s = q·k / √d_head, causal;  A = softmax over the k largest s of each query;  out = Σ_heads A x W

Ties keep the earliest positions, as in `jax.lax.top_k`. Identical tokens have identical keys, so ties
are common in a first layer without positions. Three methods make it as fast as dense attention, with
plain XLA operations that partition over batch and heads:

- *Selection is a search, not a sort.* The k-th largest score of a query is found bit by bit: the
  threshold is built from its highest bit, and a bit stays set if at least k keys reach the threshold.
  32 passes find the score and 8 more (up to 256 keys) the position of the last tie that is kept.
  A pass compares and counts bytes, with one query per vector lane.
- *The value map is linear*, so A (x W) = (A x) W: the weights mix x, which all heads share, and one
  product with the kernels of all heads follows. Caches hold x, not one value per head.
- *Causality by blocks of queries*: a block reads only the keys up to its end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from tilelli_jax.nn.matmul import contract, project

Reduction = Literal["mean", "sum"]

# Four blocks skip 3/8 of the square; products of fewer than 64 queries run slower on CPUs.
MAX_BLOCKS, MIN_BLOCK = 4, 64
# Up to this many queries, as in decoding, `lax.top_k` costs less than the fixed cost of a search.
# With more, XLA gathers the input of `lax.top_k` from all devices, and on a CPU sorts in one thread.
FEW_QUERIES = 32


def top_k_attention(
    query: Array,
    key: Array,
    x: Array,
    kernel: Array,
    k: int,
    *,
    visible: Array | None = None,
    reduction: Reduction = "mean",
) -> Array:
    """Top-k attention: causal self-attention over whole sequences, or a few queries to cached keys.

    Products have operands in the dtype of `query`; scores, softmax and sums are float32. Without
    `visible` the gradient is custom (reverse mode only): it saves the weights of the causal blocks and
    the context A x.

    Args:
      query: `[batch, queries, heads, d_head]`.
      key: `[batch, keys, heads, d_head]`, in order of time.
      x: inputs of the value kernels, `[batch, keys, d_in]`.
      kernel: one value kernel per head, `[heads, d_in, d_out]`.
      k: keys that a query attends to, at least 1; a query with fewer visible keys attends to all.
      visible: keys that a query may attend to, bool `[batch, queries, keys]`, at least one each. None:
        as many queries as keys, and query t may attend to keys 0 … t.
      reduction: whether the heads' outputs are averaged or summed.

    Returns:
      `[batch, queries, d_out]` in the dtype of `query`.
    """
    if visible is None:
        out = _attend(query, key, x, kernel, k)
    else:
        keys_first = jnp.swapaxes(visible, 1, 2)[:, None]
        weights = _weights(_swap(query), _swap(key), keys_first, k)
        context = _mix(weights, x, query.dtype)
        out = project(context, _joined(kernel), dtype=query.dtype, result=jnp.float32)
    return (out / query.shape[2] if reduction == "mean" else out).astype(query.dtype)


def top_k_mask(scores: Array, k: int, axis: int = -1) -> Array:
    """Mask of the k largest scores along `axis`; of equal scores the earliest are kept.

    Args:
      scores: any shape; −inf marks excluded keys. No gradient passes.
      k: scores to keep, at least 1. If fewer are above −inf, all of those are kept.
      axis: the axis of the keys. Any axis but the last is faster on CPUs.

    Returns:
      bool, of the shape of `scores`.
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, found {k}")
    scores = lax.stop_gradient(scores).astype(jnp.float32)
    axis %= scores.ndim
    keys = scores.shape[axis]
    mask = scores > -jnp.inf
    if k < keys:
        few = scores.size <= FEW_QUERIES * keys
        kth, last = (_last_kept_of_few if few else _last_kept)(scores, k, axis)
        bits, position = _ordered_bits(scores), lax.broadcasted_iota(jnp.int32, scores.shape, axis)
        mask &= (bits > kth) | ((bits == kth) & (position <= last))
    return mask


# Selection: the score of the last kept key, as ordered bits, and its position. In both, `axis` has
# length 1, so that they broadcast against the scores.


def _ordered_bits(scores: Array) -> Array:
    """uint32 with the same order as the float32 `scores`; −0 and 0 map to the same number."""
    bits = lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits + sign, -bits)


def _last_kept(scores: Array, k: int, axis: int) -> tuple[Array, Array]:
    keys = scores.shape[axis]
    bits = _ordered_bits(scores)
    rank = jnp.full_like(lax.slice_in_dim(bits, 0, 1, axis=axis), k, dtype=jnp.int32)
    kth, rank = _kth_largest(bits, True, rank, 4, axis)
    to_end = jnp.uint32(keys - 1) - lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    n_bytes = -(-(keys - 1).bit_length() // 8)
    distance, _ = _kth_largest(to_end, bits == kth, rank, n_bytes, axis)
    return kth, keys - 1 - distance.astype(jnp.int32)


def _kth_largest(
    numbers: Array, included: Array | bool, rank: Array, n_bytes: int, axis: int
) -> tuple[Array, Array]:
    """The `rank`-th largest of the included uint32 numbers, and its rank among those equal to it."""

    def next_byte(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        kth, rank = state
        shift = 8 * (n_bytes - 1 - i).astype(jnp.uint32)
        matching = included & (numbers >> shift >> 8 == kth >> shift >> 8)  # equal in the bytes so far
        candidates = jnp.where(matching, (numbers >> shift).astype(jnp.uint8), 0)
        byte, rank = _kth_byte(candidates, rank, axis)
        return kth | byte.astype(jnp.uint32) << shift, rank

    return lax.fori_loop(0, n_bytes, next_byte, (jnp.zeros_like(rank, dtype=jnp.uint32), rank))


def _kth_byte(candidates: Array, rank: Array, axis: int) -> tuple[Array, Array]:
    """As `_kth_largest`, for bytes. Excluded bytes are 0, below every threshold that is tried."""

    def try_bit(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        threshold, above = state
        raised = threshold | (jnp.uint8(1 << 7) >> i.astype(jnp.uint8))
        count = _count(candidates >= raised, axis)
        enough = count >= rank
        return jnp.where(enough, raised, threshold), jnp.where(enough, above, count)

    start = jnp.zeros_like(rank, dtype=jnp.uint8), jnp.zeros_like(rank)
    threshold, above = lax.fori_loop(0, 8, try_bit, start)
    return threshold, rank - above


def _count(flags: Array, axis: int) -> Array:
    """Number of set flags along the axis, which keeps length 1. Counts in bytes where they suffice."""
    keys = flags.shape[axis]
    part = 128 if keys > 255 and keys % 128 == 0 else keys
    parts = flags.reshape(*flags.shape[:axis], keys // part, part, *flags.shape[axis + 1 :])
    counts = jnp.sum(parts, axis + 1, dtype=jnp.uint8 if part < 256 else jnp.int32)
    return jnp.sum(counts, axis, dtype=jnp.int32, keepdims=True)


def _last_kept_of_few(scores: Array, k: int, axis: int) -> tuple[Array, Array]:
    scores = jnp.where(scores == 0, 0.0, scores)  # lax.top_k orders −0 below 0
    values, positions = lax.top_k(jnp.moveaxis(scores, axis, -1), k)
    # Not values[..., -1:]: XLA would fuse the slice with the top-k and sort everything.
    kth = values.min(-1, keepdims=True)
    last = jnp.where(values == kth, positions, -1).max(-1, keepdims=True)
    return jnp.moveaxis(_ordered_bits(kth), -1, axis), jnp.moveaxis(last, -1, axis)


# Attention. Internally, heads come before time and keys before queries: weights are
# `[batch, heads, keys, queries]`. For the products with x, which the heads share, the queries of all
# heads form one axis: weights `[batch, keys, heads·queries]`. Those products are written so that
# neither operand needs a transposed copy.


def _weights(query: Array, key: Array, visible: Array, k: int) -> Array:
    """Softmax over the k largest-scoring visible keys of each query; other weights are 0."""
    scores = _product("bhsd,bhtd->bhst", key, query, query.dtype) * query.shape[-1] ** -0.5
    scores = jnp.where(visible, scores, -jnp.inf)
    scores = jnp.where(top_k_mask(scores, k, axis=2), scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=2)


def _mix(weights: Array, x: Array, dtype: jnp.dtype) -> Array:
    """The weighted sums of x, `[batch, queries, heads·d_in]`."""
    batch, heads, _, queries = weights.shape
    context = _product("bsc,bsd->bcd", _merge_heads(weights), x, dtype)
    return _swap(context.reshape(batch, heads, queries, -1)).reshape(batch, queries, -1)


def _merge_heads(weights: Array) -> Array:
    """`[batch, heads, keys, queries]` → `[batch, keys, heads·queries]`."""
    return _swap(weights).reshape(weights.shape[0], weights.shape[2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, x: Array, kernel: Array, k: int) -> Array:
    return _attend_forward(query, key, x, kernel, k)[0]


def _attend_forward(
    query: Array, key: Array, x: Array, kernel: Array, k: int
) -> tuple[Array, tuple]:
    queries, keys = _swap(query), _swap(key)
    contexts, all_weights = [], []
    for start, end in _blocks(x.shape[1]):
        shape = (1, 1, end, end - start)
        at_key, at_query = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (2, 3))
        causal = at_key <= start + at_query
        all_weights.append(_weights(queries[:, :, start:end], keys[:, :, :end], causal, k))
        contexts.append(_mix(all_weights[-1], x[:, :end], query.dtype))
    context = jnp.concatenate(contexts, axis=1)
    out = project(context, _joined(kernel), dtype=query.dtype, result=jnp.float32)
    return out, (query, key, x, kernel, all_weights, context)


def _attend_backward(k: int, saved: tuple, d_out: Array) -> tuple[Array, Array, Array, Array]:
    query, key, x, kernel, all_weights, context = saved
    queries, keys = _swap(query), _swap(key)
    batch, time, heads, d_head = query.shape
    product = functools.partial(_product, dtype=query.dtype)
    d_joined = product("nc,no->co", _flat(context), _flat(d_out))
    d_context = project(d_out, _joined(kernel).T, dtype=query.dtype, result=jnp.float32)
    d_context = _swap(d_context.reshape(batch, time, heads, -1))
    d_queries = []
    d_keys, d_x = (jnp.zeros(a.shape, jnp.float32) for a in (keys, x))
    for (start, end), weights in zip(_blocks(time), all_weights, strict=True):
        d_block = d_context[:, :, start:end].reshape(batch, heads * (end - start), -1)
        d_x = d_x.at[:, :end].add(product("bsc,bcd->bsd", _merge_heads(weights), d_block))
        d_merged = product("bsd,bcd->bsc", x[:, :end], d_block)
        d_weights = _swap(d_merged.reshape(batch, end, heads, end - start))
        mean = jnp.sum(weights * d_weights, axis=2, keepdims=True)
        d_scores = weights * (d_weights - mean) * d_head**-0.5
        d_queries.append(product("bhst,bhsd->bhtd", d_scores, keys[:, :, :end]))
        d_block_keys = product("bhst,bhtd->bhsd", d_scores, queries[:, :, start:end])
        d_keys = d_keys.at[:, :, :end].add(d_block_keys)
    return (
        _swap(jnp.concatenate(d_queries, axis=2)).astype(query.dtype),
        _swap(d_keys).astype(key.dtype),
        d_x.astype(x.dtype),
        d_joined.reshape(kernel.shape).astype(kernel.dtype),
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _blocks(time: int) -> Iterator[tuple[int, int]]:
    size = max(MIN_BLOCK, -(-time // MAX_BLOCKS))
    return ((start, min(start + size, time)) for start in range(0, time, size))


def _product(subscripts: str, a: Array, b: Array, dtype: jnp.dtype) -> Array:
    return contract(subscripts, a, b, dtype=dtype, result=jnp.float32)


def _flat(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def _swap(array: Array) -> Array:
    return jnp.swapaxes(array, 1, 2)


def _joined(kernel: Array) -> Array:
    return kernel.reshape(-1, kernel.shape[-1])
