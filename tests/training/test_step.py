"""One update: accumulation, precision, remat, scan, donation, and numbers that are not finite."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.step import make_training
from tilelli_jax.training.tasks.text_loss import NextByteLoss

TIME = 8
ROUTED = RoutedConfig(d_model=16, n_layers=2, max_seq_len=TIME, n_heads=2, d_head=4, top_k=3, dense_expand=2,
                      pathways=("local", "sparse", "dense"))
VANILLA = VanillaConfig(d_model=16, n_layers=2, max_seq_len=TIME, n_heads=2, dense_expand=2)
SMOOTH = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", eps=1e-3, clip_norm=0.0)
ROWS = np.random.default_rng(0).integers(0, 256, (12, TIME + 1)).astype(np.uint8)


class Training:
    """A state and its update on one device."""

    def __init__(self, model, compute=None, optimizer=SMOOTH, load_balance=0.0, loss=None, start=None):
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(self.mesh):
            self.network, self.abstract_state, self.make_state, self.update = make_training(
                model, compute or ComputeConfig(), optimizer, steps=10,
                loss=loss or NextByteLoss(load_balance), seed=0, mesh=self.mesh, model=start)

    @functools.cached_property
    def state(self):
        with jax.set_mesh(self.mesh):
            return self.make_state()

    def trace(self):
        batch = {"bytes": jax.ShapeDtypeStruct(ROWS[None].shape, np.uint8)}
        return self.update.trace(self.abstract_state, batch, np.int32(0))

    def __call__(self, rows, parts=1, index=None):
        index = int(self.state.step) if index is None else index
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.update(
                self.state, {"bytes": jnp.asarray(rows.reshape(parts, -1, TIME + 1))}, np.int32(index))
        return jax.device_get(metrics)


def assert_close(found, expected, rtol=4e-5):
    """Compares leaf by leaf; numbers close to 0 relative to their array's largest. Measured: up to 4e-6."""
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())
    jax.tree.map(compare, jax.device_get(found), jax.device_get(expected))


@pytest.fixture(scope="module")
def two_updates():
    """The metrics and the state of two updates of the routed network."""
    training = Training(ROUTED)
    return [training(ROWS), training(ROWS[::-1])], training.state


def test_accumulated_parts_equal_one_batch(two_updates):
    metrics, state = two_updates
    training = Training(ROUTED)
    for rows, expected in zip((ROWS, ROWS[::-1]), metrics, strict=True):
        accumulated = training(rows, parts=3)
        # The load balance of three parts differs from that of the batch; its weight is 0 here.
        assert accumulated.pop("load_balance") != expected["load_balance"]
        assert_close(accumulated, {key: expected[key] for key in accumulated})
    assert_close(training.state.params, state.params)


@pytest.mark.parametrize("compute", [
    pytest.param(ComputeConfig(remat=True), marks=pytest.mark.exhaustive), ComputeConfig(scan_layers=False)],
                         ids=["remat", "unrolled"])
def test_compute_options_change_no_result(two_updates, compute):
    metrics, state = two_updates
    training = Training(ROUTED, compute)
    for rows, expected in zip((ROWS, ROWS[::-1]), metrics, strict=True):
        found = training(rows)
        # The load balance is a difference of numbers near 1, with their rounding errors.
        np.testing.assert_allclose(found.pop("load_balance"), expected["load_balance"], atol=1e-6)
        assert_close(found, {key: expected[key] for key in found})
    assert_close(training.state.params, state.params)


def test_remat_computes_activations_again():
    def gelus(compute):
        return str(Training(VANILLA, compute).trace().jaxpr).count("= erf")
    assert gelus(ComputeConfig(remat=True)) > gelus(ComputeConfig())


def test_bfloat16_trains_and_keeps_float32_parameters(two_updates):
    metrics, _ = two_updates
    training = Training(ROUTED, ComputeConfig(dtype="bfloat16"))
    losses = [float(training(ROWS)["loss"]) for _ in range(8)]
    assert losses[0] == pytest.approx(float(metrics[0]["loss"]), rel=2e-2)
    assert losses[0] != float(metrics[0]["loss"])  # it computed in another type
    assert losses[-1] < losses[0] - 0.5
    floats = [leaf for leaf in jax.tree.leaves((training.state.params, training.state.opt_state))
              if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def test_program_does_not_grow_with_depth():
    def size(n_layers, **compute):
        training = Training(dataclasses.replace(VANILLA, n_layers=n_layers), ComputeConfig(**compute))
        return len(str(training.trace().jaxpr))
    assert size(8) < 1.02 * size(2)
    assert size(3, scan_layers=False) > 1.2 * size(1, scan_layers=False)


class CountedLoss(NextByteLoss):
    """A loss that may be traced once."""

    __call__ = chex.assert_max_traces(NextByteLoss.__call__, n=1)


@pytest.fixture(scope="module")
def traced_once():
    return Training(VANILLA, loss=CountedLoss(0.01))


def test_one_trace_serves_all_steps(traced_once):
    for step in range(5):
        traced_once(np.roll(ROWS, step, axis=0))
    assert traced_once.update._cache_size() == 1


def test_the_state_is_donated(traced_once):
    training = traced_once
    before = training.state
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(before.params)}
    training(ROWS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    after = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(training.state.params)}
    assert after == pointers  # in place


class Bomb(NextByteLoss):
    """A loss that is not finite if the batch's first byte is 7; its gradient is not finite if it is 9."""

    def __call__(self, model, batch, key):
        total, metrics = super().__call__(model, batch, key)
        first = batch["bytes"][0, 0]
        total = total + jnp.sqrt(jnp.where(first == 9, 0.0 * total, 1.0))  # at 0, its slope is infinite
        return total * jnp.where(first == 7, jnp.nan, 1.0), metrics


def test_an_update_that_is_not_finite_leaves_the_state_unchanged():
    training = Training(VANILLA, loss=Bomb(0.0))
    good = ROWS.copy()
    good[0, 0] = 8
    assert training(good)["finite"]
    for step, first in ((1, 7), (2, 9)):
        bad = ROWS.copy()
        bad[0, 0] = first
        before = jax.device_get(training.state)
        metrics = training(bad)
        assert not metrics["finite"]
        assert np.isfinite(metrics["objective"]) == (first == 9)
        assert not np.isfinite(metrics["grad_norm"])
        # An update dispatched before the failure was noticed changes nothing either.
        assert training(good, index=step + 1)["finite"]
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(training.state), before)
        training(good, index=step)
        assert int(training.state.step) == step + 1


def test_an_overflowing_update_leaves_the_state_unchanged():
    training = Training(VANILLA, optimizer=OptimizerConfig(learning_rate=1e38, warmup_steps=0))
    before = jax.device_get(training.state)
    metrics = training(ROWS)
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert not metrics["finite"] and not np.isfinite(metrics["update_norm"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(training.state), before)


def test_starting_from_a_model():
    drawn = Training(VANILLA)
    params = jax.tree.map(lambda leaf: 2 * leaf + 1, jax.device_get(drawn.state.params))
    model = drawn.network.merge(jax.tree.map(jnp.asarray, params))
    training = Training(VANILLA, start=model)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(training.state.params), params)
    training(ROWS)
    assert not model.embed.kernel[...].is_deleted()  # the caller can still use it
    np.testing.assert_array_equal(model.embed.kernel[...], params["embed"]["kernel"])
