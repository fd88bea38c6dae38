"""Causal attention: top-k sparse (routed networks) and dense (the vanilla transformer)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.nn.linear import HeadwiseLinear, Linear, Weight, fan_in_normal
from tilelli_jax.nn.matmul import contract
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.nn.rotary import rotate
from tilelli_jax.nn.topk import Reduction, top_k_attention


class KeyCache(NamedTuple):
    """Key-value cache: `keys [batch, heads, size, d_head]`, `values [batch, …, size, d]`.

    Slot i holds position i; slots past a row's length hold arbitrary values and are masked. The head
    axis comes before the slot axis, the layout that the products use: any other layout would
    transpose the whole cache for every byte.
    """

    keys: jax.Array
    values: jax.Array

    def write(self, keys: jax.Array, values: jax.Array, position: jax.Array) -> KeyCache:
        """Returns the cache with one more entry (size 1) in each row, at `position [batch]`."""
        def update(row: jax.Array, entry: jax.Array, slot: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(row, entry.astype(row.dtype), slot, row.ndim - 2)
        if len(position) == 1:  # in place; rows of different lengths need a scatter, which copies
            return KeyCache(update(self.keys, keys, position[0]), update(self.values, values, position[0]))
        return KeyCache(jax.vmap(update)(self.keys, keys, position),
                        jax.vmap(update)(self.values, values, position))


class TopKAttention(nnx.Module):
    """Each query attends to the k keys with the largest scores among the keys up to its own position.

    Queries and keys have width d_head in each head, values the full width d_model. The heads'
    outputs are averaged or summed; there is no output projection. Exact ties keep the earliest
    positions. The cache holds the inputs, not the values: see `top_k_attention`.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, top_k: int, quantizer: Quantizer, *,
                 rngs: nnx.Rngs, reduction: Reduction = "mean", dtype: jnp.dtype = jnp.float32):
        self.query = HeadwiseLinear(n_heads, d_model, d_head, quantizer, rngs=rngs, dtype=dtype)
        self.key = HeadwiseLinear(n_heads, d_model, d_head, quantizer, rngs=rngs, dtype=dtype)
        self.value = Weight((n_heads, d_model, d_model), quantizer, init=fan_in_normal(d_model), rngs=rngs)
        self.top_k = top_k
        self.reduction = reduction
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → `[batch, time, d_model]`."""
        return self._attend(x, self.key(x), x)

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, KeyCache]:
        """Returns the output of `__call__` and a cache of `size` slots with each row's first `lengths`."""
        del lengths  # later slots are masked until they are overwritten
        keys = self.key(x)
        return self._attend(x, keys, x), KeyCache(widen(swap(keys), size),
                                                  widen(x.astype(self.dtype), size))

    def step(self, x: jax.Array, cache: KeyCache, position: jax.Array) -> tuple[jax.Array, KeyCache]:
        """One input `[batch, 1, d_model]` at `position [batch]` → its output and the updated cache."""
        cache = cache.write(swap(self.key(x)), x, position)
        visible = jnp.arange(cache.keys.shape[2]) <= position[:, None]
        return self._attend(x, swap(cache.keys), cache.values, visible[:, None]), cache

    def _attend(self, x: jax.Array, keys: jax.Array, rows: jax.Array,
                visible: jax.Array | None = None) -> jax.Array:
        return top_k_attention(self.query(x), keys, rows, self.value.quantized(), self.top_k,
                               visible=visible, reduction=self.reduction)


