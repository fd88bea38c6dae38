"""Networks sharded over eight devices compute the same logits as on one; no device holds all weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.reference_impl.comparison import assert_same_weights, distance
from tests.reference_impl.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax.generation.decoding import generate_ids
from tilelli_jax.loading import store
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.models.gemma3 import FlaxGemma3ForCausalLM, Gemma3Config
from tilelli_jax.models.gemma4 import FlaxGemma4ForCausalLM, Gemma4Config
from tilelli_jax.models.gpt_neox import FlaxGPTNeoXForCausalLM, GPTNeoXConfig
from tilelli_jax.models.llama import FlaxLlamaForCausalLM, LlamaConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.t5 import FlaxT5ForConditionalGeneration, T5Config
from tilelli_jax.models.t5_decoding import continue_ids
from tilelli_jax.parallel.sharding import MeshConfig, batch_spec, make_mesh

NEOX = GPTNeoXConfig(vocab_size=64, d_model=32, n_layers=2, max_seq_len=32, n_heads=4, d_hidden=64)
GEMMA = Gemma4Config(
    vocab_size=64, d_model=32, layers=("sliding", "full", "full"), max_seq_len=64, n_heads=4,
    n_kv_heads=2, d_head=8, n_kv_heads_full=1, d_head_full=16, window=5, n_shared_layers=1, d_hidden=64,
    d_per_layer=8, vocab_per_layer=64)
ONE_LAYER = dataclasses.replace(GEMMA, layers=("full",), n_shared_layers=0)
EXPERTS = Gemma4Config(
    vocab_size=64, d_model=32, layers=("sliding", "full"), n_heads=4, n_kv_heads=2, d_head=8,
    n_kv_heads_full=2, d_head_full=16, window=5, n_shared_layers=0, key_is_value=True, d_hidden=64,
    d_per_layer=0, n_experts=8, experts_per_token=2, d_expert=16)
LLAMA = LlamaConfig(vocab_size=64, d_model=32, layers=("full", "sliding"), window=5, model_type="qwen2",
                    max_seq_len=32, n_heads=8, n_kv_heads=4, d_head=8, d_hidden=64, tie_embeddings=False)
GEMMA3 = Gemma3Config(vocab_size=64, d_model=32, layers=("sliding", "full"), max_seq_len=32, n_heads=4,
                      n_kv_heads=2, d_head=8, d_hidden=64, window=5, query_scale=8, end_ids=(1,))
T5 = T5Config(vocab_size=64, d_model=32, n_layers=2, n_decoder_layers=2, n_heads=4, d_head=8, d_hidden=64)
TIED = RoutedConfig(vocab_size=64, d_model=32, n_layers=2, max_seq_len=32, n_heads=4, d_head=8, top_k=4,
                    tie_embeddings=True)
CASES = {
    "routed, tied": (TIED, None), "gpt_neox": (NEOX, FlaxGPTNeoXForCausalLM),
    "llama": (LLAMA, FlaxLlamaForCausalLM), "gemma3": (GEMMA3, FlaxGemma3ForCausalLM),
    "gemma4": (GEMMA, FlaxGemma4ForCausalLM), "gemma4 with experts": (EXPERTS, FlaxGemma4ForCausalLM),
    "t5": (T5, FlaxT5ForConditionalGeneration)}
MESHES = [MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=1, tensor=4),
          MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, tensor=4)]
# Relative to the largest logit, because sums are in another order. Measured on several CPUs: at most 6e-6.
NOISE = noise(1, steps=13)


def pairs(*quick: tuple[str, int]) -> list[Any]:
    """Every network on every mesh; all but those in `quick` run in `make test-all` only."""
    return [pytest.param(name, mesh, id=f"{name}-{mesh}",
                         marks=() if (name, i) in quick else pytest.mark.exhaustive)
            for name in CASES for i, mesh in enumerate(MESHES)]


def inputs(name: str) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 64, (8, 12)).astype(np.int32) for _ in range(2 if name == "t5" else 1)]


def forward(model: nnx.Module) -> Callable[..., jax.Array]:
    """(parameters, inputs) → logits; one compiled program for networks of the same shapes and shardings."""
    graph, _ = nnx.split(model)
    return jax.jit(lambda params, *ids: nnx.merge(graph, params)(*ids))


@functools.cache
def logits_on_one_device(name: str) -> np.ndarray:
    model = random_network(CASES[name][0], 0)[0]
    return np.asarray(forward(model)(nnx.state(model), *inputs(name)))


@functools.cache
def decode_on_one_device(name: str) -> list[list[int]]:
    return decode(random_network(CASES[name][0], 0)[0], name)


def decode(model: Any, name: str) -> list[list[int]]:
    """Greedy tokens after the inputs (T5) or after prompts of all lengths."""
    if name == "t5":
        return np.asarray(continue_ids(model, jnp.asarray(inputs(name)[0]), n=6, temperature=0)).tolist()
    prompts = [np.arange(1, 2 + n) for n in range(8)]
    outputs = generate_ids(model, prompts, max_new=6, temperature=0, end_ids=())
    return [output.ids.tolist() for output in outputs]


@pytest.mark.parametrize("name", [
    "routed, tied",
    *(pytest.param(name, marks=pytest.mark.exhaustive)
      for name in ("gpt_neox", "llama", "gemma3", "gemma4", "gemma4 with experts", "t5"))])
def test_parameters_in_bfloat16(name: str, tmp_path: Path) -> None:
    """Weights are rounded when they are read; results in float32 differ only by this rounding."""
    config, _ = CASES[name]
    model, arrays = random_network(config, 0)
    store.save(model, tmp_path)
    half = store.load(tmp_path, param_dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    rounded = store.from_arrays(config, {key: np.asarray(array.astype(jnp.bfloat16), np.float32)
                                         for key, array in arrays.items()})
    run = forward(half)
    expected, result = (np.asarray(run(nnx.state(network), *inputs(name))) for network in (rounded, half))
    assert distance(result, expected) < NOISE < 1e-3 < distance(result, logits_on_one_device(name))
    store.save(half, tmp_path / "half")
    again = store.load(tmp_path / "half", param_dtype="stored")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(half))


@pytest.mark.eight_devices
@pytest.mark.parametrize(("name", "mesh_config"), pairs(
    ("routed, tied", 3), ("llama", 3), ("gemma4", 2)))
def test_logits_are_the_same(name: str, mesh_config: MeshConfig, tmp_path: Path) -> None:
    config, network = CASES[name]
    model = random_network(config, 0)[0]
    store.save(model, tmp_path / "ours")
    mesh = make_mesh(mesh_config)
    sharded = store.load(tmp_path / "ours", mesh=mesh)
    leaves = jax.tree.leaves(nnx.state(sharded, nnx.Param))
    total_bytes = sum(leaf.nbytes for leaf in leaves)
    local_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    parts = mesh_config.fsdp * mesh_config.tensor
    assert local_bytes < 1.35 * total_bytes / parts, "only small arrays such as norms are replicated"
    with jax.set_mesh(mesh):
        ids = [jax.device_put(part, jax.NamedSharding(mesh, batch_spec(2))) for part in inputs(name)]
        logits = forward(sharded)(nnx.state(sharded), *ids)
    assert len(logits.sharding.device_set) == 8
    assert distance(np.asarray(logits), logits_on_one_device(name)) < NOISE
    if network is not None:
        model.save_pretrained(tmp_path / "theirs")
        again = network.from_pretrained(tmp_path / "theirs", mesh=mesh)
        assert_same_weights(again, sharded)
        assert ([leaf.sharding for leaf in jax.tree.leaves(nnx.state(again))]
                == [leaf.sharding for leaf in jax.tree.leaves(nnx.state(sharded))])


@pytest.mark.eight_devices
@pytest.mark.parametrize(("name", "mesh_config"), pairs(("routed, tied", 2)))
def test_decoding_is_the_same(name: str, mesh_config: MeshConfig, tmp_path: Path) -> None:
    store.save(random_network(CASES[name][0], 0)[0], tmp_path)
    mesh = make_mesh(mesh_config)
    sharded = store.load(tmp_path, mesh=mesh)
    with jax.set_mesh(mesh):
        result = decode(sharded, name)
    assert result == decode_on_one_device(name)


@pytest.mark.eight_devices
def test_host_table_with_a_mesh(tmp_path: Path) -> None:
    model = random_network(ONE_LAYER, 0)[0]
    store.save(model, tmp_path)
    mesh = make_mesh(MESHES[2])
    sharded = store.load(tmp_path, ComputeConfig(host_tables=True), mesh=mesh)
    ids = inputs("gemma4")[0]
    expected = np.asarray(forward(model)(nnx.state(model), ids))
    with jax.set_mesh(mesh):
        result = jax.jit(sharded.__call__)(jax.device_put(ids, jax.NamedSharding(mesh, batch_spec(2))))
        rows = sharded.embed_per_layer(ids)
    assert distance(np.asarray(result), expected) < NOISE
    np.testing.assert_array_equal(rows, model.embed_per_layer.kernel[...][ids])


@pytest.mark.eight_devices
@pytest.mark.exhaustive
def test_host_table_with_a_mesh_without_jit(tmp_path: Path) -> None:
    model = random_network(ONE_LAYER, 0)[0]
    store.save(model, tmp_path)
    mesh = make_mesh(MESHES[2])
    sharded = store.load(tmp_path, ComputeConfig(host_tables=True), mesh=mesh)
    ids = inputs("gemma4")[0]
    expected = np.asarray(forward(model)(nnx.state(model), ids))
    with jax.set_mesh(mesh):
        assert distance(np.asarray(sharded(ids)), expected) < NOISE
