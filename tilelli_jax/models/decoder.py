"""The base class of causal language models with identical blocks.

A block is a module with three methods that compute the same function:
    block(x, tap)                    → y, recorded  the whole sequence at once
    block.prefill(x, lengths, size)  → y, cache, recorded  the whole sequence, and the cache for decoding;
                                                    `tap=`, and `prefix=`: a cache of positions before it
    block.step(x, cache, position)   → y, cache     one more position
The blocks' parameters are stacked: every array has a leading axis of n_layers. Blocks whose layers differ in
more than their parameters get those inputs as one more argument of each method (`Decoder.per_layer_inputs`).

Profiles name the operations by scopes: `embedding`, `blocks` (`block_3` where layers run separately), inside
them `norm`, `attention`, `mlp`, `router` and the pathways' names, then `unembedding` and `loss`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.models.causal_lm import Cache, CausalLM, ComputeConfig, at_last
from tilelli_jax.nn.attention import ALL, n_positions
from tilelli_jax.nn.hooks import Recorded, Tap, stacked
from tilelli_jax.nn.linear import Embedding, Linear
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.nn.unembed import Unembedding
from tilelli_jax.parallel.sharding import split_batch


class Positions(nnx.Module):
    """Learned absolute positions: `table [max_seq_len, d_model]`, f32."""

    def __init__(self, max_seq_len: int, d_model: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(stddev=0.02)
        self.table = nnx.Param(init(rngs.params(), (max_seq_len, d_model), jnp.float32))


class Decoder(CausalLM):
    """A causal network of identical blocks between an embedding and an unembedding."""

    hooks: tuple[str, ...] = (  # subclasses add the hooks inside their blocks
        "embed", "resid_pre", "resid_post", "hidden", "logits")

    def __init__(self, config: Any, block: Callable[[nnx.Rngs], nnx.Module], *,
                 final_norm: nnx.Module, compute: ComputeConfig, rngs: nnx.Rngs,
                 embed: Quantizer = Quantizer(), unembed: Quantizer = Quantizer()):  # noqa: B008
        dtype = jnp.dtype(compute.dtype)
        self.config = config
        self.compute = compute
        self.embed = Embedding(config.vocab_size, config.d_model, embed, rngs=rngs, dtype=dtype)
        self.positions = (Positions(config.max_seq_len, config.d_model, rngs=rngs)
                          if config.positions == "learned" else None)
        self.blocks = _stack(block, config.n_layers, rngs)
        self.final_norm: Any = final_norm
        self.unembed = (None if config.tie_embeddings else
                        Linear(config.d_model, config.vocab_size, unembed, dtype=dtype,
                               result=jnp.float32, rngs=rngs))
        self.abstain = (Linear(config.d_model, 1, Quantizer(), bias=True, dtype=dtype, result=jnp.float32,
                               rngs=rngs) if getattr(config, "abstain_head", False) else None)
        if self.abstain is not None:
            self.hooks = (*self.hooks, "abstain")

    def per_layer_inputs(self) -> tuple[Any, ...]:
        """What differs between the layers besides their parameters, as one NumPy pytree whose arrays have a
        leading axis of n_layers; empty if nothing does."""
        return ()

    def _hidden(self, ids: jax.Array, tap: Tap) -> tuple[jax.Array, Recorded]:
        chex.assert_rank(ids, 2)
        tap.check(self.hooks, self.config.n_layers)
        recorded: Recorded = {}
        x = tap("embed", self._embed(ids, jnp.arange(ids.shape[1])[None]), recorded)
        graph, params = self._blocks()

        def layer(tap: Tap, x: jax.Array, layer_inputs: tuple[nnx.State, Any]) -> tuple[jax.Array, Recorded]:
            params, inputs = layer_inputs
            before: Recorded = {}
            x = tap("resid_pre", split_batch(x), before)
            x, inside = nnx.merge(graph, params)(x, tap, *inputs)
            return tap("resid_post", x, inside), before | inside

        def layer_of(tap: Tap) -> Callable[[jax.Array, Any], tuple[jax.Array, Recorded]]:
            with_tap = functools.partial(layer, tap)
            if self.compute.remat:
                return jax.checkpoint(with_tap, prevent_cse=not self.compute.scan_layers)
            return with_tap

        if self.compute.scan_layers and not isinstance(params, list) and not tap.by_layer:
            with jax.named_scope("blocks"):
                x, inside = jax.lax.scan(layer_of(tap), x, (params, self.per_layer_inputs()))
        else:
            records = []
            layers = zip(self._unstacked(params), self._by_layer(), strict=True)
            for i, layer_inputs in enumerate(layers):
                with jax.named_scope(f"block_{i}"):
                    x, record = layer_of(tap.within(i))(x, layer_inputs)
                records.append(record)
            inside = stacked(records)
        hidden = tap("hidden", self.final_norm(split_batch(x)), recorded)
        if self.abstain is not None and "abstain" in tap.record:
            tap("abstain", self.abstain(hidden)[..., 0], recorded)
        return hidden, recorded | inside

    def unembedding(self) -> Unembedding:
        """See `CausalLM`."""
        if self.unembed is None:
            return Unembedding(self.final_norm, self.embed.quantized(), dtype=self.embed.dtype)
        return Unembedding(self.final_norm, self.unembed.quantized(), by_column=True,
                           dtype=self.unembed.dtype)

    def longest_prefix(self) -> int:
        """See `CausalLM`. Blocks that keep more than keys and values override it."""
        inputs = self.per_layer_inputs()
        return int(np.min(inputs[0].window)) if inputs else ALL

    def prefill_tapped(self, ids: jax.Array, lengths: jax.Array, size: int, tap: Tap,
                       prefix: list[Cache] | None = None) -> tuple[jax.Array, list[Cache], Recorded]:
        tap.check(self.hooks, self.config.n_layers)
        start = 0 if prefix is None else n_positions(prefix[0])
        x = self._embed(ids, start + jnp.arange(ids.shape[1])[None])
        caches, records = [], []
        for i, (block, inputs) in enumerate(zip(self.layers(), self._by_layer(), strict=True)):
            before: Recorded = {}
            layer_tap = tap.within(i)
            with jax.named_scope(f"block_{i}"):
                x = layer_tap("resid_pre", x, before)
                x, cache, inside = block.prefill(x, lengths, size, *inputs, tap=layer_tap,
                                                 prefix=None if prefix is None else prefix[i])
                x = layer_tap("resid_post", x, inside)
            caches.append(cache)
            records.append(before | inside)
        return self._logits(at_last(x, lengths))[:, 0], caches, stacked(records)

    def step_with_streams(self, ids: jax.Array, caches: list[Cache], position: jax.Array
                          ) -> tuple[jax.Array, list[Cache], jax.Array]:
        x = self._embed(ids[:, None], position[:, None])
        updated, streams = [], []
        layers = zip(self.layers(), caches, self._by_layer(), strict=True)
        for i, (block, cache, inputs) in enumerate(layers):
            with jax.named_scope(f"block_{i}"):
                x, cache = block.step(x, cache, position, *inputs)
            updated.append(cache)
            streams.append(x[:, 0])
        return self._logits(x)[:, 0], updated, jnp.stack(streams)

    def layers(self) -> list[Any]:
        """The separate blocks. Decoding is unrolled: a scan would copy its cache for every byte."""
        graph, params = self._blocks()
        return [nnx.merge(graph, layer_params) for layer_params in self._unstacked(params)]

    def unroll(self) -> None:
        """Stores the blocks separately from now on. A decoding loop would slice, and so copy, stacked
        parameters for every byte."""
        self.blocks = nnx.List(self.layers())

    def _blocks(self) -> tuple[Any, Any]:
        """The structure of one block, and the parameters: stacked, or a list after `unroll`."""
        if isinstance(self.blocks, nnx.List):
            return nnx.graphdef(self.blocks[0]), [nnx.state(block) for block in self.blocks]
        return nnx.split(self.blocks)

    def _by_layer(self) -> list[tuple[Any, ...]]:
        """The inputs of each layer."""
        return [jax.tree.map(lambda array, i=i: array[i], self.per_layer_inputs())
                for i in range(self.config.n_layers)]

    def _unstacked(self, params: Any) -> list[nnx.State]:
        return params if isinstance(params, list) else _unstack(params, self.config.n_layers)

    @jax.named_scope("embedding")
    def _embed(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed(ids)
        if self.positions is None:
            return x
        if ids.shape[1] > self.config.max_seq_len:
            raise ValueError(f"time {ids.shape[1]} is longer than max_seq_len {self.config.max_seq_len}")
        return x + self.positions.table[...][positions].astype(x.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        return self._unembedded(self.final_norm(split_batch(x)))

    @jax.named_scope("unembedding")
    def _unembedded(self, hidden: jax.Array) -> jax.Array:
        return self.embed.attend(hidden) if self.unembed is None else self.unembed(hidden)


def _stack(block: Callable[[nnx.Rngs], nnx.Module], n_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """n_layers blocks, each with its own random key, as one module of stacked parameters."""
    graphs: list[nnx.GraphDef] = []

    def init(key: jax.Array) -> nnx.State:
        graph, params = nnx.split(block(nnx.Rngs(key)))
        graphs.append(graph)  # static: traced once for all layers
        return params
    params = jax.vmap(init)(jax.random.split(rngs.params(), n_layers))
    return nnx.merge(graphs[0], params)


def _unstack(params: nnx.State, n_layers: int) -> list[nnx.State]:
    """The separate parameters of each layer.

    Uses one split, whose gradient is one concatenation. The gradient of n_layers slices would be a sum of
    n_layers arrays, each as large as all layers together.
    """
    leaves, treedef = jax.tree.flatten(params)
    columns = [[part[0] for part in jax.lax.split(leaf, [1] * n_layers)] for leaf in leaves]
    return [jax.tree.unflatten(treedef, layer) for layer in zip(*columns, strict=True)]
