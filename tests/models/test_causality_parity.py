"""Logits depend on earlier tokens and not on later ones: checked by changed inputs and by gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.reference_impl.random_weights import random_network
from tilelli_jax.models import ModelConfig
from tilelli_jax.models.routed import RoutedConfig
from tilelli_jax.models.vanilla import VanillaConfig

TIME = 12
SIZES: dict[str, Any] = {"vocab_size": 2 * TIME, "d_model": 16, "n_layers": 2, "max_seq_len": TIME}
SPARSE: dict[str, Any] = {"n_heads": 2, "d_head": 4, "top_k": 3}
EVERY: Any = ("local", "wide", "state", "sparse", "dense")
CASES: dict[str, ModelConfig] = {
    "lite": RoutedConfig(**SIZES, **SPARSE, dense_expand=2),
    "parent": RoutedConfig(**SIZES, **SPARSE, pathways=EVERY, positions="none", wide_kernel=7),
    "atome": RoutedConfig(**SIZES, **SPARSE, pathways=("local", "state", "sparse"),
                          positions="none", quantizer="ternary",
                          quantize=("conv", "attention", "router", "embed", "unembed")),
    "banks": RoutedConfig(**SIZES, **SPARSE, n_banks=2, second_norm="mix", conv_bias=True),
    "vanilla": VanillaConfig(**SIZES, n_heads=2),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_do_not_depend_on_later_bytes(case: str) -> None:
    model, _ = random_network(CASES[case], seed=0)
    base = np.random.default_rng(0).integers(0, TIME, TIME)
    rows = np.tile(base, (TIME + 1, 1))  # the last row stays as it is
    rows[np.arange(TIME), np.arange(TIME)] += TIME
    run = jax.jit(model.__call__)  # identical operations for each row
    logits = np.concatenate([run(row[None].astype(np.int32)) for row in rows])
    for t in range(TIME):
        changed = np.any(logits[t] != logits[-1], axis=-1)
        assert not changed[:t].any()
        assert changed[t]
        assert t == TIME - 1 or changed[t + 1 :].any()


@pytest.mark.parametrize("case", ["lite", "parent", "vanilla"])
def test_no_gradient_flows_from_a_logit_to_later_bytes(case: str) -> None:
    """Every position has a different byte, so each row of the embedding table is one input position."""
    model, _ = random_network(CASES[case], seed=0)
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    ids = jnp.arange(TIME)[None]

    @jax.jit
    def influence(params: nnx.State) -> jax.Array:
        """[time of the logit, row of the table]: norm of the logit's gradient with respect to the row."""
        jacobian = jax.jacrev(lambda params: nnx.merge(graph, params, *rest)(ids)[0, :, 0])(params)
        return jnp.linalg.norm(jacobian["embed"]["kernel"][...], axis=-1)

    norms = np.asarray(influence(params))[:, :TIME]
    assert np.all(norms[np.triu_indices(TIME, 1)] == 0)
    assert np.all(np.diag(norms) > 0) and norms[TIME - 1, :-1].max() > 0
