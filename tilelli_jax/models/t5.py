"""T5 (Raffel et al. 2020, arXiv:1910.10683), encoder and decoder. Chronos uses this network."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.models.causal_lm import ComputeConfig, check_ids
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.nn.attention import KeyCache
from tilelli_jax.nn.dense import ACTIVATIONS, FeedForward, GatedFeedForward
from tilelli_jax.nn.hooks import OFF, Recorded, Tap, stacked
from tilelli_jax.nn.linear import Embedding, Linear
from tilelli_jax.nn.matmul import contract
from tilelli_jax.nn.norm import RMSNorm
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.parallel.sharding import split_batch
from tilelli_jax.pretrained.t5 import T5


@dataclasses.dataclass(frozen=True)
class ChronosConfig(Section):
    """Tokenizer of time series, and sampling of forecasts."""

    context_length: int = setting(512, "number of most recent values of a series that are encoded", min=1)
    prediction_length: int = setting(
        64, "number of values sampled in one pass; longer forecasts append their median to the series", min=1)
    n_tokens: int = setting(4096, "number of tokens, including special tokens", min=5)
    n_special_tokens: int = setting(2, "number of special tokens: padding and end", min=2)
    low_limit: float = setting(-15.0, "centre of the lowest bin, in units of the series' mean absolute value")
    high_limit: float = setting(15.0, "centre of the highest bin, in the same unit as low_limit")
    num_samples: int = setting(20, "number of forecasts sampled for each series", min=1)
    temperature: float = setting(1.0, "softmax temperature of sampling", min=0)
    top_k: int = setting(50, "sample among the k most likely tokens; 0: among all", min=0)
    top_p: float = setting(1.0, "sample among the most likely tokens with this total probability",
                           above=0, max=1)


@dataclasses.dataclass(frozen=True)
class T5Config(Section):
    """T5; the defaults are Chronos-T5-base's."""

    family: Literal["t5"] = setting("t5", "network family")
    vocab_size: int = setting(4096, "number of tokens", min=1)
    d_model: int = setting(768, "width of the residual streams", min=1)
    n_layers: int = setting(12, "number of encoder blocks", min=1)
    n_decoder_layers: int = setting(12, "number of decoder blocks", min=1)
    n_heads: int = setting(12, "number of attention heads", min=1)
    d_head: int = setting(64, "width of a head", min=1)
    d_hidden: int = setting(3072, "hidden width of the feed-forward networks", min=1)
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = setting(
        "relu", "activation of the feed-forward networks")
    gated: bool = setting(False, "multiply the activation by a second linear layer, as in T5 1.1 and Flan-T5")
    n_buckets: int = setting(32, "number of buckets of relative positions", min=4)
    max_distance: int = setting(128, "distance, in tokens, from which on all positions share the last bucket",
                                min=1)
    norm_eps: float = setting(1e-6, "epsilon added to the mean square in RMSNorm", min=0)
    tie_embeddings: bool = setting(True, "unembed with the embedding table")
    scale_decoder_outputs: bool | None = setting(
        None, "scale the decoder's output by 1/√d_model before unembedding; null: if the embeddings are tied")
    start_id: int = setting(0, "id of the decoder's first input token", min=0)
    end_id: int = setting(1, "id of the token that ends a sequence", min=0)
    chronos: ChronosConfig | None = setting(None, "tokenizer of time series; null: not a Chronos network")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_decoder_outputs is None:
            object.__setattr__(self, "scale_decoder_outputs", self.tie_embeddings)


def bucket_of(distance: jax.Array, *, bidirectional: bool, n_buckets: int, max_distance: int) -> jax.Array:
    """The bucket of the distance key position − query position, int32, same shape.

    Half of the buckets hold one distance each; the others are logarithmic, up to max_distance. If
    bidirectional, keys after the query use the second half of all buckets.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        n_buckets //= 2
        offset = jnp.where(distance > 0, n_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = n_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    wide = exact + (ratio * (n_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(wide, n_buckets - 1))


class RelativeBias(nnx.Module):
    """Relative position bias added to the attention scores of each head: `table [buckets, heads]`, f32."""

    def __init__(self, config: T5Config, *, bidirectional: bool, rngs: nnx.Rngs):
        init = nnx.initializers.normal(stddev=config.d_model**-0.5)
        self.table = nnx.Param(init(rngs.params(), (config.n_buckets, config.n_heads), jnp.float32))
        self.bucket = functools.partial(bucket_of, bidirectional=bidirectional, n_buckets=config.n_buckets,
                                        max_distance=config.max_distance)

    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Positions `[batch or 1, q]` and `[k]` → `[batch or 1, heads, q, k]`."""
        buckets = self.bucket(keys[None, None, :] - queries[:, :, None])
        return jnp.moveaxis(self.table[...][buckets], -1, 1)


