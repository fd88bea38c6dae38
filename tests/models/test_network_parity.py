"""Compares whole networks with loops in float64, and with PyTorch in f32 (logits and gradients)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.extras import needs_torch
from tests.reference_impl import loops
from tests.reference_impl.comparison import distance, farthest
from tests.reference_impl.random_weights import random_network
from tests.tolerance import noise
from tilelli_jax import config as config_lib
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.arrays import to_arrays
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig

# Relative to the largest number, after two layers and the unembedding, for gradients also backwards.
# Measured in all cases, with SSE4.2 and AVX2: f32 and float64 differ by 7e-7, gradients from PyTorch's by
# 6e-6. One different key or ternary code changes them by more than 1e-3.
LOGITS, GRADIENTS = noise(1, steps=3), noise(1, steps=8)

VOCAB, TIME = 17, 13
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "n_layers": 2, "max_seq_len": 16}
ROUTED = RoutedConfig(**SIZES, d_model=16, n_heads=3, d_head=6, top_k=4, dense_expand=2,
                      wide_kernel=7)
VANILLA = VanillaConfig(**SIZES, d_model=12, n_heads=3, dense_expand=2)
EVERY: Any = ("local", "wide", "state", "sparse", "dense")
ATOME: Any = ("local", "state", "sparse")
ALL: Any = ("conv", "attention", "dense", "router", "embed", "unembed")

CASES: dict[str, ModelConfig] = {
    "lite": ROUTED,
    "parent": dataclasses.replace(ROUTED, pathways=EVERY, positions="none", n_heads=1),
    "atome": dataclasses.replace(ROUTED, pathways=ATOME, positions="none", n_heads=1,
                                 quantizer="ternary", quantize=ALL),
    "banks": dataclasses.replace(ROUTED, n_banks=2, second_norm="dense", head_reduction="sum",
                                 conv_bias=True, router_bias=True),
    "second norm": dataclasses.replace(ROUTED, pathways=("wide", "sparse"), second_norm="mix",
                                       tie_embeddings=True, top_k=2),
    "ternary": dataclasses.replace(ROUTED, quantizer="ternary", conv_bias=True),
    "ternary row": dataclasses.replace(ROUTED, quantizer="ternary_row", quantize=ALL,
                                       tie_embeddings=True),
    "hadamard": dataclasses.replace(ROUTED, quantizer="hadamard", quantize=ALL),
    "hadamard 12": dataclasses.replace(ROUTED, quantizer="hadamard", quantize=ALL, d_model=12),
    "lsq": dataclasses.replace(ROUTED, quantizer="lsq", quantize=ALL, pathways=EVERY),
    "power3": dataclasses.replace(ROUTED, quantizer="power3", quantize=ALL),
    "power3 row": dataclasses.replace(ROUTED, quantizer="power3_row", quantize=ALL),
    "vanilla": VANILLA,
    "vanilla ternary": dataclasses.replace(VANILLA, quantizer="ternary", tie_embeddings=True,
                                           quantize=("attention", "dense", "embed", "unembed")),
    "vanilla lsq": dataclasses.replace(VANILLA, quantizer="lsq"),
}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Bytes [batch, time], the second row with repetitions, and the gradient at the logits."""
    rng = np.random.default_rng(1)
    ids = rng.integers(0, VOCAB, (2, TIME))
    ids[1] = np.resize(ids[1, :3], TIME)
    return ids.astype(np.int32), rng.standard_normal((2, TIME, VOCAB)).astype(np.float32)


@functools.cache  # both tests of a case use it, and compilation is slow
def ours(case: str) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """The library's parameters, logits and gradients by name."""
    model, arrays = random_network(CASES[case], seed=len(case))
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    ids, probe = inputs()

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graph, params, *rest)(jnp.asarray(ids))
        return jnp.sum(logits * probe), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    by_name = to_arrays(nnx.merge(graph, gradients, *rest))
    return arrays, np.asarray(logits), {name: value for name, value in by_name.items()
                                        if not name.endswith("rotation")}


# One case for each kind of block and quantiser; the exhaustive tests run the others.
QUICK = ("atome", "banks", "second norm", "ternary row", "hadamard 12", "lsq", "power3 row",
         "vanilla ternary")
cases = pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case in QUICK else pytest.mark.exhaustive) for case in CASES])


@cases
def test_logits_match_float64_loops(case: str) -> None:
    arrays, logits, _ = ours(case)
    expected = loops.forward(config_lib.to_dict(CASES[case]), arrays, inputs()[0])
    assert distance(logits, expected) < LOGITS


@needs_torch
@cases
def test_logits_and_gradients_match_pytorch(case: str) -> None:
    arrays, logits, gradients = ours(case)
    torch_logits, their_gradients = pytorch_results(config_lib.to_dict(CASES[case]), arrays, "exact")
    assert distance(logits, torch_logits) < LOGITS
    assert all(np.any(value) for value in their_gradients.values())  # all parameters have gradients
    largest, name = farthest(gradients, their_gradients)
    assert largest < GRADIENTS, name


def pytorch_results(config: dict[str, Any], arrays: dict[str, np.ndarray],
                    form: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """PyTorch's logits, and gradients by name."""
    import torch

    from tilelli_jax.convert import torch_networks

    ids, probe = (torch.from_numpy(value) for value in inputs())
    network = torch_networks.build(config, form)
    torch_networks.load_arrays(network, arrays)
    logits = network(ids)
    (logits * probe).sum().backward()
    return logits.detach().numpy(), torch_networks.named_gradients(network)


@needs_torch
@pytest.mark.parametrize("case", ["lite", "atome"])
def test_all_forms_of_the_pytorch_reference_agree(case: str) -> None:
    """`torch.topk` does not define the order of ties; without ties all forms must agree."""
    _, arrays = random_network(CASES[case], seed=0)
    config = config_lib.to_dict(CASES[case])
    exact, *others = (pytorch_results(config, arrays, form) for form in ("exact", "fast", "written"))
    for logits, gradients in others:
        assert distance(logits, exact[0]) < LOGITS
        assert farthest(gradients, exact[1])[0] < GRADIENTS
