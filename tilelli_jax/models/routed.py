"""Tilelli's routed networks: Lite, the parent and atome are configurations of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.models.decoder import ComputeConfig, Decoder
from tilelli_jax.nn.attention import TopKAttention
from tilelli_jax.nn.conv import CausalConv
from tilelli_jax.nn.dense import FeedForward
from tilelli_jax.nn.norm import LayerNorm
from tilelli_jax.nn.quantize import Quantizer, QuantizerName, quantizer
from tilelli_jax.nn.router import Router
from tilelli_jax.nn.ssm import DiagonalSSM
from tilelli_jax.nn.tap import OFF, Recorded, Tap
from tilelli_jax.nn.topk import Reduction

Pathway = Literal["local", "wide", "state", "sparse", "dense"]
Quantized = Literal["conv", "attention", "dense", "router", "embed", "unembed"]


@dataclasses.dataclass(frozen=True)
class RoutedConfig(Section):
    """A routed byte-level language model."""

    family: Literal["routed"] = setting("routed", "which network")
    vocab_size: int = setting(256, "number of tokens: bytes", min=1)
    d_model: int = setting(256, "width of the residual stream", min=1)
    n_layers: int = setting(8, "number of blocks", min=1)
    max_seq_len: int = setting(256, "longest context in bytes (a limit where positions are learned)", min=1)
    positions: Literal["learned", "none"] = setting("learned", "how a position is known")
    tie_embeddings: bool = setting(False, "unembed with the embedding table")
    pathways: tuple[Pathway, ...] = setting(
        ("local", "sparse", "dense"), "pathways of a block, in the router's order")
    n_banks: int = setting(1, "copies of every pathway; the router chooses pathway and copy", min=1)
    local_kernel: int = setting(5, "taps of the local convolution", min=1)
    wide_kernel: int = setting(15, "taps of the wide convolution", min=1)
    n_heads: int = setting(8, "heads of the sparse attention", min=1)
    d_head: int = setting(48, "width of its queries and keys, each head", min=1)
    top_k: int = setting(16, "keys that a query attends to", min=1)
    head_reduction: Reduction = setting("mean", "how the heads' outputs are joined")
    dense_expand: int = setting(4, "hidden width of the dense pathway, in units of d_model", min=1)
    second_norm: Literal["none", "mix", "dense"] = setting(
        "none", "a second LayerNorm in each block: of the mix before it is added, or of the input "
                "of the dense pathways")
    conv_bias: bool = setting(False, "biases in the convolutions")
    router_bias: bool = setting(False, "a bias in the router")
    abstain_head: bool = setting(False, "one more logit at each position: whether to abstain")
    quantizer: QuantizerName = setting("none", "how weights are quantised")
    quantize: tuple[Quantized, ...] = setting(
        ("conv", "attention", "dense"), "which weights the quantiser takes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pathways or len(set(self.pathways)) != len(self.pathways):
            raise InputError(f"pathways: expected different pathways, at least one, found "
                             f"{list(self.pathways)} (n_banks makes copies)")


class RoutedBlock(nnx.Module):
    """x ← x + Σ_i r_i · P_i(h), with h = LayerNorm(x) and r = router(h), token by token."""

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
        """`[batch, time, d_model]` → the same; offers router `[batch, time, n_paths]` and mix."""
        y, _, seen = self._mix(x, lambda name, h: (getattr(self, name)(h), None), tap)
        return y, seen

    def prefill(self, x: jax.Array, lengths: jax.Array, size: int) -> tuple[jax.Array, dict[str, Any]]:
        y, cache, _ = self._mix(x, lambda name, h: getattr(self, name).prefill(h, lengths, size), OFF)
        return y, cache

    def step(self, x: jax.Array, cache: dict[str, Any],
             position: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        y, cache, _ = self._mix(x, lambda name, h: getattr(self, name).step(h, cache[name], position), OFF)
        return y, cache

    def _mix(self, x: jax.Array, run: Callable[[str, jax.Array], tuple[jax.Array, Any]],
             tap: Tap) -> tuple[jax.Array, dict[str, Any], Recorded]:
        """The block around whichever way the pathways are run: all at once, prefilling, stepping."""
        seen: Recorded = {}
        h = self.norm(x)
        dense_input = self.norm2(x) if self.second_norm == "dense" else h
        weights = tap("router", self.router(h), seen)
        mixed, caches = jnp.zeros_like(h), {}
        for i, name in enumerate(self.names):
            y, caches[name] = run(name, dense_input if name.startswith("dense") else h)
            mixed = mixed + weights[..., i : i + 1].astype(y.dtype) * y
        if self.second_norm == "mix":
            mixed = self.norm2(mixed)
        return x + tap("mix", mixed, seen), caches, seen


class RoutedLM(Decoder):
    """A decoder of routed blocks."""

    places = (*Decoder.places, "router", "mix")
    reads_bytes = True

    def __init__(self, config: RoutedConfig, *, rngs: nnx.Rngs, compute: ComputeConfig | None = None):
        compute = compute or ComputeConfig()
        dtype = jnp.dtype(compute.dtype)
        super().__init__(config, lambda rngs: RoutedBlock(config, dtype=dtype, rngs=rngs),
                         embed=_quantizer(config, "embed"), unembed=_quantizer(config, "unembed"),
                         compute=compute, rngs=rngs)


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
