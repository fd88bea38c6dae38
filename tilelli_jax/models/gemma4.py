"""Gemma 4's text decoder: E2B, E4B, 31B, and the mixture of experts 26B-A4B.

It differs from a plain transformer with pre- and post-norms in

- two kinds of layers: `sliding` (a window of keys) and `full` (all keys; wider heads, rotary positions
  on a quarter of the channels),
- per-layer embeddings: a second, wide table gives each layer a separate vector for every token,
- shared keys: the last layers compute no keys; they use those of the last earlier layer of the same kind,
- a scalar factor at the end of each layer, and logits capped by tanh.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import CausalLM, ComputeConfig, at_last
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.nn.attention import ALL, KeyCache, grouped_attention, in_window, n_positions, swap
from tilelli_jax.nn.dense import GatedFeedForward
from tilelli_jax.nn.experts import Experts, TopKRouter
from tilelli_jax.nn.hooks import OFF, Recorded, Tap, stacked
from tilelli_jax.nn.host_embedding import HostEmbedding
from tilelli_jax.nn.linear import Buffer, Embedding, Linear
from tilelli_jax.nn.norm import RMSNorm, rms_normalized
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.nn.rotary import frequencies, rotate
from tilelli_jax.nn.unembed import Unembedding
from tilelli_jax.parallel.sharding import split_batch
from tilelli_jax.pretrained.gemma4 import GEMMA4

Kind = Literal["sliding", "full"]


@dataclasses.dataclass(frozen=True)
class Gemma4Config(Section):
    """Gemma 4; the defaults are E4B's."""

    family: Literal["gemma4"] = setting("gemma4", "network family")
    vocab_size: int = setting(262144, "number of tokens", min=1)
    d_model: int = setting(2560, "width of the residual stream", min=1)
    layers: tuple[Kind, ...] = setting((*("sliding",) * 5, "full") * 7, "kind of each layer: sliding or full")
    max_seq_len: int = setting(131072, "longest context recorded in training, in tokens", min=1)
    positions: Literal["rotary"] = setting("rotary", "position encoding")
    tie_embeddings: bool = setting(True, "unembed with the embedding table")
    n_heads: int = setting(8, "number of attention heads", min=1)
    n_kv_heads: int = setting(2, "number of key and value heads in sliding layers", min=1)
    d_head: int = setting(256, "width of a head in sliding layers", min=1)
    n_kv_heads_full: int = setting(2, "number of key and value heads in full layers", min=1)
    d_head_full: int = setting(512, "width of a head in full layers", min=1)
    window: int = setting(512, "number of most recent keys that a query of a sliding layer attends to", min=1)
    n_shared_layers: int = setting(18, "number of last layers that use the keys of earlier layers", min=0)
    key_is_value: bool = setting(False, "compute keys and values of full layers with the same projection")
    rotary_theta: float = setting(10000.0, "base of the rotary frequencies in sliding layers", above=0)
    rotary_theta_full: float = setting(1000000.0, "base of the rotary frequencies in full layers", above=0)
    rotary_fraction_full: float = setting(0.25, "fraction of the channels rotated in full layers",
                                          above=0, max=1)
    d_hidden: int = setting(10240, "hidden width of the feed-forward network", min=1)
    double_wide: bool = setting(False, "double the hidden width in layers with shared keys")
    d_per_layer: int = setting(256, "width of the per-layer embeddings; 0: no per-layer embeddings", min=0)
    vocab_per_layer: int = setting(262144, "number of tokens with per-layer embeddings", min=1)
    n_experts: int = setting(0, "number of experts in addition to the feed-forward network; 0: no experts",
                             min=0)
    experts_per_token: int = setting(0, "number of experts used by each token", min=0)
    d_expert: int = setting(0, "hidden width of an expert", min=0)
    softcap: float = setting(30.0, "soft cap on the absolute value of logits; 0: no cap", min=0)
    norm_eps: float = setting(1e-6, "epsilon added to the mean square in RMSNorm", min=0)
    bos_id: int | None = setting(2, "id of the token that begins a text; null: none", min=0)
    end_ids: tuple[int, ...] = setting((1,), "ids of the tokens that end a text")
    quantizer: Literal["none"] = setting("none", "weight quantiser; this family supports none only")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers or self.layers[-1] != "full":
            raise InputError("layers: expected at least one layer, the last of kind full")
        if missing := set(self.layers) - set(self.layers[:self.n_own]):
            raise InputError(f"n_shared_layers: expected a layer of kind {min(missing)} before the last "
                             f"{self.n_shared_layers} layers, which share its keys")
        for heads in (self.n_kv_heads, self.n_kv_heads_full):
            if self.n_heads % heads:
                raise InputError(f"n_heads: expected a multiple of {heads} key heads, found {self.n_heads}")
        if self.n_experts and not (1 <= self.experts_per_token <= self.n_experts and self.d_expert):
            raise InputError(f"experts_per_token: expected 1 to {self.n_experts}, and d_expert ≥ 1; "
                             f"found {self.experts_per_token} and {self.d_expert}")

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_own(self) -> int:
        """Number of layers, from the first, that compute their own keys."""
        return len(self.layers) - self.n_shared_layers

    def source(self, layer: int) -> int:
        """The layer whose keys `layer` attends to."""
        if layer < self.n_own:
            return layer
        return max(i for i in range(self.n_own) if self.layers[i] == self.layers[layer])


