"""Causal networks, and what those of equal blocks share: embedding, blocks, final norm, unembedding.

A block is a module with three methods that agree with one another:
    block(x, tap)                    → y, seen     the whole sequence at once
    block.prefill(x, lengths, size)  → y, cache    the same, and what decoding needs of it
    block.step(x, cache, position)   → y, cache    one more position
The blocks' parameters are stacked: every array has a leading axis of n_layers.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.nn.linear import Embedding, Linear
from tilelli_jax.nn.norm import LayerNorm
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.nn.tap import OFF, Recorded, Tap, stacked
from tilelli_jax.nn.unembed import Unembedding
from tilelli_jax.sharding import split_batch

Cache = Any
CHUNK = 1 << 25  # logits, 128 MiB of them, that `nats` makes at once


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Section):
    """How a network is run; nothing here changes what it is."""

    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "type of operands and activations; norms and softmax are in float32")
    scan_layers: bool = setting(
        True, "one compiled block for all layers (compile time does not grow with depth)")
    remat: bool = setting(False, "recompute each block's activations in the backward pass")
    host_tables: bool = setting(False, "tables too large for a device stay on the host, read by row")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype: expected float32 or bfloat16, found {self.dtype!r}")


class Positions(nnx.Module):
    """Learned absolute positions: `table [max_seq_len, d_model]`, f32."""

    def __init__(self, max_seq_len: int, d_model: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(stddev=0.02)
        self.table = nnx.Param(init(rngs.params(), (max_seq_len, d_model), jnp.float32))


class CausalLM(nnx.Module):
    """Tokens in, logits of the next token out: what decoding and signals know of a network.

    `model(ids [batch, time] int) -> logits [batch, time, vocab] f32`.
    """

    places: tuple[str, ...]
    config: Any
    reads_bytes = False  # whether its tokens are bytes, and not a tokenizer's

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """ids `[batch, time]` → logits `[batch, time, vocab]`, f32.

        Args:
            mask: bool `[batch, time]`, which ids count: in each row some that stand together, with
                padding on either side. Where all padding follows its row, none is needed.

        Raises:
            ValueError: ids are not whole numbers `[batch, time]`, or not of the vocabulary (seen
                where they are concrete, not under jit); the mask has another shape or holes; time is longer
                than the table of learned positions.
        """
        ids = jnp.asarray(ids)
        check_ids("ids", ids, self.config.vocab_size)
        if mask is None:
            return self.tapped(ids, OFF)[0]
        if mask.shape != ids.shape:
            raise ValueError(f"mask: expected the shape of ids {list(ids.shape)}, found {list(mask.shape)}")
        if not isinstance(mask, jax.core.Tracer):
            edges = np.diff(np.pad(np.asarray(mask, bool).astype(np.int8), ((0, 0), (1, 0))), axis=1) == 1
            if (edges.sum(1) > 1).any():
                raise ValueError("mask: expected the ids that count to stand together in each row")
        # Rows begin at position 0; what follows them, no causal network sees from within them.
        start = jnp.argmax(jnp.asarray(mask).astype(bool), axis=1)
        return _rolled(self.tapped(_rolled(ids, start), OFF)[0], -start)

    def tapped(self, ids: jax.Array, tap: Tap) -> tuple[jax.Array, Recorded]:
        """The logits, and what the tap recorded (see `nn/tap.py`).

        Values from inside the blocks are `[layers, batch, time, …]`, all others `[batch, time, …]`.
        A tap that edits, or records some layers only, runs the layers one by one instead of as one
        scanned block.

        Raises:
            ValueError: this network has no such place or layer.
        """
        hidden, seen = self._hidden(ids, tap)
        return tap("logits", self._unembedded(hidden), seen), seen

    def nats(self, ids: jax.Array, tap: Tap = OFF) -> tuple[jax.Array, Recorded]:
        """−log p of each next token, in nats, and what the tap recorded.

        ids `[batch, time]` → f32 `[batch, time − 1]`. Where all logits would be more than CHUNK numbers,
        they are made of a few positions at a time, unless the tap records or edits them.

        Raises:
            ValueError: this network has no such place or layer.
        """
        batch, time = ids.shape
        at_once = max(1, CHUNK // (batch * self.config.vocab_size))
        if at_once >= time or "logits" in (*tap.record, *tap.edit):
            logits, seen = self.tapped(ids, tap)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]), seen
        hidden, seen = self._hidden(ids, tap)

        def piece(given: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden, following = given
            logits = self._unembedded(split_batch(hidden))
            return optax.softmax_cross_entropy_with_integer_labels(logits, following)
        n = -(-(time - 1) // at_once)
        found = jax.lax.map(piece, (_pieces(hidden[:, :-1], n), _pieces(ids[:, 1:], n)))
        return jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, :time - 1], seen

    @abc.abstractmethod
    def _hidden(self, ids: jax.Array, tap: Tap) -> tuple[jax.Array, Recorded]:
        """The place `hidden`, `[batch, time, d_model]`, and what the tap recorded up to there."""

    @abc.abstractmethod
    def _unembedded(self, hidden: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` → logits `[batch, time, vocab]`, f32."""

    @abc.abstractmethod
    def unembedding(self) -> Unembedding:
        """How the last stream becomes logits."""

    @abc.abstractmethod
    def prefill(self, ids: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, list[Cache]]:
        """Reads prompts that stand at the head of each row.

        Args:
            ids: `[batch, time]`; what follows a row's length is ignored.
            lengths: `[batch]`, how many ids of each row count.
            size: positions that the cache can hold, ≥ time.

        Returns:
            Logits `[batch, vocab]` after each row's last id, and the caches.
        """

    @abc.abstractmethod
    def step(self, ids: jax.Array, caches: list[Cache],
             position: jax.Array) -> tuple[jax.Array, list[Cache]]:
        """One id `[batch]` at `position [batch]` → logits `[batch, vocab]` and the next caches."""

    def unroll(self) -> None:
        """Makes ready for decoding, where layers that are one by one are the faster ones."""


