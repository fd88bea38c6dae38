"""The vanilla transformer: the baseline of the routed networks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.nn.attention import CausalAttention
from tilelli_jax.nn.dense import FeedForward
from tilelli_jax.nn.hooks import OFF, Recorded, Tap
from tilelli_jax.nn.norm import LayerNorm
from tilelli_jax.nn.quantize import QuantizerName, quantizer


@dataclasses.dataclass(frozen=True)
class VanillaConfig(Section):
    """A pre-norm transformer without biases in its linear layers, by default with learned positions."""

    family: Literal["vanilla"] = setting("vanilla", "network family")
    vocab_size: int = setting(256, "number of tokens; 256 for bytes", min=1)
    d_model: int = setting(320, "width of the residual stream", min=1)
    n_layers: int = setting(8, "number of blocks", min=1)
    max_seq_len: int = setting(256, "context length in bytes; a hard limit if positions are learned", min=1)
    positions: Literal["learned", "none"] = setting("learned", "position encoding: learned absolute, or none")
    tie_embeddings: bool = setting(False, "unembed with the embedding table")
    n_heads: int = setting(8, "number of attention heads", min=1)
    dense_expand: int = setting(4, "hidden width of the feed-forward network as a multiple of d_model", min=1)
    abstain_head: bool = setting(False, "add an abstain head: one logit per position for abstaining")
    quantizer: QuantizerName = setting("none", "weight quantiser; none: full-precision weights")
    quantize: tuple[Literal["attention", "dense", "embed", "unembed"], ...] = setting(
        ("attention", "dense"), "parts whose weights are quantised")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise InputError(f"d_model: expected a multiple of n_heads {self.n_heads}, found {self.d_model}")


class TransformerBlock(nnx.Module):
    """x ← x + attention(LayerNorm(x)); x ← x + FFN(LayerNorm(x))."""

    def __init__(self, config: VanillaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        attention, dense = (quantizer(config.quantizer if part in config.quantize else "none")
                            for part in ("attention", "dense"))
        self.norm1 = LayerNorm(config.d_model, dtype=dtype)
        self.attention = CausalAttention(config.d_model, config.n_heads, attention, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.d_model, dtype=dtype)
        self.dense = FeedForward(config.d_model, config.dense_expand * config.d_model, dense, dtype=dtype,
                                 rngs=rngs)

    def __call__(self, x: jax.Array, tap: Tap = OFF) -> tuple[jax.Array, Recorded]:
        """`[batch, time, d_model]` → same shape. Hooks: attn_out, resid_mid, mlp_write."""
        recorded: Recorded = {}
        return self._join(x, self.attention(self.norm1(x)), tap, recorded), recorded

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int, tap: Tap = OFF, prefix: Any = None
                ) -> tuple[jax.Array, Any, Recorded]:
        recorded: Recorded = {}
        y, cache = self.attention.prefill(self.norm1(x), lengths, size, prefix)
        return self._join(x, y, tap, recorded), cache, recorded

    def step(self, x: jax.Array, cache: Any, position: jax.Array) -> tuple[jax.Array, Any]:
        y, cache = self.attention.step(self.norm1(x), cache, position)
        return self._join(x, y, OFF, {}), cache

    def _join(self, x: jax.Array, attended: jax.Array, tap: Tap, recorded: Recorded) -> jax.Array:
        x = tap("resid_mid", x + tap("attn_out", attended, recorded), recorded)
        return x + tap("mlp_write", self.dense(self.norm2(x)), recorded)


class VanillaLM(Decoder):
    """A decoder of transformer blocks."""

    hooks = (*Decoder.hooks, "attn_out", "resid_mid", "mlp_write")
    is_byte_level = True

    def __init__(self, config: VanillaConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        compute = compute or ComputeConfig()
        dtype = jnp.dtype(compute.dtype)
        embed, unembed = (quantizer(config.quantizer if part in config.quantize else "none")
                          for part in ("embed", "unembed"))
        super().__init__(config, lambda rngs: TransformerBlock(config, dtype=dtype, rngs=rngs),
                         embed=embed, unembed=unembed, final_norm=LayerNorm(config.d_model, dtype=dtype),
                         compute=compute, rngs=rngs)
