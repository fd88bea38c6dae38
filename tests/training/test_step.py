"""One update: accumulation, precision, remat, scan, donation, and what it does with bad numbers."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.models.decoder import ComputeConfig
from tilelli_jax.sharding import MeshConfig, make_mesh
from tilelli_jax.store import build
from tilelli_jax.training.losses import next_byte_loss
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.step import make_training

TIME = 8
ROUTED = RoutedConfig(d_model=16, n_layers=2, max_seq_len=TIME, n_heads=2, d_head=4, top_k=3, dense_expand=2)
VANILLA = VanillaConfig(d_model=16, n_layers=2, max_seq_len=TIME, n_heads=2, dense_expand=2)
SMOOTH = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", eps=1e-3, clip_norm=0.0)
ROWS = np.random.default_rng(0).integers(0, 256, (12, TIME + 1)).astype(np.uint8)


class Training:
    """A state and its update on one device."""

    def __init__(self, model, compute=None, optimizer=SMOOTH, load_balance=0.0, loss=None, start=None):
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.network, _, make, self.update = make_training(
                model, compute or ComputeConfig(), optimizer, steps=10,
                loss=loss or next_byte_loss(load_balance), seed=0, mesh=self.mesh, model=start)
            self.state = make()

    def __call__(self, rows, parts=1, index=None):
        index = int(self.state.step) if index is None else index
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.update(
                self.state, {"bytes": jnp.asarray(rows.reshape(parts, -1, TIME + 1))}, np.int32(index))
        return jax.device_get(metrics)


def assert_close(ours, theirs, rtol=1e-5):
    """Leaf by leaf; where a number is close to 0, in units of its array."""
    def one(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())
    jax.tree.map(one, jax.device_get(ours), jax.device_get(theirs))


@pytest.fixture(scope="module")
def two_updates():
    """The metrics and the state of two updates of the routed network."""
    training = Training(ROUTED)
    return [training(ROWS), training(ROWS[::-1])], training.state


def test_accumulated_parts_are_one_batch(two_updates):
    metrics, state = two_updates
    training = Training(ROUTED)
    for rows, whole in zip((ROWS, ROWS[::-1]), metrics, strict=True):
        accumulated = training(rows, parts=3)
        # The load balance of three parts is not that of the whole; it was given no weight.
        assert accumulated.pop("load_balance") != whole["load_balance"]
        assert_close(accumulated, {key: whole[key] for key in accumulated})
    assert_close(training.state.params, state.params)


@pytest.mark.parametrize("compute", [ComputeConfig(remat=True), ComputeConfig(scan_layers=False)],
                         ids=["remat", "unrolled"])
def test_how_layers_are_run_changes_nothing(two_updates, compute):
    metrics, state = two_updates
    training = Training(ROUTED, compute)
    for rows, expected in zip((ROWS, ROWS[::-1]), metrics, strict=True):
        found = training(rows)
        # The balance is a difference of numbers near 1, and has their rounding errors.
        np.testing.assert_allclose(found.pop("load_balance"), expected["load_balance"], atol=1e-6)
        assert_close(found, {key: expected[key] for key in found})
    assert_close(training.state.params, state.params)


def test_remat_computes_activations_again():
    def gelus(compute):
        training = Training(VANILLA, compute)
        batch = {"bytes": jnp.asarray(ROWS[None])}
        return str(training.update.trace(training.state, batch, np.int32(0)).jaxpr).count("= erf")
    assert gelus(ComputeConfig(remat=True)) > gelus(ComputeConfig())


def test_bfloat16_trains_and_keeps_float32_parameters(two_updates):
    metrics, _ = two_updates
    training = Training(ROUTED, ComputeConfig(dtype="bfloat16"))
    losses = [float(training(ROWS)["loss"]) for _ in range(8)]
    assert losses[0] == pytest.approx(float(metrics[0]["loss"]), rel=2e-2)
    assert losses[0] != float(metrics[0]["loss"])  # it did compute in another type
    assert losses[-1] < losses[0] - 0.5
    floats = [leaf for leaf in jax.tree.leaves((training.state.params, training.state.opt_state))
              if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def test_program_does_not_grow_with_depth():
    def size(n_layers, **compute):
        training = Training(dataclasses.replace(VANILLA, n_layers=n_layers), ComputeConfig(**compute))
        batch = {"bytes": jnp.asarray(ROWS[None])}
        return len(training.update.lower(training.state, batch, np.int32(0)).as_text())
    assert size(16) < 1.02 * size(2)
    assert size(4, scan_layers=False) > 1.3 * size(2, scan_layers=False)


def test_one_trace_serves_all_steps():
    loss = next_byte_loss(0.01)
    training = Training(VANILLA, loss=chex.assert_max_traces(loss, n=1))
    for step in range(5):
        training(np.roll(ROWS, step, axis=0))
    assert training.update._cache_size() == 1


def test_the_state_is_donated():
    training = Training(VANILLA)
    before = training.state
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(before.params)}
    training(ROWS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    after = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(training.state.params)}
    assert after == pointers  # in place


def bomb(at):
    """A loss that is not finite for batches whose first byte is 7."""
    plain = next_byte_loss(0.0)

    def loss(model, batch, key):
        total, metrics = plain(model, batch, key)
        bad = batch["bytes"][0, 0] == 7
        if at == "gradient":  # a root of 0, whose slope is infinite
            return total + jnp.sqrt(jnp.where(bad, 0.0 * total, 1.0)), metrics
        return total * jnp.where(bad, jnp.nan, 1.0), metrics
    return loss


@pytest.mark.parametrize("at", ["loss", "gradient"])
def test_a_bad_update_leaves_the_state_as_it_was(at):
    good, bad = ROWS.copy(), ROWS.copy()
    good[0, 0], bad[0, 0] = 8, 7
    training = Training(VANILLA, loss=bomb(at))
    assert training(good)["finite"]
    kept = jax.device_get(training.state)
    metrics = training(bad)
    assert not metrics["finite"]
    assert np.isfinite(metrics["objective"]) == (at == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    # What was dispatched before anybody looked changes nothing either.
    assert training(good, index=2)["finite"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(training.state), kept)
    training(good, index=1)
    assert int(training.state.step) == 2


def test_an_update_that_overflows_is_a_bad_one():
    training = Training(VANILLA, optimizer=OptimizerConfig(learning_rate=1e38, warmup_steps=0))
    kept = jax.device_get(training.state)
    metrics = training(ROWS)
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert not metrics["finite"] and not np.isfinite(metrics["update_norm"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(training.state), kept)


def test_starting_from_a_model():
    model = build(VANILLA, 5)
    training = Training(VANILLA, start=model)
    ids = jnp.asarray(ROWS[:, :-1].astype(np.int32))
    np.testing.assert_array_equal(training.network.merge(training.state.params)(ids), model(ids))
    training(ROWS)
    assert not model.embed.kernel[...].is_deleted()  # what it was made of is not given away