def check_ids(name: str, ids: jax.Array, vocab_size: int) -> None:
    """Raises ValueError where ids are no `[batch, time]` of the vocabulary, as far as that can be seen."""
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or 0 in ids.shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name}: expected whole numbers [batch, time], found {ids.dtype} {list(ids.shape)}")
    if not isinstance(ids, jax.core.Tracer) and ids.size and ids.is_fully_addressable:
        values = np.asarray(ids)
        low, high = values.min(), values.max()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name}: expected 0 to {vocab_size - 1}, found {low if low < 0 else high}")


def at_last(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """`[batch, time, …]` at each row's last position: `[batch, 1, …]`."""
    last = jnp.maximum(lengths - 1, 0).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.take_along_axis(x, last, axis=1)


def _pieces(x: jax.Array, n: int) -> jax.Array:
    """`[batch, time, …]` in n pieces of equal length, the last one filled up with zeros: `[n, batch, …]`."""
    time = -(-x.shape[1] // n)
    x = jnp.pad(x, ((0, 0), (0, n * time - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], n, time, *x.shape[2:]), 1, 0)


def _rolled(x: jax.Array, by: jax.Array) -> jax.Array:
    """Row b of `[batch, time, …]`, begun at its position by[b]."""
    at = (jnp.arange(x.shape[1]) + by[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


class Decoder(CausalLM):
    """A causal network of equal blocks between an embedding and its unembedding."""

    places: tuple[str, ...] = (  # and those of its blocks
        "embed", "resid_pre", "resid_post", "hidden", "logits")

    def __init__(self, config: Any, block: Callable[[nnx.Rngs], nnx.Module], *, embed: Quantizer,
                 unembed: Quantizer, compute: ComputeConfig, rngs: nnx.Rngs, norm_eps: float = 1e-5):
        dtype = jnp.dtype(compute.dtype)
        self.config = config
        self.compute = compute
        self.embed = Embedding(config.vocab_size, config.d_model, embed, rngs=rngs, dtype=dtype)
        self.positions = (Positions(config.max_seq_len, config.d_model, rngs=rngs)
                          if config.positions == "learned" else None)
        self.blocks = _stack(block, config.n_layers, rngs)
        self.final_norm = LayerNorm(config.d_model, dtype=dtype, eps=norm_eps)
        self.unembed = (None if config.tie_embeddings else
                        Linear(config.d_model, config.vocab_size, unembed, dtype=dtype,
                               result=jnp.float32, rngs=rngs))
        self.abstain = (Linear(config.d_model, 1, Quantizer(), bias=True, dtype=dtype, result=jnp.float32,
                               rngs=rngs) if getattr(config, "abstain_head", False) else None)
        if self.abstain is not None:
            self.places = (*self.places, "abstain")

    def _hidden(self, ids: jax.Array, tap: Tap) -> tuple[jax.Array, Recorded]:
        chex.assert_rank(ids, 2)
        tap.check(self.places, self.config.n_layers)
        seen: Recorded = {}
        x = tap("embed", self._embed(ids, jnp.arange(ids.shape[1])[None]), seen)
        graph, params = self._blocks()

        def layer(tap: Tap, x: jax.Array, params: nnx.State) -> tuple[jax.Array, Recorded]:
            before: Recorded = {}
            x = tap("resid_pre", split_batch(x), before)
            x, inside = nnx.merge(graph, params)(x, tap)
            return tap("resid_post", x, inside), before | inside

        def layer_of(tap: Tap) -> Callable[[jax.Array, nnx.State], tuple[jax.Array, Recorded]]:
            one = functools.partial(layer, tap)
            if self.compute.remat:
                return jax.checkpoint(one, prevent_cse=not self.compute.scan_layers)
            return one

        if self.compute.scan_layers and not isinstance(params, list) and not tap.by_layer:
            x, inside = jax.lax.scan(layer_of(tap), x, params)
        else:
            records = []
            for i, one in enumerate(self._unstacked(params)):
                x, record = layer_of(tap.within(i))(x, one)
                records.append(record)
            inside = stacked(records)
        hidden = tap("hidden", self.final_norm(split_batch(x)), seen)
        if self.abstain is not None and "abstain" in tap.record:
            tap("abstain", self.abstain(hidden)[..., 0], seen)
        return hidden, seen | inside

    def unembedding(self) -> Unembedding:
        """See `CausalLM`."""
        if self.unembed is None:
            return Unembedding(self.final_norm, self.embed.quantized(), dtype=self.embed.dtype)
        return Unembedding(self.final_norm, self.unembed.quantized(), by_column=True,
                           dtype=self.unembed.dtype)

    def prefill(self, ids: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, list[Cache]]:
        x = self._embed(ids, jnp.arange(ids.shape[1])[None])
        caches = []
        for block in self.layers():
            x, cache = block.prefill(x, lengths, size)
            caches.append(cache)
        return self._logits(at_last(x, lengths))[:, 0], caches

    def step(self, ids: jax.Array, caches: list[Cache],
             position: jax.Array) -> tuple[jax.Array, list[Cache]]:
        x = self._embed(ids[:, None], position[:, None])
        following = []
        for block, cache in zip(self.layers(), caches, strict=True):
            x, cache = block.step(x, cache, position)
            following.append(cache)
        return self._logits(x)[:, 0], following

    def layers(self) -> list[Any]:
        """The blocks one by one. Decoding is unrolled: a scan would copy its cache at every byte."""
        graph, params = self._blocks()
        return [nnx.merge(graph, one) for one in self._unstacked(params)]

    def unroll(self) -> None:
        """Keeps the blocks one by one from here on: inside a loop that decodes, stacked parameters
        would be cut apart, that is copied, for every byte."""
        self.blocks = nnx.List(self.layers())

    def _blocks(self) -> tuple[Any, Any]:
        """The structure of one block, and the parameters: stacked, or a list once unrolled."""
        if isinstance(self.blocks, nnx.List):
            return nnx.graphdef(self.blocks[0]), [nnx.state(block) for block in self.blocks]
        return nnx.split(self.blocks)

    def _unstacked(self, params: Any) -> list[nnx.State]:
        return params if isinstance(params, list) else _unstack(params, self.config.n_layers)

    def _embed(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(ids)
        if self.positions is None:
            return x
        if ids.shape[1] > self.config.max_seq_len:
            raise ValueError(f"time {ids.shape[1]} is longer than max_seq_len {self.config.max_seq_len}")
        return x + self.positions.table[...][positions].astype(x.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        return self._unembedded(self.final_norm(split_batch(x)))

    def _unembedded(self, hidden: jax.Array) -> jax.Array:
        return self.embed.attend(hidden) if self.unembed is None else self.unembed(hidden)


def _stack(block: Callable[[nnx.Rngs], nnx.Module], n_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """n_layers blocks, each with its own random key, as one module of stacked parameters."""
    graphs: list[nnx.GraphDef] = []

    def one(key: jax.Array) -> nnx.State:
        graph, params = nnx.split(block(nnx.Rngs(key)))
        graphs.append(graph)  # static: traced once for all layers
        return params
    params = jax.vmap(one)(jax.random.split(rngs.params(), n_layers))
    return nnx.merge(graphs[0], params)


def _unstack(params: nnx.State, n_layers: int) -> list[nnx.State]:
    """The layers' parameters one by one.

    By one split, whose gradient is one concatenation; the gradient of n_layers separate slices
    would be a sum of n_layers arrays as large as all layers together.
    """
    leaves, treedef = jax.tree.flatten(params)
    columns = [[part[0] for part in jax.lax.split(leaf, [1] * n_layers)] for leaf in leaves]
    return [jax.tree.unflatten(treedef, layer) for layer in zip(*columns, strict=True)]
