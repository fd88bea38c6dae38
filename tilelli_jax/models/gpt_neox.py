"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745): the network of Pythia."""

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
from tilelli_jax.models.pretrained_model import PretrainedModel
from tilelli_jax.models.rotary_scaling import RotaryScaling
from tilelli_jax.nn.attention import RotaryAttention
from tilelli_jax.nn.dense import ACTIVATIONS, FeedForward
from tilelli_jax.nn.hooks import OFF, Recorded, Tap
from tilelli_jax.nn.norm import LayerNorm
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.nn.rotary import frequencies
from tilelli_jax.pretrained.gpt_neox import GPT_NEOX


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig(Section):
    """GPT-NeoX; the defaults are Pythia-410M's."""

    family: Literal["gpt_neox"] = setting("gpt_neox", "network family")
    vocab_size: int = setting(50304, "number of tokens", min=1)
    d_model: int = setting(1024, "width of the residual stream", min=1)
    n_layers: int = setting(24, "number of blocks", min=1)
    max_seq_len: int = setting(2048, "longest context recorded in training, in tokens", min=1)
    positions: Literal["rotary"] = setting("rotary", "position encoding")
    tie_embeddings: bool = setting(False, "unembed with the embedding table")
    n_heads: int = setting(16, "number of attention heads", min=1)
    d_hidden: int = setting(4096, "hidden width of the feed-forward network", min=1)
    rotary_fraction: float = setting(0.25, "fraction of each head's channels that is rotated",
                                     above=0, max=1)
    rotary_theta: float = setting(10000.0, "base of the rotary frequencies", above=0)
    rotary_scaling: RotaryScaling | None = setting(
        None, "scaling of the rotary frequencies, of kind linear; null: none")
    activation: Literal["gelu", "gelu_tanh"] = setting("gelu", "activation of the feed-forward network")
    parallel_residual: bool = setting(
        True, "attention and feed-forward network read the same residual stream; false: one after the other")
    attention_bias: bool = setting(True, "use biases in the linear layers of attention")
    norm_eps: float = setting(1e-5, "epsilon added to the variance in LayerNorm", min=0)
    bos_id: int | None = setting(None, "id of the token that begins a text; null: none", min=0)
    end_ids: tuple[int, ...] = setting((), "ids of the tokens that end a text")
    quantizer: Literal["none"] = setting("none", "weight quantiser; this family supports none only")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise InputError(f"d_model: expected a multiple of n_heads {self.n_heads}, found {self.d_model}")
        if self.rotary_scaling is not None and self.rotary_scaling.kind != "linear":
            raise InputError(f"rotary_scaling.kind: expected linear, found {self.rotary_scaling.kind}")


class GPTNeoXBlock(nnx.Module):
    """x ← x + attention(LN₁(x)) + MLP(LN₂(x)); without parallel_residual, one after the other."""

    def __init__(self, config: GPTNeoXConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        rotary_width = int(config.d_model // config.n_heads * config.rotary_fraction)
        rotation = frequencies(rotary_width, config.rotary_theta)
        if config.rotary_scaling is not None:
            rotation = config.rotary_scaling(rotation, config.rotary_theta)
        self.norm1 = LayerNorm(config.d_model, dtype=dtype, eps=config.norm_eps)
        self.attention = RotaryAttention(
            config.d_model, config.n_heads, rotation, Quantizer(),
            bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.d_model, dtype=dtype, eps=config.norm_eps)
        self.mlp = FeedForward(config.d_model, config.d_hidden, Quantizer(), bias=True,
                               activation=ACTIVATIONS[config.activation], dtype=dtype, rngs=rngs)
        self.parallel = config.parallel_residual

    def __call__(self, x: jax.Array, tap: Tap = OFF) -> tuple[jax.Array, Recorded]:
        """`[batch, time, d_model]` → same shape. Hooks: attn_out, mlp_write; resid_mid if not parallel."""
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
        attended = tap("attn_out", attended, recorded)
        mlp_input = x if self.parallel else tap("resid_mid", x + attended, recorded)
        write = tap("mlp_write", self.mlp(self.norm2(mlp_input)), recorded)
        return mlp_input + attended + write if self.parallel else mlp_input + write


class FlaxGPTNeoXForCausalLM(PretrainedModel, Decoder):
    """A decoder of GPT-NeoX blocks: ids `[batch, time]` → logits `[batch, time, vocab]`, f32."""

    hugging_face, config_class = GPT_NEOX, GPTNeoXConfig

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        compute = compute or ComputeConfig()
        dtype = jnp.dtype(compute.dtype)
        super().__init__(config, lambda rngs: GPTNeoXBlock(config, dtype=dtype, rngs=rngs),
                         final_norm=LayerNorm(config.d_model, dtype=dtype, eps=config.norm_eps),
                         compute=compute, rngs=rngs)
        self.hooks = (*Decoder.hooks, "attn_out", "mlp_write",
                       *(() if config.parallel_residual else ("resid_mid",)))
