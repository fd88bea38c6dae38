"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745): the network of Pythia."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models import hugging_face
from tilelli_jax.models.decoder import ComputeConfig, Decoder
from tilelli_jax.nn.attention import RotaryAttention
from tilelli_jax.nn.dense import FeedForward
from tilelli_jax.nn.norm import LayerNorm
from tilelli_jax.nn.quantize import Quantizer
from tilelli_jax.nn.rotary import frequencies
from tilelli_jax.nn.tap import OFF, Recorded, Tap


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig(Section):
    """GPT-NeoX; the defaults are Pythia-410M's."""

    family: Literal["gpt_neox"] = setting("gpt_neox", "which network")
    vocab_size: int = setting(50304, "number of symbols", least=1)
    d_model: int = setting(1024, "width of the residual stream", least=1)
    n_layers: int = setting(24, "number of blocks", least=1)
    max_seq_len: int = setting(2048, "longest context that it was trained for", least=1)
    positions: Literal["rotary"] = setting("rotary", "how a position is known")
    tie_embeddings: bool = setting(False, "unembed with the embedding table")
    n_heads: int = setting(16, "heads of the attention", least=1)
    d_hidden: int = setting(4096, "hidden width of the feed-forward network", least=1)
    rotary_fraction: float = setting(0.25, "share of a head's channels that turn", above=0, most=1)
    rotary_theta: float = setting(10000.0, "base of the rotary frequencies", above=0)
    parallel_residual: bool = setting(True, "attention and feed-forward network read the same stream")
    attention_bias: bool = setting(True, "biases in the attention's products")
    norm_eps: float = setting(1e-5, "added to the variance in LayerNorm", least=0)
    quantizer: Literal["none"] = setting("none", "how weights are quantised: not at all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            raise InputError(f"d_model: expected a multiple of n_heads {self.n_heads}, found {self.d_model}")


class GPTNeoXBlock(nnx.Module):
    """x ← x + attention(LN₁(x)) + MLP(LN₂(x)); in sequence where the residual is not parallel."""

    def __init__(self, config: GPTNeoXConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        turning = int(config.d_model // config.n_heads * config.rotary_fraction)
        self.norm1 = LayerNorm(config.d_model, dtype=dtype, eps=config.norm_eps)
        self.attention = RotaryAttention(
            config.d_model, config.n_heads, frequencies(turning, config.rotary_theta), Quantizer(),
            bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(config.d_model, dtype=dtype, eps=config.norm_eps)
        self.mlp = FeedForward(config.d_model, config.d_hidden, Quantizer(), bias=True, dtype=dtype,
                               rngs=rngs)
        self.parallel = config.parallel_residual

    def __call__(self, x: jax.Array, tap: Tap = OFF) -> tuple[jax.Array, Recorded]:
        """`[batch, time, d_model]` → the same; offers attn_out, mlp_write and, in sequence, resid_mid."""
        seen: Recorded = {}
        return self._join(x, self.attention(self.norm1(x)), tap, seen), seen

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, Any]:
        y, cache = self.attention.prefill(self.norm1(x), lengths, size)
        return self._join(x, y, OFF, {}), cache

    def step(self, x: jax.Array, cache: Any, position: jax.Array) -> tuple[jax.Array, Any]:
        y, cache = self.attention.step(self.norm1(x), cache, position)
        return self._join(x, y, OFF, {}), cache

    def _join(self, x: jax.Array, attended: jax.Array, tap: Tap, seen: Recorded) -> jax.Array:
        attended = tap("attn_out", attended, seen)
        middle = x if self.parallel else tap("resid_mid", x + attended, seen)
        write = tap("mlp_write", self.mlp(self.norm2(middle)), seen)
        return middle + attended + write if self.parallel else middle + write


class FlaxGPTNeoXForCausalLM(Decoder):
    """A decoder of GPT-NeoX blocks: ids `[batch, time]` → logits `[batch, time, vocab]`, f32."""

    def __init__(self, config: GPTNeoXConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        compute = compute or ComputeConfig()
        dtype = jnp.dtype(compute.dtype)
        super().__init__(config, lambda rngs: GPTNeoXBlock(config, dtype=dtype, rngs=rngs),
                         embed=Quantizer(), unembed=Quantizer(), norm_eps=config.norm_eps,
                         compute=compute, rngs=rngs)
        self.places = (*Decoder.places, "attn_out", "mlp_write",
                       *(() if config.parallel_residual else ("resid_mid",)))

    @classmethod
    def from_pretrained(cls, path: str | Path,
                        compute: ComputeConfig | None = None) -> FlaxGPTNeoXForCausalLM:
        """Reads a Hugging Face directory: config.json and safetensors, in one file or several.

        Raises:
            InputError: it is none of a GPT-NeoX, or its tensors are not those of its configuration.
        """
        return hugging_face.load(HUGGING_FACE, path, compute)

    def save_pretrained(self, path: str | Path, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        """Writes the directory that `from_pretrained` and transformers read."""
        hugging_face.save(HUGGING_FACE, self, path, dtype)


def _config_of(tree: dict[str, Any]) -> GPTNeoXConfig:
    """config.json, of transformers before version 5 or since."""
    rope = tree.get("rope_parameters") or {}
    if (kind := rope.get("rope_type", "default")) != "default" or tree.get("rope_scaling"):
        raise InputError(f"rope_parameters.rope_type: expected default, found {kind}")
    if tree.get("hidden_act", "gelu") != "gelu":
        raise InputError(f"hidden_act: expected gelu, found {tree['hidden_act']}")
    return GPTNeoXConfig(
        vocab_size=tree["vocab_size"], d_model=tree["hidden_size"], n_layers=tree["num_hidden_layers"],
        max_seq_len=tree["max_position_embeddings"], tie_embeddings=tree.get("tie_word_embeddings", False),
        n_heads=tree["num_attention_heads"], d_hidden=tree["intermediate_size"],
        rotary_fraction=float(rope.get("partial_rotary_factor", tree.get("rotary_pct", 0.25))),
        rotary_theta=float(rope.get("rope_theta", tree.get("rotary_emb_base", 10000))),
        parallel_residual=tree.get("use_parallel_residual", True),
        attention_bias=tree.get("attention_bias", True), norm_eps=float(tree.get("layer_norm_eps", 1e-5)))


def _tree_of(config: GPTNeoXConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu",
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings, "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_hidden, "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias, "layer_norm_eps": config.norm_eps,
        "rotary_pct": config.rotary_fraction, "rotary_emb_base": config.rotary_theta,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": config.rotary_fraction,
                            "rope_theta": config.rotary_theta}}


_BLOCK = "gpt_neox.layers.{i}."
HUGGING_FACE = hugging_face.Family(
    model_type="gpt_neox", config_of=_config_of, tree_of=_tree_of, build=FlaxGPTNeoXForCausalLM,
    names={
        "embed.kernel": "gpt_neox.embed_in.weight",
        "final_norm.scale": "gpt_neox.final_layer_norm.weight",
        "final_norm.bias": "gpt_neox.final_layer_norm.bias",
        "unembed.kernel": "embed_out.weight",
        "blocks.{i}.norm1.scale": _BLOCK + "input_layernorm.weight",
        "blocks.{i}.norm1.bias": _BLOCK + "input_layernorm.bias",
        "blocks.{i}.norm2.scale": _BLOCK + "post_attention_layernorm.weight",
        "blocks.{i}.norm2.bias": _BLOCK + "post_attention_layernorm.bias",
        "blocks.{i}.attention.qkv.kernel": _BLOCK + "attention.query_key_value.weight",
        "blocks.{i}.attention.qkv.bias": _BLOCK + "attention.query_key_value.bias",
        "blocks.{i}.attention.out.kernel": _BLOCK + "attention.dense.weight",
        "blocks.{i}.attention.out.bias": _BLOCK + "attention.dense.bias",
        "blocks.{i}.mlp.up.kernel": _BLOCK + "mlp.dense_h_to_4h.weight",
        "blocks.{i}.mlp.up.bias": _BLOCK + "mlp.dense_h_to_4h.bias",
        "blocks.{i}.mlp.down.kernel": _BLOCK + "mlp.dense_4h_to_h.weight",
        "blocks.{i}.mlp.down.bias": _BLOCK + "mlp.dense_4h_to_h.bias"},
    turned=("unembed.kernel", "qkv.kernel", "out.kernel", "up.kernel", "down.kernel"),
    aliases={"lm_head.weight": "embed_out.weight"},
    ignored={r"attention\.(masked_)?bias$": "the causal mask of old versions",
             r"rotary_emb\.inv_freq$": "computed from the configuration"})
