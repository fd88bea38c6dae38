"""Routed networks: each block mixes several pathways by a router's softmax weights.

Lite, parent and atome are three configurations of this model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.decoder import Decoder
from tilelli_jax.nn.attention import TopKAttention
from tilelli_jax.nn.conv import CausalConv
from tilelli_jax.nn.dense import FeedForward
from tilelli_jax.nn.hooks import OFF, Recorded, Tap
from tilelli_jax.nn.norm import LayerNorm
from tilelli_jax.nn.quantize import Quantizer, QuantizerName, quantizer
from tilelli_jax.nn.router import Router
from tilelli_jax.nn.ssm import DiagonalSSM
from tilelli_jax.nn.topk import Reduction

Pathway = Literal["local", "wide", "state", "sparse", "dense"]
Quantized = Literal["conv", "attention", "dense", "router", "embed", "unembed"]


@dataclasses.dataclass(frozen=True)
class RoutedConfig(Section):
    """A routed byte-level language model."""

    family: Literal["routed"] = setting("routed", "network family")
    vocab_size: int = setting(256, "number of tokens; 256 for bytes", min=1)
    d_model: int = setting(256, "width of the residual stream", min=1)
    n_layers: int = setting(8, "number of blocks", min=1)
    max_seq_len: int = setting(256, "context length in bytes; a hard limit if positions are learned", min=1)
    positions: Literal["learned", "none"] = setting("learned", "position encoding: learned absolute, or none")
    tie_embeddings: bool = setting(False, "unembed with the embedding table")
    pathways: tuple[Pathway, ...] = setting(
        ("local", "sparse", "dense"), "pathways of a block, in the order of the router's outputs")
    n_banks: int = setting(1, "number of copies of every pathway; the router weights each copy separately",
                           min=1)
    local_kernel: int = setting(5, "kernel size of the local convolution, in positions", min=1)
    wide_kernel: int = setting(15, "kernel size of the wide convolution, in positions", min=1)
    n_heads: int = setting(8, "number of heads of the sparse attention", min=1)
    d_head: int = setting(48, "width of each head's queries and keys in the sparse attention", min=1)
    top_k: int = setting(16, "number of keys that a query of the sparse attention attends to", min=1)
    head_reduction: Reduction = setting("mean", "how the outputs of the heads are combined: mean or sum")
    dense_expand: int = setting(4, "hidden width of the dense pathway as a multiple of d_model", min=1)
    second_norm: Literal["none", "mix", "dense"] = setting(
        "none", "second LayerNorm in each block: on the mixed output before it is added (mix), on the input "
                "of the dense pathways (dense), or none")
    conv_bias: bool = setting(False, "use biases in the convolutions")
    router_bias: bool = setting(False, "use a bias in the router")
    abstain_head: bool = setting(False, "add an abstain head: one logit per position for abstaining")
    quantizer: QuantizerName = setting("none", "weight quantiser; none: full-precision weights")
    quantize: tuple[Quantized, ...] = setting(
        ("conv", "attention", "dense"), "parts whose weights are quantised")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pathways or len(set(self.pathways)) != len(self.pathways):
            raise InputError(f"pathways: expected at least one pathway and no duplicates, found "
                             f"{list(self.pathways)} (use n_banks for copies)")


class RoutedBlock(nnx.Module):
    """x ← x + Σ_i r_i · P_i(h), with h = LayerNorm(x) and r = router(h) for each token."""

    def __init__(self, config: RoutedConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(config.d_model, dtype=dtype)
        self.names = tuple(pathway if bank == 0 else f"{pathway}_{bank}"
                           for bank in range(config.n_banks) for pathway in config.pathways)
        for name in self.names:
            setattr(self, name, _pathway(name.partition("_")[0], config, dtype=dtype, rngs=rngs))
        self.router = Router(config.d_model, len(self.names), _quantizer(config, "router"),
                             rngs=rngs, bias=config.router_bias)
        self.second_norm = config.second_norm
        if config.second_norm != "none":
            self.norm2 = LayerNorm(config.d_model, dtype=dtype)

    def __call__(self, x: jax.Array, tap: Tap = OFF) -> tuple[jax.Array, Recorded]:
        """`[batch, time, d_model]` → same shape. Hooks: router `[batch, time, n_paths]`, mix."""
        y, _, recorded = self._mix(x, lambda name, h: (getattr(self, name)(h), None), tap)
        return y, recorded

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int, tap: Tap = OFF, prefix: None = None
                ) -> tuple[jax.Array, dict[str, Any], Recorded]:
        assert prefix is None, "a shared prefix; see longest_prefix"
        return self._mix(x, lambda name, h: getattr(self, name).prefill(h, lengths, size), tap)

    def step(self, x: jax.Array, cache: dict[str, Any],
             position: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        y, cache, _ = self._mix(x, lambda name, h: getattr(self, name).step(h, cache[name], position), OFF)
        return y, cache

    def _mix(self, x: jax.Array, run: Callable[[str, jax.Array], tuple[jax.Array, Any]],
             tap: Tap) -> tuple[jax.Array, dict[str, Any], Recorded]:
        """Computes the block; `run` evaluates one pathway (whole sequence, prefill or step)."""
        recorded: Recorded = {}
        h = self.norm(x)
        dense_input = self.norm2(x) if self.second_norm == "dense" else h
        weights = tap("router", self.router(h), recorded)
        mixed, caches = jnp.zeros_like(h), {}
        for i, name in enumerate(self.names):
            with jax.named_scope(name):
                y, caches[name] = run(name, dense_input if name.startswith("dense") else h)
            mixed = mixed + weights[..., i : i + 1].astype(y.dtype) * y
        if self.second_norm == "mix":
            mixed = self.norm2(mixed)
        return x + tap("mix", mixed, recorded), caches, recorded


class RoutedLM(Decoder):
    """A decoder of routed blocks."""

    hooks = (*Decoder.hooks, "router", "mix")
    is_byte_level = True

    def __init__(self, config: RoutedConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        compute = compute or ComputeConfig()
        dtype = jnp.dtype(compute.dtype)
        super().__init__(config, lambda rngs: RoutedBlock(config, dtype=dtype, rngs=rngs),
                         embed=_quantizer(config, "embed"), unembed=_quantizer(config, "unembed"),
                         final_norm=LayerNorm(config.d_model, dtype=dtype), compute=compute, rngs=rngs)

    def longest_prefix(self) -> int:
        """See `CausalLM`: convolutions and state spaces keep what follows from all positions."""
        return 0


def _quantizer(config: RoutedConfig, part: Quantized) -> Quantizer:
    return quantizer(config.quantizer if part in config.quantize else "none")


def _pathway(kind: str, config: RoutedConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    conv, attention, dense = (_quantizer(config, part) for part in ("conv", "attention", "dense"))
    match kind:
        case "local":
            return CausalConv(config.d_model, config.local_kernel, conv, bias=config.conv_bias,
                              dtype=dtype, rngs=rngs)
        case "wide":
            return CausalConv(config.d_model, config.wide_kernel, conv, bias=config.conv_bias,
                              dtype=dtype, rngs=rngs)
        case "state":
            return DiagonalSSM(config.d_model, dtype=dtype, rngs=rngs)
        case "sparse":
            return TopKAttention(config.d_model, config.n_heads, config.d_head, config.top_k,
                                 attention, reduction=config.head_reduction, dtype=dtype, rngs=rngs)
        case "dense":
            return FeedForward(config.d_model, config.dense_expand * config.d_model, dense, dtype=dtype,
                               rngs=rngs)
    raise AssertionError(kind)
