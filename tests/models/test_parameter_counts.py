"""The sizes of the shipped configurations, to the last parameter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest
from flax import nnx

from tilelli_jax import config as config_lib
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.store import build
from tilelli_jax.training.experiment import ExperimentConfig

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
    """Counted on shapes alone: nothing is computed."""
    params = nnx.state(nnx.eval_shape(lambda: build(config, 0)), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration_has_its_published_size(name: str) -> None:
    config = shipped(name)
    assert n_parameters(config) == SHIPPED[name]
    assert (config.quantizer == "none") == name.endswith("fp32")


@pytest.mark.parametrize("name", SHIPPED)
def test_restatement_has_the_same_size(name: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch (extra: torch) is not installed")
    from tilelli_jax.convert import torch_networks

    with torch.device("meta"):
        network = torch_networks.build(config_lib.to_dict(shipped(name)))
    assert sum(parameter.numel() for parameter in network.parameters()) == SHIPPED[name]


def test_options_that_a_stored_checkpoint_may_have() -> None:
    """Lite tied, with a second norm or with convolution biases: the published ~10.12 M."""
    tied = RoutedConfig(tie_embeddings=True)
    assert n_parameters(tied) == 10_179_072 - 256 * 256
    for second_norm in ("mix", "dense"):
        assert n_parameters(dataclasses.replace(tied, second_norm=second_norm)) == 10_117_632
    assert n_parameters(dataclasses.replace(tied, conv_bias=True)) == 10_115_584
    assert n_parameters(RoutedConfig(router_bias=True)) == 10_179_072 + 8 * 3


def test_banks_repeat_every_pathway_and_its_share_of_the_router() -> None:
    block = 5 * 256 + 8 * (2 * 256 * 48 + 256 * 256) + 2 * 4 * 256 * 256 + 3 * 256
    assert n_parameters(RoutedConfig(n_banks=3)) == 10_179_072 + 8 * 2 * block


def test_learned_scales_are_one_for_each_tensor_and_rotations_none() -> None:
    """LSQ: the convolution, 3 × 8 heads, up and down; a stored rotation is no parameter."""
    lsq = RoutedConfig(quantizer="lsq")
    assert n_parameters(lsq) == 10_179_072 + 8 * (1 + 3 * 8 + 2)
    small = RoutedConfig(d_model=12, quantizer="hadamard")
    assert n_parameters(small) == n_parameters(dataclasses.replace(small, quantizer="none"))


RUNS = [path for path in sorted(CONFIGS.glob("*.yaml"))
        if not path.stem.startswith(("difficulty-", "recall-", "lite-vs-", "claims-"))
        and path.stem not in ("abstention", "abstention-demo")]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_one(path: Path) -> None:
    """It loads, its header names a command with itself, and its network can be built."""
    config = config_lib.load(ExperimentConfig, path)
    assert f"--config {path.stem}" in path.read_text() or path.stem == "demo"
    assert n_parameters(config.model) > 0


def test_the_demo_and_what_it_is_held_against_are_of_one_size_and_budget() -> None:
    ours, rival = (config_lib.load(ExperimentConfig, CONFIGS / f"{name}.yaml")
                   for name in ("demo", "demo-vanilla"))
    assert abs(n_parameters(ours.model) / n_parameters(rival.model) - 1) < 0.03
    assert (ours.data, ours.train) == (rival.data, rival.train)