class Attention(nnx.Module):
    """Multi-head attention without scaling of the scores and without biases in its linear layers."""

    def __init__(self, config: T5Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inner = config.n_heads * config.d_head
        make = functools.partial(Linear, quantizer=Quantizer(), dtype=dtype, rngs=rngs)
        self.query, self.key, self.value = (make(config.d_model, inner) for _ in range(3))
        self.out = make(inner, config.d_model)
        self.n_heads = config.n_heads
        self.dtype = dtype

    @jax.named_scope("attention")
    def keys(self, x: jax.Array) -> KeyCache:
        """Keys and values of `[batch, time, d_model]`: each `[batch, heads, time, d_head]`."""
        return KeyCache(self._heads(self.key(x)), self._heads(self.value(x)))

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, cache: KeyCache, bias: jax.Array) -> jax.Array:
        """x `[batch, q, d_model]`; bias `[batch or 1, heads or 1, q, k]`, -inf for masked keys."""
        query = self._heads(self.query(x))
        scores = contract("bhqd,bhkd->bhqk", query, cache.keys, dtype=self.dtype, result=jnp.float32)
        weights = jax.nn.softmax(scores + bias)
        attended = contract("bhqk,bhkd->bhqd", weights, cache.values, dtype=self.dtype)
        return self.out(jnp.swapaxes(attended, 1, 2).reshape(*x.shape[:2], -1))

    def _heads(self, y: jax.Array) -> jax.Array:
        return jnp.swapaxes(y.reshape(*y.shape[:2], self.n_heads, -1), 1, 2)


class Block(nnx.Module):
    """x ← x + attention(norm(x)); in the decoder x ← x + cross-attention(norm(x)); x ← x + MLP(norm(x))."""

    def __init__(self, config: T5Config, part: Literal["encoder", "decoder"], *, dtype: jnp.dtype,
                 rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, config.d_model, dtype=dtype, eps=config.norm_eps)
        self.norm1, self.attention = norm(), Attention(config, dtype=dtype, rngs=rngs)
        if part == "decoder":
            self.norm_cross, self.cross = norm(), Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = norm()
        self.mlp = (GatedFeedForward if config.gated else FeedForward)(
            config.d_model, config.d_hidden, Quantizer(), activation=ACTIVATIONS[config.activation],
            dtype=dtype, rngs=rngs)
        self.part = part

    def __call__(self, x: jax.Array, own: KeyCache | None, bias: jax.Array, tap: Tap, recorded: Recorded,
                 encoded: tuple[KeyCache, jax.Array] | None = None) -> jax.Array:
        """x `[batch, q, d_model]` → same shape.

        Args:
            own: self-attention keys and values of the sequence so far; None: computed from x.
            encoded: keys and values of the encoded text, and their mask bias. If it has fewer rows than
                x, an equal number of consecutive rows of x share one text.
        """
        part = self.part
        x = tap(f"{part}.resid_pre", split_batch(x), recorded)
        h = self.norm1(x)
        attended = self.attention(h, own or self.attention.keys(h), bias)
        x = x + tap(f"{part}.attn_out", attended, recorded)
        if encoded is not None:
            # Rows that share a text become additional queries: its keys are neither copied nor read twice.
            h = self.norm_cross(x).reshape(len(encoded[0].keys), -1, x.shape[-1])
            with jax.named_scope("cross"):
                attended = self.cross(h, *encoded).reshape(x.shape)
            x = x + tap(f"{part}.cross_out", attended, recorded)
        x = tap(f"{part}.resid_mid", x, recorded)
        x = x + tap(f"{part}.mlp_write", self.mlp(self.norm2(x)), recorded)
        return tap(f"{part}.resid_post", x, recorded)

    @jax.named_scope("cross")
    def cross_keys(self, encoded: jax.Array) -> KeyCache:
        """Keys and values of the encoded text for cross-attention: each `[batch, heads, time, d_head]`."""
        return self.cross.keys(encoded)