class Attention(nnx.Module):
    """Grouped-query attention with normalised queries, keys and values, without scaling of the scores."""

    def __init__(self, config: Gemma4Config, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        full = config.layers[layer] == "full"
        d_head = config.d_head_full if full else config.d_head
        inner = d_head * (config.n_kv_heads_full if full else config.n_kv_heads)
        make = functools.partial(Linear, quantizer=Quantizer(), dtype=dtype, rngs=rngs)
        norm = functools.partial(RMSNorm, d_head, dtype=dtype, eps=config.norm_eps)
        self.query, self.query_norm = make(config.d_model, config.n_heads * d_head), norm()
        if config.source(layer) == layer:
            self.key, self.key_norm = make(config.d_model, inner), norm()
            self.value = None if full and config.key_is_value else make(config.d_model, inner)
        self.out = make(config.n_heads * d_head, config.d_model)
        self.inverse_frequencies = tuple((
            frequencies(d_head, config.rotary_theta_full,
                        pairs=int(config.rotary_fraction_full * d_head / 2))
            if full else frequencies(d_head, config.rotary_theta)).tolist())  # static: part of the program
        self.d_head, self.eps, self.dtype = d_head, config.norm_eps, dtype

    @jax.named_scope("attention")
    def keys(self, x: jax.Array, positions: jax.Array) -> KeyCache:
        """Keys and values of `[batch, time, d_model]`, each `[batch, kv_heads, time, d_head]`."""
        raw = self._heads(self.key(x))
        values = raw if self.value is None else self._heads(self.value(x))
        keys = rotate(self.key_norm(raw), positions, jnp.array(self.inverse_frequencies))
        return KeyCache(swap(keys), swap(rms_normalized(values, self.eps).astype(self.dtype)))

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, positions: jax.Array, cache: KeyCache, visible: jax.Array) -> jax.Array:
        """x `[batch, q, d_model]`; visible, bool `[batch or 1, q, k]`: which keys a query may attend to."""
        query = rotate(self.query_norm(self._heads(self.query(x))), positions,
                       jnp.array(self.inverse_frequencies))
        attended = grouped_attention(query, cache, visible, dtype=self.dtype)
        return self.out(attended.reshape(*query.shape[:2], -1))

    def _heads(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], -1, self.d_head)


