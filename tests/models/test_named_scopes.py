"""A profile names blocks, pathways and layers: the scopes are in the compiled programs' metadata."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tilelli_jax.loading.store import build
from tilelli_jax.models import GPTNeoXConfig, RoutedConfig, VanillaConfig
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.gemma3 import Gemma3Config
from tilelli_jax.models.gemma4 import Gemma4Config
from tilelli_jax.models.llama import LlamaConfig
from tilelli_jax.models.t5 import T5Config

CONFIGS: dict[str, Any] = {
    "routed": RoutedConfig(d_model=16, n_layers=2, max_seq_len=16, n_heads=2, d_head=8, top_k=4,
                           pathways=("local", "wide", "sparse", "state", "dense")),
    "vanilla": VanillaConfig(d_model=16, n_layers=2, max_seq_len=16, n_heads=2),
    "gpt_neox": GPTNeoXConfig(vocab_size=61, d_model=16, n_layers=2, n_heads=2, d_hidden=32),
    "llama": LlamaConfig(vocab_size=61, d_model=16, layers=("full",) * 2, n_heads=4, n_kv_heads=2, d_head=4,
                         d_hidden=20),
    "gemma3": Gemma3Config(vocab_size=61, d_model=16, layers=("sliding", "full"), n_heads=4, n_kv_heads=2,
                           d_head=4, d_hidden=20, window=5),
    "gemma4": Gemma4Config(vocab_size=61, d_model=12, layers=("sliding", "full"), n_heads=2, n_kv_heads=1,
                           d_head=4, n_kv_heads_full=1, d_head_full=8, window=5, n_shared_layers=0,
                           d_hidden=20, d_per_layer=4, vocab_per_layer=61, n_experts=4, experts_per_token=2,
                           d_expert=8),
    "t5": T5Config(vocab_size=61, d_model=16, n_layers=1, n_decoder_layers=1, n_heads=2, d_head=8,
                   d_hidden=32)}
TRANSFORMER = {"blocks/attention", "blocks/mlp", "blocks/norm"}
SCOPES: dict[str, set[str]] = {
    "routed": {f"blocks/{name}"
               for name in ("local", "wide", "sparse", "state", "dense/mlp", "router", "norm")},
    "vanilla": TRANSFORMER, "gpt_neox": TRANSFORMER, "llama": TRANSFORMER, "gemma3": TRANSFORMER,
    "gemma4": {f"block_{i}/{name}" for i in (0, 1) for name in
               ("attention", "mlp", "norm", "router", "experts", "per_layer_input")},
    "t5": {"decoder/block_0/cross/attention", *(
        f"{part}/block_0/{name}" for part in ("encoder", "decoder")
        for name in ("attention", "mlp", "norm"))}}
COMMON = {"embedding", "unembedding"}


def scopes(function: Any, *inputs: Any) -> str:
    """The names of the compiled program's operations, one a line."""
    program = jax.jit(function).lower(*inputs).compile().as_text()
    return "\n".join(sorted(set(re.findall(r'op_name="([^"]*)"', program))))


def has_scope(names: str, scope: str) -> bool:
    """Whether an operation lies in these nested scopes.

    Between two of them there may be loops and calls: `while/body/closed_call`, in newer JAX `eval_jaxpr`.
    """
    return re.search(r"/" + "/(?:.*/)?".join(map(re.escape, scope.split("/"))) + "/", names) is not None


@pytest.mark.parametrize("family", [
    *(name for name in CONFIGS if name != "gemma4"), pytest.param("gemma4", marks=pytest.mark.exhaustive)])
def test_forward_pass(family: str) -> None:
    graph, params = nnx.split(build(CONFIGS[family], 0))
    ids = jnp.ones((1, 8), jnp.int32)
    if family == "t5":
        names = scopes(lambda params: nnx.merge(graph, params)(ids, ids), params)
    else:
        names = scopes(lambda params: nnx.merge(graph, params).nll(ids)[0], params)
    expected = SCOPES[family] | COMMON | ({"loss"} if family != "t5" else set())
    assert not {scope for scope in expected if not has_scope(names, scope)}, names


@pytest.mark.exhaustive
@pytest.mark.parametrize("scan", [True, False])
def test_gradients_and_decoding(scan: bool) -> None:
    """Gradients keep the names of the forward pass; where layers run separately, blocks have numbers."""
    model = build(CONFIGS["routed"], 0, ComputeConfig(scan_layers=scan))
    graph, params = nnx.split(model)
    ids = jnp.ones((1, 8), jnp.int32)
    names = scopes(jax.grad(lambda params: nnx.merge(graph, params).nll(ids)[0].mean()), params)
    block = "blocks" if scan else "block_1"
    assert re.search(rf"transpose\(jvp\({block}\)\).*/sparse", names) or re.search(
        rf"transpose\(jvp.*{block}/sparse", names), names

    def decode(params: Any) -> jax.Array:
        network = nnx.merge(graph, params)
        logits, caches = network.prefill(ids, jnp.array([8]), 16)
        return logits + network.step(ids[:, 0], caches, jnp.array([8]))[0]
    names = scopes(decode, params)
    assert all(f"/block_{i}/{pathway}" in names for i in (0, 1) for pathway in ("local", "state", "router"))
