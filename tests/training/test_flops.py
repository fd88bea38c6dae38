"""FLOP formulas compared with counts: of the traced network, and by loops over positions."""

from __future__ import annotations

import math
import types

import jax
import jax.numpy as jnp
import pytest

from tilelli_jax.loading.store import build
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig
from tilelli_jax.parallel.sharding import path_name
from tilelli_jax.training.flops import peak_flops, train_flops_per_token

VANILLA = VanillaConfig(d_model=32, n_layers=3, n_heads=4, max_seq_len=16, vocab_size=64)
PARENT = RoutedConfig(d_model=32, n_layers=2, max_seq_len=16, positions="none", n_banks=2, n_heads=1,
                      d_head=24, top_k=3, dense_expand=2, tie_embeddings=True,
                      pathways=("local", "wide", "state", "sparse", "dense"))
ATOME = RoutedConfig(d_model=32, n_layers=2, max_seq_len=16, n_heads=2, d_head=8, top_k=4,
                     pathways=("local", "state", "sparse"))


def multiplied_weights(config) -> int:
    """Returns the number of weights in the kernels, without an untied embedding, which is a look-up."""
    params = jax.tree_util.tree_flatten_with_path(build_params(config))[0]
    names = [(path_name(path), leaf) for path, leaf in params]
    kernels = {name: math.prod(leaf.shape) for name, leaf in names if "kernel" in name
               and "local" not in name and "wide" not in name}
    if not config.tie_embeddings:
        kernels = {name: size for name, size in kernels.items() if not name.startswith("embed")}
    return sum(kernels.values())


def build_params(config):
    from flax import nnx
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: build(config)), nnx.Param))


@pytest.mark.parametrize("config", [VANILLA, PARENT, ATOME], ids=["vanilla", "parent", "atome"])
def test_six_operations_for_every_weight_and_attention_by_position(config):
    time = 11
    attention = 0
    for t in range(1, time + 1):  # position t attends to t keys
        if config.family == "vanilla":
            attention += config.n_layers * config.d_model * t * (2 * 2 * 3)
        else:
            selected = min(t, config.top_k)
            heads = config.n_layers * config.n_banks * config.n_heads
            attention += heads * (2 * config.d_head * t + 4 * config.d_head * selected
                                  + 6 * config.d_model * selected)
    expected = 6 * multiplied_weights(config) + attention / time
    assert train_flops_per_token(config, time) == pytest.approx(expected, rel=1e-12)


def test_forward_products_of_the_traced_vanilla_network():
    """The traced forward pass is a third of the formula, apart from the masked half of attention."""
    batch, time = 2, VANILLA.max_seq_len
    jaxpr = jax.make_jaxpr(build(VANILLA))(jnp.zeros((batch, time), jnp.int32))
    traced = product_flops(jaxpr.jaxpr) / (batch * time)
    masked = VANILLA.n_layers * 4 * VANILLA.d_model * (time - (time + 1) / 2)
    assert train_flops_per_token(VANILLA) / 3 == pytest.approx(traced - masked, rel=1e-12)


def product_flops(jaxpr) -> int:
    """Returns 2 · multiplications of every dot_general; a scan's body counts once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(shape[axis] for axis in contracted) * equation.outvars[0].aval.size
        times = equation.params.get("length", 1)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * product_flops(inner)
    return total


def test_the_default_length_is_max_seq_len():
    assert train_flops_per_token(ATOME) == train_flops_per_token(ATOME, ATOME.max_seq_len)
    assert train_flops_per_token(ATOME, 8) < train_flops_per_token(ATOME)


@pytest.mark.parametrize(("kind", "teraflops"), [
    ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459), ("TPU v5p", 459),
    ("TPU v6 lite", 918), ("TPU7x", 1153.5),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA B200", 2250), ("NVIDIA A10", 125), ("NVIDIA L40S", 362), ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA A30", 165), ("NVIDIA L4", 121), ("Tesla T4", 65),
    ("NVIDIA GeForce RTX 4090", 165.2)])
def test_peak_of_known_devices(kind, teraflops):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L20", "NVIDIA GeForce RTX 4090 D", "TPU v50",
                                  "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_unknown_devices_have_no_peak(kind):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) is None


def test_a_device_that_is_one_core_of_two_has_half_the_peak():
    assert peak_flops(types.SimpleNamespace(device_kind="TPU v4", num_cores=1)) == 275e12 / 2
    assert peak_flops(types.SimpleNamespace(device_kind="TPU v5", num_cores=2)) == 459e12
    assert peak_flops(types.SimpleNamespace(device_kind="TPU v5 lite", num_cores=1)) == 197e12


def test_this_machines_cpu_has_no_known_peak():
    assert peak_flops(jax.devices("cpu")[0]) is None