class Stack(nnx.Module):
    """The encoder or the decoder: blocks, the relative position bias that they share, and a final norm."""

    def __init__(self, config: T5Config, part: Literal["encoder", "decoder"], n_layers: int, *,
                 dtype: jnp.dtype, rngs: nnx.Rngs):
        self.bias = RelativeBias(config, bidirectional=part == "encoder", rngs=rngs)
        self.blocks = nnx.List([Block(config, part, dtype=dtype, rngs=rngs) for _ in range(n_layers)])
        self.norm = RMSNorm(config.d_model, dtype=dtype, eps=config.norm_eps)


class DecoderCache(NamedTuple):
    """Keys and values of each decoder block: of the decoded tokens, and of the encoded text with its mask.

    There may be fewer texts than decoded rows; then an equal number of consecutive rows share one text.
    """

    own: list[KeyCache]
    cross: list[KeyCache]
    mask: jax.Array  # f32 [batch, 1, 1, time], 0 or the lowest number


class FlaxT5ForConditionalGeneration(PretrainedModel, nnx.Module):
    """ids `[batch, time]` and decoder ids `[batch, steps]` → logits `[batch, steps, vocab]`, f32."""

    hugging_face, config_class = T5, T5Config

    hooks = ("embed", "logits", "decoder.cross_out", *(
        f"{part}.{hook}" for part in ("encoder", "decoder")
        for hook in ("resid_pre", "attn_out", "resid_mid", "mlp_write", "resid_post")))
    encoder_hooks = tuple(hook for hook in hooks if hook == "embed" or hook.startswith("encoder."))

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        compute = compute or ComputeConfig()
        dtype = jnp.dtype(compute.dtype)
        self.config, self.compute = config, compute
        self.embed = Embedding(config.vocab_size, config.d_model, Quantizer(), dtype=dtype, rngs=rngs)
        self.encoder = Stack(config, "encoder", config.n_layers, dtype=dtype, rngs=rngs)
        self.decoder = Stack(config, "decoder", config.n_decoder_layers, dtype=dtype, rngs=rngs)
        self.unembed = (None if config.tie_embeddings else
                        Linear(config.d_model, config.vocab_size, Quantizer(), dtype=dtype,
                               result=jnp.float32, rngs=rngs))

    def __call__(self, ids: jax.Array, decoder_ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Computes the decoder's logits.

        Args:
            mask: bool `[batch, time]`, False at padding; by default no padding.

        Raises:
            ValueError: ids are not integers `[batch, time]` or outside the vocabulary (checked only
                for concrete arrays).
        """
        check_ids("ids", ids, self.config.vocab_size)
        check_ids("decoder_ids", decoder_ids, self.config.vocab_size)
        return self.tapped(ids, decoder_ids, mask, OFF)[0]

    def tapped(self, ids: jax.Array, decoder_ids: jax.Array, mask: jax.Array | None,
               tap: Tap) -> tuple[jax.Array, Recorded]:
        """Returns the logits and the recorded activations: `[layers, batch, time, …]` inside the blocks.

        Raises:
            ValueError: this network has no such hook or layer.
        """
        depths = {"encoder": self.config.n_layers, "decoder": self.config.n_decoder_layers}
        tapped_depths = [depths[part] for part in depths
                         if any(hook.startswith(part) for hook in (*tap.record, *tap.edit))]
        tap.check(self.hooks, min(tapped_depths or depths.values()))
        records: list[Recorded] = []
        outside: Recorded = {}
        encoded = self._encode(ids, mask, tap, records, outside)
        mask_bias = _mask_bias(mask, ids)
        steps = jnp.arange(decoder_ids.shape[1])
        causal = jnp.where(steps[None, :] <= steps[:, None], 0.0, -jnp.inf)
        bias = self.decoder.bias(steps[None], steps) + causal
        x = self._embed(decoder_ids)
        for i, block in enumerate(self.decoder.blocks):
            records.append({})
            with jax.named_scope(f"decoder/block_{i}"):
                cross = block.cross_keys(encoded), mask_bias
                x = block(x, None, bias, tap.within(i), records[-1], cross)
        logits = tap("logits", self._logits(x), outside)
        return logits, outside | stacked(records)

    def encode(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The normalised output of the encoder: ids `[batch, time]` → `[batch, time, d_model]`."""
        return self.encode_tapped(ids, mask, OFF)[0]

    def encode_tapped(self, ids: jax.Array, mask: jax.Array | None, tap: Tap) -> tuple[jax.Array, Recorded]:
        """Returns the output of `encode` and the recorded activations `[layers, batch, time, d_model]`.

        Raises:
            ValueError: the encoder has no such hook or layer.
        """
        tap.check(self.encoder_hooks, self.config.n_layers)
        records: list[Recorded] = []
        outside: Recorded = {}
        encoded = self._encode(ids, mask, tap, records, outside)
        return encoded, outside | stacked(records)

    def start(self, ids: jax.Array, mask: jax.Array | None, size: int, tap: Tap = OFF,
              copies: int = 1) -> DecoderCache:
        """Encodes the ids and allocates caches for `size` decoded positions.

        Args:
            tap: edits the encoder's activations; its recordings are discarded.
            copies: number of consecutive rows to decode for each row of ids, which is encoded once.

        Raises:
            ValueError: the encoder has no such hook or layer.
        """
        encoded, _ = self.encode_tapped(ids, mask, tap)
        config, dtype = self.config, encoded.dtype
        empty = jnp.zeros((copies * len(ids), config.n_heads, size, config.d_head), dtype)
        return DecoderCache([KeyCache(empty, empty) for _ in self.decoder.blocks],
                            [block.cross_keys(encoded) for block in self.decoder.blocks],
                            _mask_bias(mask, ids))

    def step(self, ids: jax.Array, cache: DecoderCache,
             position: jax.Array) -> tuple[jax.Array, DecoderCache]:
        """One token `[batch]` at step `position`, a scalar → logits `[batch, vocab]`, updated cache."""
        slots = jnp.arange(cache.own[0].keys.shape[2])
        bias = (self.decoder.bias(jnp.reshape(position, (1, 1)), slots)
                + jnp.where(slots <= position, 0.0, -jnp.inf))
        positions = jnp.full(len(ids), position)
        x, own = self._embed(ids[:, None]), []
        blocks = zip(self.decoder.blocks, cache.own, cache.cross, strict=True)
        for i, (block, previous, cross) in enumerate(blocks):
            with jax.named_scope(f"decoder/block_{i}"):
                new = block.attention.keys(block.norm1(x))
                own.append(previous.write(new.keys, new.values, positions))
                x = block(x, own[-1], bias, OFF, {}, (cross, cache.mask))
        return self._logits(x)[:, 0], DecoderCache(own, cache.cross, cache.mask)

    def _encode(self, ids: jax.Array, mask: jax.Array | None, tap: Tap, records: list[Recorded],
                outside: Recorded) -> jax.Array:
        positions = jnp.arange(ids.shape[1])
        bias = self.encoder.bias(positions[None], positions) + _mask_bias(mask, ids)
        x = tap("embed", self._embed(ids), outside)
        for i, block in enumerate(self.encoder.blocks):
            records.append({})
            with jax.named_scope(f"encoder/block_{i}"):
                x = block(x, None, bias, tap.within(i), records[-1])
        return self.encoder.norm(x)

    @jax.named_scope("embedding")
    def _embed(self, ids: jax.Array) -> jax.Array:
        return self.embed(ids)

    def _logits(self, x: jax.Array) -> jax.Array:
        x = self.decoder.norm(split_batch(x))
        with jax.named_scope("unembedding"):
            if self.config.scale_decoder_outputs:
                x = x * self.config.d_model**-0.5
            return self.embed.attend(x) if self.unembed is None else self.unembed(x)


# ---------------------------------------------------------------------------------------------


def _mask_bias(mask: jax.Array | None, ids: jax.Array) -> jax.Array:
    """0 for unmasked keys, the lowest f32 for masked ones (no row is all -inf): `[batch, 1, 1, time]`."""
    mask = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    return jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
