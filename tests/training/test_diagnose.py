"""Sentences that locate numbers that are not finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilelli_jax.loading.store import build
from tilelli_jax.models import VanillaConfig
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.training.diagnose import diagnose
from tilelli_jax.training.step import split_params
from tilelli_jax.training.tasks.text_loss import NextByteLoss

CONFIG = VanillaConfig(d_model=8, n_layers=3, max_seq_len=8, n_heads=1, dense_expand=1)
BATCH = {"bytes": jnp.asarray(np.arange(36, dtype=np.uint8).reshape(4, 9))}


@pytest.fixture(scope="module")
def network():
    return split_params(build(CONFIG, 0))


def sentences(network, poison=lambda params: params, loss=None):
    graph, params = network
    params = poison(jax.tree.map(np.array, params))
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        return diagnose(graph, params, BATCH, jax.random.key(0), loss or NextByteLoss(0.0), mesh)


def test_nothing_wrong(network):
    stream, logits = sentences(network)
    assert stream.startswith("the residual stream is finite, at most ") and "(after block" in stream
    assert logits.startswith("the logits are finite, at most ")


def test_a_poisoned_parameter_and_the_first_block_it_reaches(network):
    def poison(params):
        params["blocks"]["dense"]["up"]["kernel"][1, 2, 3] = np.nan
        return params
    messages = sentences(network, poison)
    assert messages[0] == "parameters not finite before the update: blocks.dense.up.kernel"
    assert messages[1] == "the residual stream is not finite after block 1 of 3"
    assert messages[2] == "the logits are not finite"
    assert messages[3].startswith("gradients not finite: ")
    assert " and " in messages[3] and " more" in messages[3]


def test_an_overflow_in_the_unembedding(network):
    def poison(params):
        params["unembed"]["kernel"] *= 1e38
        return params
    messages = sentences(network, poison)
    assert messages[0].startswith("the residual stream is finite")
    assert messages[1] == "the logits are not finite"
    assert not [sentence for sentence in messages if sentence.startswith("parameters")]


def test_a_gradient_alone(network):
    def loss(model, batch, key):
        total, metrics = NextByteLoss(0.0)(model, batch, key)
        return total + jnp.sqrt(0.0 * jnp.sum(model.final_norm.bias[...])), metrics
    messages = sentences(network, loss=loss)
    assert messages[1].startswith("the logits are finite")
    assert messages[2] == "gradients not finite: final_norm.bias"
