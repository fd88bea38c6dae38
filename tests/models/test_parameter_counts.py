"""Exact parameter counts of the shipped configurations."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest
from flax import nnx

from tilelli_jax import config as config_lib
from tilelli_jax.loading.store import build
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.training.config import ExperimentConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = {
    "tilelli-lite-fp32": 10_179_072,
    "tilelli-lite-ternary": 10_179_072,
    "tilelli-fp32": 10_233_856,
    "tilelli-ternary": 10_233_856,
    "vanilla-fp32": 10_087_040,
    "atome-944k": 944_640,
}


def shipped(name: str) -> ModelConfig:
    return config_lib.load(ExperimentConfig, CONFIGS / f"{name}.yaml").model


def n_parameters(config: ModelConfig) -> int:
    """Counted from shapes, without computing weights."""
    params = nnx.state(nnx.eval_shape(lambda: build(config, 0)), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration_has_its_published_size(name: str) -> None:
    config = shipped(name)
    assert n_parameters(config) == SHIPPED[name]
    assert (config.quantizer == "none") == name.endswith("fp32")


@pytest.mark.parametrize("name", SHIPPED)
def test_pytorch_reference_has_the_same_size(name: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    from tilelli_jax.convert import torch_networks

    with torch.device("meta"):
        network = torch_networks.build(config_lib.to_dict(shipped(name)))
    assert sum(parameter.numel() for parameter in network.parameters()) == SHIPPED[name]


def test_sizes_of_checkpoint_options() -> None:
    """Tied Lite with a second norm or convolution biases has the published ~10.12 M parameters."""
    tied = RoutedConfig(tie_embeddings=True)
    assert n_parameters(tied) == 10_179_072 - 256 * 256
    for second_norm in ("mix", "dense"):
        assert n_parameters(dataclasses.replace(tied, second_norm=second_norm)) == 10_117_632
    assert n_parameters(dataclasses.replace(tied, conv_bias=True)) == 10_115_584
    assert n_parameters(RoutedConfig(router_bias=True)) == 10_179_072 + 8 * 3


def test_banks_repeat_every_pathway_and_its_router_columns() -> None:
    block = 5 * 256 + 8 * (2 * 256 * 48 + 256 * 256) + 2 * 4 * 256 * 256 + 3 * 256
    assert n_parameters(RoutedConfig(n_banks=3)) == 10_179_072 + 8 * 2 * block


def test_each_tensor_has_one_learned_scale_and_rotations_are_not_parameters() -> None:
    """LSQ scales: the convolution, 3 × 8 heads, up and down. A stored rotation is not a parameter."""
    lsq = RoutedConfig(quantizer="lsq")
    assert n_parameters(lsq) == 10_179_072 + 8 * (1 + 3 * 8 + 2)
    small = RoutedConfig(d_model=12, quantizer="hadamard")
    assert n_parameters(small) == n_parameters(dataclasses.replace(small, quantizer="none"))


RUNS = [path for path in sorted(CONFIGS.glob("*.yaml"))
        if not path.stem.startswith(("difficulty-", "recall-", "lite-vs-", "claims-", "inference-"))
        and path.stem not in ("abstention", "abstention-demo")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_shipped_configurations_load_and_build(path: Path) -> None:
    """The file loads, its header contains a command with its name, and its network can be built."""
    config = config_lib.load(ExperimentConfig, path)
    assert f"--config {path.stem}" in path.read_text() or path.stem == "demo"
    assert n_parameters(config.model) > 0


def test_demo_and_its_baseline_have_the_same_size_and_budget() -> None:
    ours, baseline = (config_lib.load(ExperimentConfig, CONFIGS / f"{name}.yaml")
                      for name in ("demo", "demo-vanilla"))
    assert abs(n_parameters(ours.model) / n_parameters(baseline.model) - 1) < 0.03
    assert (ours.data, ours.train) == (baseline.data, baseline.train)
