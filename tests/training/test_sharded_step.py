"""Training on eight devices gives the same losses, gradients and parameters as on one."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from tests.tolerance import noise
from tilelli_jax.models import RoutedConfig, VanillaConfig
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh, place_rows
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.step import make_training
from tilelli_jax.training.tasks.text_loss import NextByteLoss

pytestmark = pytest.mark.eight_devices

STEPS, BATCH, TIME = 4, 16, 24
BATCHES = np.random.default_rng(0).integers(0, 256, (STEPS, BATCH, TIME + 1)).astype(np.uint8)
NETWORKS = {
    "routed": RoutedConfig(d_model=32, n_layers=2, max_seq_len=TIME, n_heads=8, d_head=8, top_k=4,
                           dense_expand=2, wide_kernel=7,
                           pathways=("local", "wide", "state", "sparse", "dense")),
    "vanilla": VanillaConfig(d_model=32, n_layers=2, max_seq_len=TIME, n_heads=8, dense_expand=2),
}
MORE = {"ternary": dataclasses.replace(NETWORKS["routed"], quantizer="ternary",
                                       pathways=("local", "sparse", "dense"))}
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}
# Adam divides by the root of the second moment: with a small epsilon, gradients that are 0 up to rounding
# would become full-size updates. No clipping, which would hide a wrong scale.
ADAMW = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, eps=1e-3, clip_norm=0.0)

NOISE = noise(1, steps=10)  # relative to an array's largest number; measured: up to 2e-6


class Run:
    """Some updates on a mesh, from the parameters that the seed gives on one device."""

    def __init__(self, name, sizes, start=None, optimizer=ADAMW, parts=1, compute=None):
        self.mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
        with jax.set_mesh(self.mesh):
            training = make_training((NETWORKS | MORE)[name], compute or ComputeConfig(), optimizer,
                                     steps=STEPS, loss=NextByteLoss(0.01), seed=0, mesh=self.mesh)
            self.start = jax.device_get(training.make_state()) if start is None else start
            batches = [{"bytes": place_rows(rows.reshape(parts, -1, TIME + 1), self.mesh,
                                            BATCH // parts, axis=1)} for rows in BATCHES]
            self.program = training.update.lower(training.abstract_state, batches[0], np.int32(0)).compile()
            self.state = jax.device_put(
                self.start, jax.tree.map(lambda leaf: leaf.sharding, training.abstract_state))
            self.losses, self.grad_norms = [], []
            for i, batch in enumerate(batches):
                self.state, metrics = self.program(self.state, batch, np.int32(i))
                self.losses.append(float(metrics["loss"]))
                self.grad_norms.append(float(metrics["grad_norm"]))


@functools.cache
def alone(name):
    """Returns a network's run on one device."""
    return Run(name, (1, 1, 1))


def assert_same_run(run, reference):
    np.testing.assert_allclose(run.losses, reference.losses, rtol=NOISE)
    np.testing.assert_allclose(run.grad_norms, reference.grad_norms, rtol=NOISE)
    for array, expected in zip(jax.tree.leaves(run.state.params),
                               jax.tree.leaves(reference.state.params), strict=True):
        # A parameter close to 0 has the rounding errors of its neighbours.
        np.testing.assert_allclose(array, expected, rtol=NOISE, atol=NOISE * np.abs(expected).max())


@pytest.mark.parametrize(("name", "mesh"), [
    pytest.param(name, mesh, marks=[] if (name, mesh) == ("routed", "mixed") else [pytest.mark.exhaustive])
    for name in NETWORKS for mesh in MESHES])
def test_a_mesh_changes_no_result(name, mesh):
    reference = alone(name)
    run = Run(name, MESHES[mesh], reference.start)
    assert_same_run(run, reference)
    # Parameters and moments are replicated along `data` and sharded along the other axes.
    for tree, copy in ((run.state.params, reference.state.params),
                       (run.state.opt_state, reference.state.opt_state)):
        share = first_device_bytes(tree) / first_device_bytes(copy)
        parts = {"data": 1, "fsdp": 8, "tensor": 8, "mixed": 4}[mesh]
        assert 1 / parts <= share < 1 / parts + 0.1
    assert_scores_stay(run.program.as_text())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NETWORKS)
def test_muon_and_accumulation_on_a_mesh(name):
    muon = dataclasses.replace(ADAMW, name="muon")
    alone = Run(name, (1, 1, 1), optimizer=muon, parts=2)
    assert_same_run(Run(name, (2, 2, 2), alone.start, optimizer=muon, parts=2), alone)


@pytest.mark.exhaustive
def test_a_ternary_network_with_the_default_optimizer():
    """Small epsilon, clipping and ternary rounding amplify rounding errors; here only few weights differ."""
    settings = OptimizerConfig(warmup_steps=2)
    alone = Run("ternary", (1, 1, 1), optimizer=settings)
    run = Run("ternary", (2, 2, 2), alone.start, optimizer=settings)
    np.testing.assert_allclose(run.losses, alone.losses, rtol=1e-5)
    params, expected, start = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.params)])
                               for state in (run.state, alone.state, alone.start))
    moved = np.abs(expected - start)
    assert np.mean(np.abs(params - expected) > 1e-2 * moved.mean()) < 1e-3  # measured: 0 to 2e-5 of them


@pytest.mark.exhaustive
def test_bfloat16_and_remat_on_a_mesh():
    compute = ComputeConfig(dtype="bfloat16", remat=True)
    alone = Run("routed", (1, 1, 1), compute=compute)
    run = Run("routed", (2, 2, 2), alone.start, compute=compute)
    # Other partial sums, rounded to 8 bits.
    np.testing.assert_allclose(run.losses, alone.losses, rtol=1e-3)  # measured: up to 1.3e-4
    np.testing.assert_allclose(run.grad_norms, alone.grad_norms, rtol=1e-2)  # 1.3e-3


def test_the_seed_gives_the_same_parameters_on_any_mesh():
    def start(sizes):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
        with jax.set_mesh(mesh):
            return make_training(NETWORKS["vanilla"], ComputeConfig(), ADAMW, steps=STEPS,
                                 loss=NextByteLoss(0.0), seed=3, mesh=mesh).make_state()
    jax.tree.map(np.testing.assert_array_equal, start((2, 2, 2)), start((1, 1, 1)))


def first_device_bytes(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def assert_scores_stay(hlo):
    """Checks that no collective moves attention scores, [… time, time]: each device computes its own."""
    results = re.findall(r" = (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", hlo)
    shapes = [tuple(map(int, shape.split(","))) for result in results
              for shape in re.findall(r"\[([\d,]+)\]", result)]
    assert not [shape for shape in shapes if shape.count(TIME) > 1]