class CausalAttention(nnx.Module):
    """Dense multi-head causal attention with an output projection (Vaswani et al. 2017).

    qkv kernel `[d_model, 3·d_model]`: the columns are queries, keys and values; each third holds the heads.
    """

    def __init__(self, d_model: int, n_heads: int, quantizer: Quantizer, *, rngs: nnx.Rngs,
                 bias: bool = False, dtype: jnp.dtype = jnp.float32):
        self.qkv = Linear(d_model, 3 * d_model, quantizer, bias=bias, rngs=rngs, dtype=dtype)
        self.out = Linear(d_model, d_model, quantizer, bias=bias, rngs=rngs, dtype=dtype)
        self.n_heads = n_heads
        self.dtype = dtype

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → `[batch, time, d_model]`."""
        return self._attend(*self._heads(x, jnp.arange(x.shape[1])[None]), causal(x.shape[1]))

    @jax.named_scope("attention")
    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, KeyCache]:
        """Returns the output of `__call__` and a cache of `size` slots with each row's first `lengths`."""
        del lengths  # later slots are masked until they are overwritten
        query, key, value = self._heads(x, jnp.arange(x.shape[1])[None])
        y = self._attend(query, key, value, causal(x.shape[1]))
        return y, KeyCache(widen(key, size), widen(value, size))

    @jax.named_scope("attention")
    def step(self, x: jax.Array, cache: KeyCache, position: jax.Array) -> tuple[jax.Array, KeyCache]:
        """One input `[batch, 1, d_model]` at `position [batch]` → its output and the updated cache."""
        query, key, value = self._heads(x, position[:, None])
        cache = cache.write(key, value, position)
        visible = jnp.arange(cache.keys.shape[2]) <= position[:, None]
        return self._attend(query, cache.keys, cache.values, visible[:, None, None]), cache

    def _heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, each `[batch, heads, time, d_head]`; `positions [batch or 1, time]`."""
        del positions  # the input already contains the position embeddings
        batch, time, d_model = x.shape
        parts = self.qkv(x).reshape(batch, time, 3, self.n_heads, d_model // self.n_heads)
        return swap(parts[:, :, 0]), swap(parts[:, :, 1]), swap(parts[:, :, 2])

    def _attend(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        scores = contract("bhtd,bhsd->bhts", query, key, dtype=self.dtype, result=jnp.float32)
        scores = jnp.where(mask, scores * query.shape[-1] ** -0.5, -jnp.inf)
        weights = jax.nn.softmax(scores)
        attended = contract("bhts,bhsd->bhtd", weights, value, dtype=self.dtype)
        attended = swap(attended)
        return self.out(attended.reshape(*attended.shape[:2], -1))


class RotaryAttention(CausalAttention):
    """Causal attention with rotary positions.

    The qkv columns are grouped by head, and within a head are query, key, value: the layout of
    GPT-NeoX (Black et al. 2022, arXiv:2204.06745).
    """

    def __init__(self, d_model: int, n_heads: int, inverse_frequencies: np.ndarray, quantizer: Quantizer, *,
                 rngs: nnx.Rngs, bias: bool = False, dtype: jnp.dtype = jnp.float32):
        super().__init__(d_model, n_heads, quantizer, bias=bias, rngs=rngs, dtype=dtype)
        self.inverse_frequencies = tuple(inverse_frequencies.tolist())  # static: part of the program

    def _heads(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        heads = self.qkv(x).reshape(*x.shape[:2], self.n_heads, -1)
        query, key, value = jnp.split(heads, 3, axis=-1)
        frequencies = np.array(self.inverse_frequencies, np.float32)
        return (swap(rotate(query, positions, frequencies)), swap(rotate(key, positions, frequencies)),
                swap(value))


def causal(time: int) -> jax.Array:
    """The causal mask, bool `[1, 1, time, time]`: query t attends to keys 0 … t."""
    return jnp.tril(jnp.ones((time, time), bool))[None, None]


def widen(entries: jax.Array, size: int) -> jax.Array:
    """Pads entries `[batch, …, time, d]` at the end to `size` slots."""
    padding = [(0, 0)] * entries.ndim
    padding[-2] = (0, size - entries.shape[-2])
    return jnp.pad(entries, padding)


def swap(array: jax.Array) -> jax.Array:
    """Swaps the time and head axes: `[batch, time, heads, …]` ↔ `[batch, heads, time, …]`."""
    return jnp.swapaxes(array, 1, 2)
