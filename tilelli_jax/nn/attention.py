"""Causal attention: top-k sparse (routed networks), dense, and with grouped queries (Llama, Gemma)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.nn.linear import HeadwiseLinear, Linear, Weight, fan_in_normal
from tilelli_jax.nn.matmul import contract
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.nn.rotary import rotate
from tilelli_jax.nn.topk import Reduction, top_k_attention

ALL = 1 << 30  # a window that holds every key


class KeyCache(NamedTuple):
    """Key-value cache: `keys [batch, heads, slots, d_head]`, `values [batch, …, slots, d]`.

    Position p is in slot p mod slots. A cache with as many slots as positions holds all of them; one with
    fewer, for attention to a window, the most recent ones. Slots that no position of a row has filled hold
    arbitrary values and are masked. The head axis comes before the slot axis, the layout that the products
    use: any other layout would transpose the whole cache for every byte.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def of_prompts(cls, keys: jax.Array, values: jax.Array, lengths: jax.Array, slots: int) -> KeyCache:
        """The cache after prompts.

        Args:
            keys: of all positions of the padded prompts, `[batch, heads, time, d_head]`; values alike.
            lengths: `[batch]`, number of positions in each prompt.
            slots: number of slots; with fewer than time, the last positions of each row are kept.
        """
        return cls(_in_slots(keys, lengths, slots), _in_slots(values, lengths, slots))

    def after(self, prefix: KeyCache | None) -> KeyCache:
        """Keys and values of the positions of a prefix that all rows share (batch 1), then these."""
        if prefix is None:
            return self
        shared = (jnp.broadcast_to(x, (len(self.keys), *x.shape[1:])) for x in prefix)
        return KeyCache(*(jnp.concatenate([x.astype(new.dtype), new], axis=-2)
                          for x, new in zip(shared, self, strict=True)))

    def write(self, keys: jax.Array, values: jax.Array, position: jax.Array) -> KeyCache:
        """Returns the cache with one more entry (size 1) in each row, at `position [batch]`."""
        def update(row: jax.Array, entry: jax.Array, slot: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(row, entry.astype(row.dtype), slot, row.ndim - 2)
        slot = position % self.keys.shape[-2]
        if len(position) == 1:  # in place; rows of different lengths need a scatter, which copies
            return KeyCache(update(self.keys, keys, slot[0]), update(self.values, values, slot[0]))
        return KeyCache(jax.vmap(update)(self.keys, keys, slot), jax.vmap(update)(self.values, values, slot))

    def filled(self, position: jax.Array) -> jax.Array:
        """Which slots hold a position up to `position [batch]`: bool `[batch, slots]`."""
        slots = self.keys.shape[-2]
        return _held(position, slots) >= 0


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
        keys = self.key(x)
        return self._attend(x, keys, x), KeyCache.of_prompts(swap(keys), x.astype(self.dtype), lengths, size)

    def step(self, x: jax.Array, cache: KeyCache, position: jax.Array) -> tuple[jax.Array, KeyCache]:
        """One input `[batch, 1, d_model]` at `position [batch]` → its output and the updated cache."""
        cache = cache.write(swap(self.key(x)), x, position)
        return self._attend(x, swap(cache.keys), cache.values, cache.filled(position)[:, None]), cache

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
    def prefill(self, x: jax.Array, lengths: jax.Array, size: int,
                prefix: KeyCache | None = None) -> tuple[jax.Array, KeyCache]:
        """Returns the output of `__call__` and a cache of `size` slots with each row's first `lengths`.

        With the keys of a shared prefix, those of its positions come first.
        """
        start = n_positions(prefix)
        query, key, value = self._heads(x, start + jnp.arange(x.shape[1])[None])
        keys = KeyCache(key, value).after(prefix)
        return (self._attend(query, *keys, causal(x.shape[1], start)),
                KeyCache.of_prompts(*keys, start + lengths, size))

    @jax.named_scope("attention")
    def step(self, x: jax.Array, cache: KeyCache, position: jax.Array) -> tuple[jax.Array, KeyCache]:
        """One input `[batch, 1, d_model]` at `position [batch]` → its output and the updated cache."""
        query, key, value = self._heads(x, position[:, None])
        cache = cache.write(key, value, position)
        visible = cache.filled(position)[:, None, None]
        return self._attend(query, cache.keys, cache.values, visible), cache

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


class LayerAttention(NamedTuple):
    """What differs between the attention of otherwise equal layers.

    In a network: arrays with a leading axis of n_layers, which a scan over the layers splits.
    """

    window: Any  # int: number of most recent keys that a query attends to
    inverse_frequencies: Any  # f32 [d_head / 2]
    amplitude: Any = 1.0  # f32: factor of rotated queries and keys


class GroupedQueryAttention(nnx.Module):
    """Causal attention with rotary positions, in which groups of query heads share a key and a value head.

    Ainslie et al. 2023, arXiv:2305.13245. Kernels: `query [d_model, n_heads · d_head]`, `key` and `value`
    `[d_model, n_kv_heads · d_head]`, `out [n_heads · d_head, d_model]`.

    Args:
        scale: factor of the scores.
        bias: use biases in the query, key and value projections; `out_bias`: in the output projection.
        norm: makes the norm of queries and that of keys, over the channels of a head; None: no norms.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, *, scale: float,
                 bias: bool, out_bias: bool, norm: Callable[[], nnx.Module] | None,
                 dtype: jnp.dtype, rngs: nnx.Rngs):
        make = functools.partial(Linear, quantizer=Quantizer(), dtype=dtype, rngs=rngs)
        self.query = make(d_model, n_heads * d_head, bias=bias)
        self.key = make(d_model, n_kv_heads * d_head, bias=bias)
        self.value = make(d_model, n_kv_heads * d_head, bias=bias)
        self.out = make(n_heads * d_head, d_model, bias=out_bias)
        self.query_norm: Any = None if norm is None else norm()
        self.key_norm: Any = None if norm is None else norm()
        self.d_head, self.scale, self.dtype = d_head, scale, dtype

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, kind: LayerAttention) -> jax.Array:
        """`[batch, time, d_model]` → `[batch, time, d_model]`."""
        return self._sequence(x, kind)[0]

    @jax.named_scope("attention")
    def prefill(self, x: jax.Array, lengths: jax.Array, size: int, kind: LayerAttention,
                prefix: KeyCache | None = None) -> tuple[jax.Array, KeyCache]:
        """Returns the output of `__call__` and a cache of `size` slots, or of the window if it is smaller.

        With the keys of a shared prefix, those of its positions come first.
        """
        y, keys = self._sequence(x, kind, prefix)
        return y, KeyCache.of_prompts(*keys, n_positions(prefix) + lengths, min(size, int(kind.window)))

    @jax.named_scope("attention")
    def step(self, x: jax.Array, cache: KeyCache, position: jax.Array,
             kind: LayerAttention) -> tuple[jax.Array, KeyCache]:
        """One input `[batch, 1, d_model]` at `position [batch]` → its output and the updated cache."""
        query, new = self._heads(x, position[:, None], kind)
        cache = cache.write(*new, position)
        return self._attend(query, cache, cache.filled(position)[:, None]), cache

    def _sequence(self, x: jax.Array, kind: LayerAttention,
                  prefix: KeyCache | None = None) -> tuple[jax.Array, KeyCache]:
        positions = n_positions(prefix) + jnp.arange(x.shape[1])[None]
        query, new = self._heads(x, positions, kind)
        keys = new.after(prefix)
        return self._attend(query, keys, in_window(positions, keys.keys.shape[-2], kind.window)), keys

    def _heads(self, x: jax.Array, positions: jax.Array, kind: LayerAttention) -> tuple[jax.Array, KeyCache]:
        """Queries `[batch, time, heads, d_head]`, and keys and values `[batch, kv_heads, time, d_head]`."""
        query, key, value = (y.reshape(*y.shape[:2], -1, self.d_head)
                             for y in (self.query(x), self.key(x), self.value(x)))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = (rotate(y, positions, kind.inverse_frequencies, kind.amplitude) for y in (query, key))
        return query, KeyCache(swap(key), swap(value))

    def _attend(self, query: jax.Array, cache: KeyCache, visible: jax.Array) -> jax.Array:
        attended = grouped_attention(query, cache, visible, scale=self.scale, dtype=self.dtype)
        return self.out(attended.reshape(*query.shape[:2], -1))


def grouped_attention(query: jax.Array, cache: KeyCache, visible: jax.Array, *, scale: float = 1.0,
                      dtype: jnp.dtype) -> jax.Array:
    """Attention of which groups of query heads share a key head.

    Args:
        query: `[batch, q, heads, d_head]`.
        visible: bool `[batch or 1, q, k]`, which keys a query may attend to.
        scale: factor of the scores.
        dtype: type of the products' operands; scores and weights are f32.

    Returns:
        `[batch, q, kv_heads, heads / kv_heads, d_head]`.
    """
    batch, time, _, d_head = query.shape
    query = query.reshape(batch, time, cache.keys.shape[1], -1, d_head)
    scores = contract("bqhgd,bhkd->bhgqk", query, cache.keys, dtype=dtype, result=jnp.float32)
    if scale != 1:
        scores = scores * scale
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf))
    return contract("bhgqk,bhkd->bqhgd", weights, cache.values, dtype=dtype)


def in_window(positions: jax.Array, n_keys: int, window: Any) -> jax.Array:
    """Which of the keys 0 … n_keys − 1 queries at `positions [batch or 1, q]` attend to: the `window` keys
    up to their own; bool `[batch or 1, q, k]`."""
    distance = positions[:, :, None] - jnp.arange(n_keys)
    return (distance >= 0) & (distance < window)


def causal(time: int, start: int = 0) -> jax.Array:
    """The causal mask, bool `[1, 1, time, start + time]`: query t attends to keys 0 … start + t."""
    return jnp.tril(jnp.ones((time, start + time), bool), start)[None, None]


def n_positions(prefix: KeyCache | None) -> int:
    """The number of positions of a shared prefix, whose cache has a slot for each; 0 without one."""
    return 0 if prefix is None else prefix.keys.shape[-2]


def widen(entries: jax.Array, size: int) -> jax.Array:
    """Pads entries `[batch, …, time, d]` at the end to `size` slots."""
    padding = [(0, 0)] * entries.ndim
    padding[-2] = (0, size - entries.shape[-2])
    return jnp.pad(entries, padding)


def swap(array: jax.Array) -> jax.Array:
    """Swaps the time and head axes: `[batch, time, heads, …]` ↔ `[batch, heads, time, …]`."""
    return jnp.swapaxes(array, 1, 2)


def _in_slots(entries: jax.Array, lengths: jax.Array, slots: int) -> jax.Array:
    """Entries `[batch, …, time, d]` of all positions → `[batch, …, slots, d]`, as `KeyCache` keeps them."""
    if entries.shape[-2] <= slots:
        return widen(entries, slots)
    held = jnp.maximum(_held(lengths - 1, slots), 0)
    held = held.reshape(len(held), *(1,) * (entries.ndim - 3), slots, 1)
    return jnp.take_along_axis(entries, held, axis=-2)


def _held(position: jax.Array, slots: int) -> jax.Array:
    """The position in each slot after `position [batch]` was written; negative for an empty slot."""
    position = position[:, None]
    return position - (position - jnp.arange(slots)) % slots
