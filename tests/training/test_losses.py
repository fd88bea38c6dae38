"""The training and validation losses compared with explicit sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilelli_jax.data.corpus import ByteCorpus
from tilelli_jax.data.windows import validation_batches
from tilelli_jax.loading.store import build
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.nn.hooks import Tap
from tilelli_jax.parallel.sharding import MeshConfig, local_rows, make_mesh
from tilelli_jax.training.step import split_params
from tilelli_jax.training.tasks.text import held_out_nats
from tilelli_jax.training.tasks.text_loss import NextByteLoss, next_byte_nats

TIME = 8
ROUTED = RoutedConfig(d_model=8, n_layers=2, max_seq_len=TIME, n_heads=1, d_head=4, top_k=3, dense_expand=1)
VANILLA = VanillaConfig(d_model=8, n_layers=1, max_seq_len=TIME, n_heads=1, dense_expand=1)
ROWS = np.random.default_rng(1).integers(0, 256, (4, TIME + 1)).astype(np.uint8)


@pytest.fixture  # arrays become invalid when the devices change
def vanilla():
    return build(VANILLA, 0)


def nats(model, rows):
    """Returns −ln p of every byte except the first of each row, in double precision: [rows, time]."""
    logits = np.asarray(jax.jit(model)(jnp.asarray(rows[:, :-1].astype(np.int32))), np.float64)
    below = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return below - np.take_along_axis(logits, rows[:, 1:, None].astype(int), 2)[..., 0]


def test_training_loss_of_a_routed_network():
    model = build(ROUTED, 0)
    total, metrics = jax.jit(lambda batch: NextByteLoss(0.5)(model, batch, jax.random.key(0)))(
        {"bytes": jnp.asarray(ROWS)})
    assert float(metrics["loss"]) == pytest.approx(nats(model, ROWS).mean(), rel=1e-5)

    _, activations = jax.jit(lambda ids: model.tapped(ids, Tap(record=("router",))))(
        jnp.asarray(ROWS[:, :-1].astype(np.int32)))
    weights = np.asarray(activations["router"], np.float64)  # [blocks, batch, time, paths]
    use = weights.mean((1, 2))
    balance = (3 * (use**2).sum(-1) - 1).mean()
    assert float(metrics["load_balance"]) == pytest.approx(balance, rel=1e-4)
    assert float(total) == pytest.approx(nats(model, ROWS).mean() + 0.5 * balance, rel=1e-5)
    np.testing.assert_allclose(metrics["router_use"], use, rtol=1e-5)
    entropy = -(weights * np.log(weights)).sum(-1).mean((1, 2)) / np.log(3)
    np.testing.assert_allclose(metrics["router_entropy"], entropy, rtol=1e-5)


def test_training_loss_of_a_network_without_routers(vanilla):
    total, metrics = NextByteLoss(0.5)(vanilla, {"bytes": jnp.asarray(ROWS)}, jax.random.key(0))
    assert set(metrics) == {"loss"} and total == metrics["loss"]
    assert float(total) == pytest.approx(nats(vanilla, ROWS).mean(), rel=1e-5)


def test_masked_sum(vanilla):
    mask = np.random.default_rng(0).random((4, TIME)) < 0.5
    total, count = next_byte_nats(vanilla, {"bytes": jnp.asarray(ROWS), "mask": jnp.asarray(mask)})
    assert float(count) == mask.sum()
    assert float(total) == pytest.approx((nats(vanilla, ROWS) * mask).sum(), rel=1e-5)


@pytest.mark.parametrize(("sizes", "batch_size"), [
    ((1, 1, 1), 3), pytest.param((2, 2, 2), 8, marks=pytest.mark.eight_devices)])
def test_validation_loss(vanilla, sizes, batch_size):
    """Every byte except the first counts once, for any division into windows and batches."""
    network, params = split_params(vanilla)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
    text = np.random.default_rng(2).integers(0, 256, 301).astype(np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(text, (0, TIME)), TIME + 1)[::TIME]
    expected = nats(vanilla, windows).ravel()
    for size in (2, 9, 10, 301):
        with jax.set_mesh(mesh):
            batches = validation_batches(ByteCorpus([text]), batch_size=batch_size, seq_len=TIME,
                                         rows=local_rows(mesh, batch_size), max_bytes=size)
            evaluate = held_out_nats(network, batches, mesh, batch_size=batch_size)
            losses = [evaluate(params), evaluate(params)]
        assert losses[0] == pytest.approx(expected[:size - 1].mean(), rel=1e-6)
        assert losses[0] == losses[1]
