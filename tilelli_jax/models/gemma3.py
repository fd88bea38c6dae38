"""Gemma 3's text decoder (Gemma Team 2025, arXiv:2503.19786)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.models.llama import Kind, LlamaBlock, layer_attention
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.models.rotary_scaling import RotaryScaling
from tilelli_jax.nn.attention import GroupedQueryAttention, LayerAttention
from tilelli_jax.nn.dense import GatedFeedForward
from tilelli_jax.nn.hooks import Recorded, Tap
from tilelli_jax.nn.norm import RMSNorm
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.pretrained.gemma3 import GEMMA3


@dataclasses.dataclass(frozen=True)
class Gemma3Config(Section):
    """Gemma 3; the defaults are 1B's."""

    family: Literal["gemma3"] = setting("gemma3", "network family")
    vocab_size: int = setting(262144, "number of tokens", min=1)
    d_model: int = setting(1152, "width of the residual stream", min=1)
    layers: tuple[Kind, ...] = setting(((*("sliding",) * 5, "full") * 5)[:26],
                                       "kind of each layer: sliding or full")
    max_seq_len: int = setting(32768, "longest context recorded in training, in tokens", min=1)
    positions: Literal["rotary"] = setting("rotary", "position encoding")
    tie_embeddings: bool = setting(True, "unembed with the embedding table")
    n_heads: int = setting(4, "number of attention heads", min=1)
    n_kv_heads: int = setting(1, "number of key and value heads", min=1)
    d_head: int = setting(256, "width of a head", min=2)
    d_hidden: int = setting(6912, "hidden width of the feed-forward network", min=1)
    window: int = setting(512, "number of most recent keys that a query of a sliding layer attends to", min=1)
    query_scale: int = setting(256, "scores are divided by the square root of this", min=1)
    rotary_theta: float = setting(10000.0, "base of the rotary frequencies in sliding layers", above=0)
    rotary_theta_full: float = setting(1000000.0, "base of the rotary frequencies in full layers", above=0)
    rotary_scaling: RotaryScaling | None = setting(
        None, "scaling of the rotary frequencies in full layers; null: none")
    attention_bias: bool = setting(False, "use biases in the linear layers of attention")
    norm_eps: float = setting(1e-6, "epsilon added to the mean square in RMSNorm", min=0)
    bos_id: int | None = setting(2, "id of the token that begins a text; null: none", min=0)
    end_ids: tuple[int, ...] = setting((1, 106), "ids of the tokens that end a text")
    quantizer: Literal["none"] = setting("none", "weight quantiser; this family supports none only")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers:
            raise InputError("layers: expected at least one layer")
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads: expected a multiple of {self.n_kv_heads} key heads, "
                             f"found {self.n_heads}")
        if self.d_head % 2:
            raise InputError(f"d_head: expected an even number, found {self.d_head}")

    @property
    def n_layers(self) -> int:
        return len(self.layers)


class Gemma3Block(LlamaBlock):
    """x ← x + norm(attention(norm(x))); x ← x + norm(MLP(norm(x))), with a GELU-gated MLP.

    The norms' factor is 1 + `scale`.
    """

    def __init__(self, config: Gemma3Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, dtype=dtype, eps=config.norm_eps, offset=1.0)
        self.norm1, self.attention_norm = norm(config.d_model), norm(config.d_model)
        self.norm2, self.mlp_norm = norm(config.d_model), norm(config.d_model)
        self.attention = GroupedQueryAttention(
            config.d_model, config.n_heads, config.n_kv_heads, config.d_head, scale=config.query_scale**-0.5,
            bias=config.attention_bias, out_bias=config.attention_bias,
            norm=functools.partial(norm, config.d_head), dtype=dtype, rngs=rngs)
        self.mlp = GatedFeedForward(config.d_model, config.d_hidden, Quantizer(), dtype=dtype, rngs=rngs)

    def _join(self, x: jax.Array, attended: jax.Array, tap: Tap, recorded: Recorded) -> jax.Array:
        x = tap("resid_mid", x + tap("attn_out", self.attention_norm(attended), recorded), recorded)
        return x + tap("mlp_write", self.mlp_norm(self.mlp(self.norm2(x))), recorded)


class FlaxGemma3ForCausalLM(PretrainedModel, Decoder):
    """A decoder of Gemma 3 blocks: ids `[batch, time]` → logits `[batch, time, vocab]`, f32."""

    hugging_face, config_class = GEMMA3, Gemma3Config
    hooks = (*Decoder.hooks, "attn_out", "resid_mid", "mlp_write")

    def __init__(self, config: Gemma3Config, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        compute = compute or ComputeConfig()
        dtype = jnp.dtype(compute.dtype)
        super().__init__(config, lambda rngs: Gemma3Block(config, dtype=dtype, rngs=rngs),
                         final_norm=RMSNorm(config.d_model, dtype=dtype, eps=config.norm_eps, offset=1.0),
                         compute=compute, rngs=rngs)

    def per_layer_inputs(self) -> tuple[LayerAttention]:
        config = self.config
        rotations = (("full", (config.rotary_theta_full, config.rotary_scaling)),
                     ("sliding", (config.rotary_theta, None)))
        return (layer_attention(config.layers, config.window, rotations, config.d_head),)

    @jax.named_scope("embedding")
    def _embed(self, ids: jax.Array, positions: jax.Array) -> jax.Array:
        return self.embed(ids) * jnp.asarray(self.config.d_model**0.5, self.embed.dtype)
