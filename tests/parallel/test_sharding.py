"""The mesh, the sharding rules, and the placement of batches on devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tilelli_jax.errors import InputError
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import (
    MeshConfig,
    batch_devices,
    batch_spec,
    local_rows,
    make_mesh,
    path_name,
    place_rows,
    spec,
    split_batch,
)
from tilelli_jax.training.optimizers import OptimizerConfig, make_optimizer
from tilelli_jax.training.step import init_state
from tilelli_jax.training.tasks.text_loss import NextByteLoss

P = PartitionSpec
eight_devices = pytest.mark.eight_devices


def test_one_device_by_default():
    assert len(jax.devices()) == 1


@eight_devices
def test_eight_devices():
    assert len(jax.devices()) == 8


@eight_devices
@pytest.mark.parametrize(("config", "shape"), [
    (MeshConfig(), (8, 1, 1)), (MeshConfig(fsdp=2), (4, 2, 1)), (MeshConfig(1, -1, 2), (1, 4, 2)),
    (MeshConfig(2, 2, 2), (2, 2, 2)), (MeshConfig(8, 1, -1), (8, 1, 1))])
def test_mesh_sizes(config, shape):
    assert config.shape(8) == shape
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert batch_devices(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(("config", "message"), [
    (lambda: MeshConfig(fsdp=3).shape(8), "mesh: data × fsdp × tensor = -1 × 3 × 1 does not make 8 devices"),
    (lambda: MeshConfig(2, 2, 1).shape(8), "2 × 2 × 1 does not make 8 devices"),
    (lambda: MeshConfig(2).shape(1), "does not make 1 device$"),
    (lambda: MeshConfig(0), "found \\(0, 1, 1\\)"), (lambda: MeshConfig(-1, -1), "at most one -1"),
    (lambda: MeshConfig(-2), "≥ 1")])
def test_invalid_meshes_raise(config, message):
    with pytest.raises(InputError, match=message):
        config()


def specs(tree):
    """The specs of all sharded arrays, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): tuple(leaf.sharding.spec) for path, leaf in leaves
            if any(leaf.sharding.spec)}


@pytest.fixture(scope="module")
def mesh():
    """A mesh of 2 × 2 × 2 devices."""
    return make_mesh(MeshConfig(2, 2, 2))


KERNELS = {"embed.kernel": ("tensor", "fsdp"), "unembed.kernel": ("fsdp", "tensor"),
           "positions.table": (None, "fsdp")}
ROUTED = {"blocks.sparse.query.kernel": (None, "tensor", "fsdp", None),
          "blocks.sparse.key.kernel": (None, "tensor", "fsdp", None),
          "blocks.sparse.value.kernel": (None, "tensor", None, "fsdp"),
          "blocks.dense.up.kernel": (None, "fsdp", "tensor"),
          "blocks.dense.down.kernel": (None, "tensor", "fsdp")}


@eight_devices
@pytest.mark.parametrize(("model", "expected"), [
    (RoutedConfig(d_model=16, n_layers=2, max_seq_len=8, n_heads=2, d_head=4, dense_expand=2, n_banks=2,
                  pathways=("local", "wide", "state", "sparse", "dense"), quantizer="lsq",
                  second_norm="mix", conv_bias=True, router_bias=True),
     KERNELS | ROUTED | {path.replace("sparse", "sparse_1").replace("dense", "dense_1"): axes
                         for path, axes in ROUTED.items()}),
    (VanillaConfig(d_model=16, n_layers=2, max_seq_len=8, n_heads=2, dense_expand=2),
     KERNELS | {"blocks.attention.qkv.kernel": (None, "fsdp", "tensor"),
                "blocks.attention.out.kernel": (None, "tensor", "fsdp"),
                "blocks.dense.up.kernel": (None, "fsdp", "tensor"),
                "blocks.dense.down.kernel": (None, "tensor", "fsdp")}),
    # No dimension is divisible: everything is replicated.
    (VanillaConfig(vocab_size=257, d_model=15, n_layers=2, max_seq_len=8, n_heads=1, dense_expand=1), {}),
], ids=["routed", "vanilla", "odd"])
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_matrices_and_their_moments_are_sharded(mesh, model, expected, rule):
    optimizer = make_optimizer(OptimizerConfig(name=rule), 10)
    _, abstract_state, _ = init_state(model, ComputeConfig(), optimizer, NextByteLoss(0.0), 0, mesh)
    assert specs(abstract_state.params) == expected
    moments = [(parameter, axes) for path, axes in specs(abstract_state.opt_state).items()
               for parameter in expected if path.endswith(f".{parameter}")]
    assert len(moments) == len(specs(abstract_state.opt_state))
    assert all(axes == expected[parameter] for parameter, axes in moments)
    # Adam has two moments for each parameter; Muon has one for each matrix inside the blocks.
    matrices = [path for path in expected if path.startswith("blocks.")] if rule == "muon" else []
    assert len(moments) == 2 * len(expected) - len(matrices)


@eight_devices
def test_rules_match_paths(mesh):
    assert spec("unembed.kernel", (16, 256), mesh) == P("fsdp", "tensor")
    assert spec("blocks.dense.up.kernel", (3, 15, 64), mesh) == P(None, None, "tensor")
    assert spec("blocks.router.kernel", (3, 16, 4), mesh) == P()
    assert spec("1.mu.blocks.down.kernel", (3, 16, 16), mesh) == P(None, "tensor", "fsdp")
    assert spec("blocks.startup.kernel", (16, 16), mesh) == P()
    assert spec("count", (), mesh) == P()


@eight_devices
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_place_rows(sizes, axis):
    mesh = make_mesh(MeshConfig(*sizes))
    full = np.arange(3 * 16 * 2, dtype=np.uint8).reshape((16, 3, 2) if axis == 0 else (3, 16, 2))
    rows = local_rows(mesh, 16)
    assert np.array_equal(rows, np.arange(16))  # one process holds all of them
    placed = place_rows(np.take(full, rows, axis), mesh, 16, axis)
    assert placed.sharding == NamedSharding(mesh, batch_spec(3, axis)) and placed.dtype == np.uint8
    assert np.array_equal(placed, full)
    for shard in placed.addressable_shards:
        assert shard.data.shape[axis] == 16 // batch_devices(mesh)
        assert np.array_equal(shard.data, full[shard.index])


@eight_devices
def test_local_rows_of_one_of_several_processes(monkeypatch):
    # Simulates a process with the second half of the devices.
    mesh = make_mesh(MeshConfig(4, 2, 1))
    local = set(jax.devices()[4:])
    full_map = NamedSharding.addressable_devices_indices_map
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map",
                        lambda self, shape: {device: index for device, index in full_map(self, shape).items()
                                             if device in local})
    assert np.array_equal(local_rows(mesh, 16), np.arange(8, 16))


@eight_devices
def test_split_batch(mesh):
    x = jnp.zeros((16, 3))
    assert split_batch(x) is x  # no mesh
    with jax.set_mesh(mesh):
        assert split_batch(jnp.zeros((6, 3))).sharding.is_fully_replicated  # 6 rows on 4 devices
        assert jax.jit(split_batch)(x).sharding.spec[0] == ("data", "fsdp")