class PerLayerInput(nnx.Module):
    """x ← x + norm((gelu(x · gate) ⊙ per-layer embedding) · out)."""

    def __init__(self, config: Gemma4Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate = Linear(config.d_model, config.d_per_layer, Quantizer(), dtype=dtype, rngs=rngs)
        self.out = Linear(config.d_per_layer, config.d_model, Quantizer(), dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(config.d_model, dtype=dtype, eps=config.norm_eps)

    @jax.named_scope("per_layer_input")
    def __call__(self, x: jax.Array, embedded: jax.Array) -> jax.Array:
        """`[batch, time, d_model]` and `[batch, time, d_per_layer]` → the update of x, shape of x."""
        return self.norm(self.out(jax.nn.gelu(self.gate(x)) * embedded))


class Block(nnx.Module):
    """One layer; each update is normalised before it is added to the residual stream.

    x ← x + norm(attention(norm(x)));  x ← x + norm(MLP(norm(x)));  x ← x + per-layer write;  x ← x · scalar
    """

    def __init__(self, config: Gemma4Config, layer: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.d_model, dtype=dtype, eps=config.norm_eps)
        wide = config.double_wide and config.source(layer) != layer
        self.norm1, self.attention, self.attention_norm = (
            norm(), Attention(config, layer, dtype=dtype, rngs=rngs), norm())
        self.norm2, self.mlp_norm = norm(), norm()
        self.mlp = GatedFeedForward(config.d_model, config.d_hidden * (1 + wide), Quantizer(), dtype=dtype,
                                    rngs=rngs)
        self.router = (TopKRouter(config.d_model, config.n_experts, config.experts_per_token,
                                  eps=config.norm_eps, dtype=dtype, rngs=rngs) if config.n_experts else None)
        if config.n_experts:
            self.experts = Experts(config.d_model, config.d_expert, config.n_experts, dtype=dtype, rngs=rngs)
            self.dense_norm, self.experts_in_norm, self.experts_norm = norm(), norm(), norm()
        self.per_layer = PerLayerInput(config, dtype=dtype, rngs=rngs) if config.d_per_layer else None
        self.scalar = Buffer(jnp.ones(1))

    def __call__(self, x: jax.Array, h: jax.Array, positions: jax.Array, keys: KeyCache, visible: jax.Array,
                 embedded: jax.Array | None, tap: Tap, recorded: Recorded) -> jax.Array:
        """Returns the stream after the block.

        Args:
            h: norm1(x).
            keys: the keys and values that attention uses.
            embedded: the per-layer embeddings of this layer, `[batch, time, d_per_layer]`.
        """
        attended = self.attention_norm(self.attention(h, positions, keys, visible))
        x = tap("resid_mid", x + tap("attn_out", attended, recorded), recorded)
        x = x + tap("mlp_write", self.mlp_norm(self._feed_forward(x, tap, recorded)), recorded)
        if self.per_layer is not None and embedded is not None:
            x = x + tap("ple_write", self.per_layer(x, embedded), recorded)
        return x * self.scalar[...].astype(x.dtype)

    def _feed_forward(self, x: jax.Array, tap: Tap, recorded: Recorded) -> jax.Array:
        dense = self.mlp(self.norm2(x))
        if self.router is None:
            return dense
        weights, experts = self.router.choose(tap("router", self.router(x), recorded))
        mixed = self.experts(self.experts_in_norm(x), weights, experts)
        return self.dense_norm(dense) + self.experts_norm(mixed)


class FlaxGemma4ForCausalLM(PretrainedModel, CausalLM):
    """ids `[batch, time]` → logits `[batch, time, vocab]`, f32.

    The layers differ, so they are neither stacked nor scanned; `compute.scan_layers` and `compute.remat`
    have no effect. With `compute.host_tables` the table of per-layer embeddings (a third of E4B) stays in
    host memory and is read by row.
    """

    hugging_face, config_class = GEMMA4, Gemma4Config

    def __init__(self, config: Gemma4Config, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        compute = compute or ComputeConfig()
        dtype = jnp.dtype(compute.dtype)
        self.config, self.compute, self.dtype = config, compute, dtype
        self.embed = Embedding(config.vocab_size, config.d_model, Quantizer(), dtype=dtype, rngs=rngs)
        if config.d_per_layer:
            width = config.n_layers * config.d_per_layer
            self.embed_per_layer = (
                HostEmbedding(config.vocab_per_layer, width, dtype=dtype) if compute.host_tables else
                Embedding(config.vocab_per_layer, width, Quantizer(), dtype=dtype, rngs=rngs))
            self.project_per_layer = Linear(config.d_model, width, Quantizer(), dtype=dtype, rngs=rngs)
            self.per_layer_norm = RMSNorm(config.d_per_layer, dtype=dtype, eps=config.norm_eps)
        self.blocks = nnx.List([Block(config, i, dtype=dtype, rngs=rngs) for i in range(config.n_layers)])
        self.final_norm = RMSNorm(config.d_model, dtype=dtype, eps=config.norm_eps)
        self.unembed = (None if config.tie_embeddings else
                        Linear(config.d_model, config.vocab_size, Quantizer(), dtype=dtype,
                               result=jnp.float32, rngs=rngs))
        self.hooks = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_write",
                       *(("router",) if config.n_experts else ()),
                       *(("ple_write",) if config.d_per_layer else ()), "resid_post", "hidden", "logits")

    def _hidden(self, ids: jax.Array, tap: Tap) -> tuple[jax.Array, Recorded]:
        chex.assert_rank(ids, 2)
        tap.check(self.hooks, self.config.n_layers)
        outside: Recorded = {}
        x, embedded = self._embed(ids)
        x = tap("embed", x, outside)
        positions = jnp.arange(ids.shape[1])[None]
        x, records = self._run(range(self.config.n_layers), x, embedded, positions, {}, tap)
        hidden = tap("hidden", self.final_norm(x), outside)
        return hidden, outside | stacked(records)

    def unembedding(self) -> Unembedding:
        """See `CausalLM`."""
        cap = self.config.softcap or None
        if self.unembed is None:
            return Unembedding(self.final_norm, self.embed.quantized(), cap=cap, dtype=self.dtype)
        return Unembedding(self.final_norm, self.unembed.quantized(), by_column=True, cap=cap,
                           dtype=self.dtype)

    def longest_prefix(self) -> int:
        """See `CausalLM`."""
        return self.config.window if "sliding" in self.config.layers else ALL

    def prefill_tapped(self, ids: jax.Array, lengths: jax.Array, size: int, tap: Tap,
                       prefix: list[KeyCache] | None = None
                       ) -> tuple[jax.Array, list[KeyCache], Recorded]:
        """See `CausalLM`. There is one cache for each layer that computes its own keys.

        Without a tap, the later layers run for the last positions only, because no layer uses their other
        positions.
        """
        tap.check(self.hooks, self.config.n_layers)
        n_own, n_layers = self.config.n_own, self.config.n_layers
        start = 0 if prefix is None else n_positions(prefix[0])
        x, embedded = self._embed(ids)
        keys: dict[int, KeyCache] = {}
        positions = start + jnp.arange(ids.shape[1])[None]
        x, records = self._run(range(n_own), x, embedded, positions, keys, tap, prefix=prefix)
        if not (tap.record or tap.edit):
            x, positions = at_last(x, lengths), start + lengths[:, None] - 1
            embedded = None if embedded is None else at_last(embedded, lengths)
        x, later = self._run(range(n_own, n_layers), x, embedded, positions, keys, tap)
        if x.shape[1] > 1:
            x = at_last(x, lengths)
        slots = {"sliding": min(size, self.config.window), "full": size}
        caches = [KeyCache.of_prompts(*keys[i], start + lengths, slots[self.config.layers[i]])
                  for i in range(n_own)]
        return self._logits(x)[:, 0], caches, stacked([*records, *later])

    def step_with_streams(self, ids: jax.Array, caches: list[KeyCache], position: jax.Array
                          ) -> tuple[jax.Array, list[KeyCache], jax.Array]:
        """See `CausalLM`."""
        x, embedded = self._embed(ids[:, None])
        updated: dict[int, KeyCache] = {}
        x, records = self._run(range(self.config.n_layers), x, embedded, position[:, None], updated,
                               Tap(record=("resid_post",)), caches)
        streams = jnp.stack([record["resid_post"][:, 0] for record in records])
        return self._logits(x)[:, 0], [updated[i] for i in range(self.config.n_own)], streams

    def _run(self, layers: range, x: jax.Array, embedded: jax.Array | None, positions: jax.Array,
             keys: dict[int, KeyCache], tap: Tap = OFF, caches: list[KeyCache] | None = None,
             prefix: list[KeyCache] | None = None) -> tuple[jax.Array, list[Recorded]]:
        """Runs some layers in order.

        Args:
            keys: receives the keys and values that each layer that computes its own attends to.
            caches: when decoding, those of the earlier positions; `positions` is then `[batch, 1]`.
            prefix: caches of the positions before, see `prefill`.
        """
        records: list[Recorded] = []
        for i in layers:
            block, source, layer_tap = self.blocks[i], self.config.source(i), tap.within(i)
            records.append({})
            with jax.named_scope(f"block_{i}"):
                x = layer_tap("resid_pre", split_batch(x), records[-1])
                h = block.norm1(x)
                if source == i:
                    new = block.attention.keys(h, positions)
                    keys[i] = (new.after(None if prefix is None else prefix[i]) if caches is None
                               else caches[i].write(*new, positions[:, 0]))
                if caches is None:
                    window = ALL if self.config.layers[i] == "full" else self.config.window
                    visible = in_window(positions, keys[source].keys.shape[2], window)
                else:
                    visible = keys[source].filled(positions[:, 0])[:, None]
                layer_embedded = None if embedded is None else embedded[:, :, i]
                x = block(x, h, positions, keys[source], visible, layer_embedded, layer_tap, records[-1])
                x = layer_tap("resid_post", x, records[-1])
        return split_batch(x), records

    @jax.named_scope("embedding")
    def _embed(self, ids: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Embeddings `[batch, time, d_model]` and per-layer inputs `[batch, time, layers, d_per_layer]`."""
        config = self.config
        x = self.embed(ids) * jnp.asarray(config.d_model**0.5, self.dtype)
        if not config.d_per_layer:
            return x, None
        shape = (*ids.shape, config.n_layers, config.d_per_layer)
        token = self.embed_per_layer(ids).reshape(shape) * jnp.asarray(config.d_per_layer**0.5, self.dtype)
        context = self.per_layer_norm((self.project_per_layer(x) * config.d_model**-0.5).reshape(shape))
        return x, (context + token) * 2**-0.5

    def _logits(self, x: jax.Array) -> jax.Array:
        return self._unembedded(self.final_norm(x))

    @jax.named_scope("unembedding")
    def _unembedded(self, hidden: jax.Array) -> jax.Array:
        logits = self.embed.attend(hidden) if self.unembed is None else self.unembed(hidden)
        cap = self.config.softcap
        return cap * jnp.tanh(logits / cap) if cap else logits
