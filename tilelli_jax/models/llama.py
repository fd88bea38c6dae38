"""Llama (Touvron et al. 2023, arXiv:2302.13971) and its relatives: SmolLM2, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.models.rotary_scaling import RotaryScaling
from tilelli_jax.nn.attention import ALL, GroupedQueryAttention, LayerAttention
from tilelli_jax.nn.dense import GatedFeedForward
from tilelli_jax.nn.hooks import OFF, Recorded, Tap
from tilelli_jax.nn.norm import RMSNorm
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.nn.rotary import frequencies
from tilelli_jax.pretrained.llama import LLAMA

Kind = Literal["sliding", "full"]


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Section):
    """Llama, Mistral, Qwen2 or Qwen3; the defaults are SmolLM2-135M's."""

    family: Literal["llama"] = setting("llama", "network family")
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"] = setting(
        "llama", "model_type in transformers. qwen2: biases in the query, key and value projections; qwen3: "
        "normalised queries and keys; mistral: only with a window different from llama")
    vocab_size: int = setting(49152, "number of tokens", min=1)
    d_model: int = setting(576, "width of the residual stream", min=1)
    layers: tuple[Kind, ...] = setting(("full",) * 30, "kind of each layer: sliding or full")
    max_seq_len: int = setting(8192, "longest context recorded in training, in tokens", min=1)
    positions: Literal["rotary"] = setting("rotary", "position encoding")
    tie_embeddings: bool = setting(True, "unembed with the embedding table")
    n_heads: int = setting(9, "number of attention heads", min=1)
    n_kv_heads: int = setting(3, "number of key and value heads", min=1)
    d_head: int = setting(64, "width of a head", min=2)
    d_hidden: int = setting(1536, "hidden width of the feed-forward network", min=1)
    window: int | None = setting(
        None, "number of most recent keys that a query of a sliding layer attends to; null: no such layers",
        min=1)
    rotary_theta: float = setting(100000.0, "base of the rotary frequencies", above=0)
    rotary_scaling: RotaryScaling | None = setting(None, "scaling of the rotary frequencies; null: none")
    attention_bias: bool = setting(False, "use biases in all linear layers of attention (llama, qwen3)")
    mlp_bias: bool = setting(False, "use biases in the feed-forward network (llama)")
    norm_eps: float = setting(1e-5, "epsilon added to the mean square in RMSNorm", min=0)
    bos_id: int | None = setting(1, "id of the token that begins a text; null: none", min=0)
    end_ids: tuple[int, ...] = setting((2,), "ids of the tokens that end a text")
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
        if "sliding" in self.layers and self.window is None:
            raise InputError("window: expected a number for sliding layers, found null")
        for key, types in (("attention_bias", ("llama", "qwen3")), ("mlp_bias", ("llama",))):
            if getattr(self, key) and self.model_type not in types:
                raise InputError(f"{key}: expected false for model_type {self.model_type}, found true")

    @property
    def n_layers(self) -> int:
        return len(self.layers)


@functools.cache
def layer_attention(layers: tuple[Kind, ...], window: int | None, rotations: tuple[tuple[Kind, Any], ...],
                d_head: int) -> LayerAttention:
    """Windows and rotary frequencies of the layers, with a leading axis of n_layers.

    Args:
        window: that of the sliding layers.
        rotations: for each kind, (base, `RotaryScaling` or None).
    """
    by_kind = {}
    for kind, (theta, scaling) in rotations:
        plain = frequencies(d_head, theta)
        changed = plain if scaling is None else scaling(plain, theta)
        by_kind[kind] = (ALL if kind == "full" else window, changed,
                         1.0 if scaling is None else scaling.attention_factor)
    windows, rows, amplitudes = zip(*(by_kind[kind] for kind in layers), strict=True)
    return LayerAttention(np.array(windows, np.int32), np.stack(rows).astype(np.float32),
                     np.array(amplitudes, np.float32))


class LlamaBlock(nnx.Module):
    """x ← x + attention(norm(x)); x ← x + MLP(norm(x)), where MLP(h) = (SiLU(h · gate) ⊙ (h · up)) · down."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = functools.partial(RMSNorm, dtype=dtype, eps=config.norm_eps)
        self.norm1, self.norm2 = norm(config.d_model), norm(config.d_model)
        self.attention = GroupedQueryAttention(
            config.d_model, config.n_heads, config.n_kv_heads, config.d_head, scale=config.d_head**-0.5,
            bias=config.attention_bias or config.model_type == "qwen2", out_bias=config.attention_bias,
            norm=functools.partial(norm, config.d_head) if config.model_type == "qwen3" else None,
            dtype=dtype, rngs=rngs)
        self.mlp = GatedFeedForward(config.d_model, config.d_hidden, Quantizer(), bias=config.mlp_bias,
                                    activation=jax.nn.silu, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, tap: Tap, kind: LayerAttention) -> tuple[jax.Array, Recorded]:
        """`[batch, time, d_model]` → same shape. Hooks: attn_out, resid_mid, mlp_write."""
        recorded: Recorded = {}
        return self._join(x, self.attention(self.norm1(x), kind), tap, recorded), recorded

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int, kind: LayerAttention, tap: Tap = OFF,
                prefix: Any = None) -> tuple[jax.Array, Any, Recorded]:
        recorded: Recorded = {}
        y, cache = self.attention.prefill(self.norm1(x), lengths, size, kind, prefix)
        return self._join(x, y, tap, recorded), cache, recorded

    def step(self, x: jax.Array, cache: Any, position: jax.Array,
             kind: LayerAttention) -> tuple[jax.Array, Any]:
        y, cache = self.attention.step(self.norm1(x), cache, position, kind)
        return self._join(x, y, OFF, {}), cache

    def _join(self, x: jax.Array, attended: jax.Array, tap: Tap, recorded: Recorded) -> jax.Array:
        x = tap("resid_mid", x + tap("attn_out", attended, recorded), recorded)
        return x + tap("mlp_write", self.mlp(self.norm2(x)), recorded)


class FlaxLlamaForCausalLM(PretrainedModel, Decoder):
    """A decoder of Llama blocks: ids `[batch, time]` → logits `[batch, time, vocab]`, f32."""

    hugging_face, config_class = LLAMA, LlamaConfig
    hooks = (*Decoder.hooks, "attn_out", "resid_mid", "mlp_write")

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        compute = compute or ComputeConfig()
        dtype = jnp.dtype(compute.dtype)
        super().__init__(config, lambda rngs: LlamaBlock(config, dtype=dtype, rngs=rngs),
                         final_norm=RMSNorm(config.d_model, dtype=dtype, eps=config.norm_eps),
                         compute=compute, rngs=rngs)

    def per_layer_inputs(self) -> tuple[LayerAttention]:
        config = self.config
        rotation = config.rotary_theta, config.rotary_scaling
        return (layer_attention(config.layers, config.window, (("full", rotation), ("sliding", rotation)),
                            config.d_head),)
