"""The autoencoder loss: a stored step, a reimplemented training loop, known dictionaries, meshes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx

from tests.extras import needs_torch
from tests.reference_impl.autoencoder import by_name, dense_loss, reference_training
from tests.reference_impl.mixtures import mixtures
from tests.references import STORED, needs
from tilelli_jax import config as config_lib
from tilelli_jax.data.activations import Activations
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.loading.store import from_arrays
from tilelli_jax.models.causal_lm import ComputeConfig
from tilelli_jax.parallel.sharding import MeshConfig, make_mesh, place_rows
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.optimizers import OptimizerConfig
from tilelli_jax.training.step import TrainState, make_training, split_params
from tilelli_jax.training.tasks.sae import reconstruction_quality
from tilelli_jax.training.tasks.sae_loss import AutoencoderLoss, SAELossConfig, geometric_median

GOLDEN = STORED / "difficulty" / "golden"
NAMES = {"encoder.kernel": "W_enc", "encoder.bias": "b_enc", "decoder.kernel": "W_dec", "bias": "b_dec"}
# As published: PyTorch's Adam, plain mean squared errors, columns of length 1.
PUBLISHED = SAELossConfig(normalize=False, project_gradients=False, bias_init="mean", aux_weight=1.0,
                          aux_k=16)
ADAM = OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=10, zero_first_rate=True,
                       b2=0.999, weight_decay=0, clip_norm=0)


def stored(arrays: dict[str, Any], d: int, n: int, k: int) -> TopKSAE:
    return from_arrays(SAEConfig(d_model=d, n_latents=n, k=k, unit_norm="columns"),
                       {ours: np.asarray(arrays[theirs]) for ours, theirs in NAMES.items()})


@nnx.jit
def coded(model: TopKSAE, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    codes = model.encode(x)
    return model.dense(codes), model.decode(codes)


@needs(GOLDEN)
@pytest.mark.parametrize("case", ["nodead", "dead"])
def test_the_stored_step(case: str) -> None:
    """Compares with one step of the published code: codes, reconstruction, losses and gradients."""
    golden = np.load(GOLDEN / "sae_step.npz")
    model = stored({name: golden[f"p0_{name}"] for name in NAMES.values()}, 24, 96, k=6)
    dense, decoded = coded(model, golden["x"])
    chex.assert_trees_all_close(dense, golden[f"{case}_acts"], atol=1e-5)
    chex.assert_trees_all_close(decoded, golden[f"{case}_recon"], atol=1e-5)
    dead = golden["dead"] if case == "dead" else np.zeros(96, bool)
    total, metrics, grads = losses(model, golden["x"], dead)
    for found, name in ((metrics["mse"], "mse"), (metrics["auxiliary"], "aux"), (total, "loss")):
        assert float(found) == pytest.approx(float(golden[f"{case}_{name}"]), rel=1e-5, abs=1e-9)
    for name, grad in by_name(grads).items():
        chex.assert_trees_all_close(grad, golden[f"{case}_grad_{name}"], atol=2e-6, rtol=1e-4)


@needs(GOLDEN)
def test_fewer_dead_latents_than_aux_k() -> None:
    golden = np.load(GOLDEN / "sae_step.npz")
    model = stored({name: golden[f"p0_{name}"] for name in NAMES.values()}, 24, 96, k=6)
    assert golden["fewdead_mask"].sum() == 3
    _, metrics, grads = losses(model, golden["x"], golden["fewdead_mask"])
    assert float(metrics["auxiliary"]) == pytest.approx(float(golden["fewdead_aux"]), rel=1e-5)
    chex.assert_tree_all_finite(grads)


def losses(model: TopKSAE, x: np.ndarray, dead: np.ndarray) -> tuple[Any, Any, Any]:
    """The published loss, its parts, and its gradients."""
    objective = dataclasses.replace(PUBLISHED, aux_k=10)
    loss = AutoencoderLoss(model.config, objective, batch_size=len(x), steps=100)
    batch = {"activations": jnp.asarray(x), "dead": jnp.asarray(dead), "k": jnp.int32(model.config.k)}
    network, params = split_params(model)
    (total, metrics), grads = jax.jit(jax.value_and_grad(
        lambda params: loss(network.merge(params), batch, jax.random.key(0)), has_aux=True))(params)
    return total, metrics, grads


@needs_torch
def test_the_published_training_curve() -> None:
    """Sixty steps from the same weights on the same batches, during which latents die."""
    rng = np.random.default_rng(0)
    d, n, k = 16, 64, 4
    bound = {"W_enc": (6 / n)**0.5, "W_dec": (6 / d)**0.5}
    start = {name: rng.uniform(-b, b, (d, n) if name == "W_enc" else (n, d)).astype(np.float32)
             for name, b in bound.items()}
    start["W_dec"] /= np.linalg.norm(start["W_dec"], axis=0)
    start |= {"b_enc": np.zeros(n, np.float32), "b_dec": rng.standard_normal(d).astype(np.float32)}
    batches = [rng.standard_normal((32, d)).astype(np.float32) * 2 for _ in range(60)]
    expected = reference_training(start, batches, k, aux_k=16, dead_after=3)

    model = stored(start, d, n, k)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    objective = dataclasses.replace(PUBLISHED, dead_after=3 * 32)
    loss = AutoencoderLoss(model.config, objective, batch_size=32, steps=1000)
    training = make_training(model.config, ComputeConfig(), ADAM, steps=1000, loss=loss, seed=0, mesh=mesh,
                             model=model)
    with jax.set_mesh(mesh):
        state, history = training.make_state(), []
        for step, batch in enumerate(batches):
            state, metrics = training.update(state, {"activations": jnp.asarray(batch)[None]}, np.int32(step))
            history.append(metrics)
    np.testing.assert_allclose([float(row["objective"]) for row in history], expected.losses, rtol=2e-4)
    assert max(float(row["dead"]) for row in history) > 0.05 and "fired" not in history[0]
    for name, array in by_name(state.params).items():
        reference = expected.params[name]
        assert np.abs(array - reference).mean() < 1e-3 * np.abs(reference).mean(), name


# --- By default ---------------------------------------------------------------------------------

FAST = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=20, b2=0.999, weight_decay=0)
ROUNDED = SAEConfig(d_model=32, n_latents=192, k=3), SAELossConfig(dead_after=5000)


def trained(config: SAEConfig, objective: SAELossConfig, batches: list[np.ndarray], *, devices: int = 1,
            mesh: MeshConfig | None = None, parts: int = 1, model: TopKSAE | None = None,
            compute: ComputeConfig | None = None) -> tuple[Any, list[dict[str, Any]]]:
    """Returns the parameters after one update per batch, and each update's metrics."""
    where = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    training = training_of(config, objective, batches, where, model, compute)
    with jax.set_mesh(where):
        state, history = training.make_state(), []
        for step, batch in enumerate(batches):
            placed = place_rows(batch.reshape(parts, -1, batch.shape[-1]), where, len(batch) // parts, axis=1)
            state, metrics = training.update(state, {"activations": placed}, np.int32(step))
            history.append(jax.device_get(metrics))
    return jax.device_get(state.params), history


def training_of(config: SAEConfig, objective: SAELossConfig, batches: list[np.ndarray], mesh: Any,
                model: TopKSAE | None, compute: ComputeConfig | None) -> Any:
    loss = AutoencoderLoss(config, objective, batch_size=len(batches[0]), steps=len(batches))
    return make_training(config, compute or ComputeConfig(), FAST, steps=len(batches), loss=loss, seed=0,
                         mesh=mesh, model=model)


def trained_at_length(config: SAEConfig, objective: SAELossConfig, batches: list[np.ndarray], *,
                      model: TopKSAE | None = None,
                      compute: ComputeConfig | None = None) -> tuple[Any, dict[str, np.ndarray]]:
    """Like `trained`, in one program on one device; metrics are arrays over the updates."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    training = training_of(config, objective, batches, mesh, model, compute)

    @jax.jit
    def run(state: TrainState, rows: jax.Array) -> Any:
        def update(state: TrainState, inputs: tuple[jax.Array, jax.Array]) -> Any:
            return training.update(state, {"activations": inputs[0][None]}, inputs[1])
        return jax.lax.scan(update, state, (rows, jnp.arange(len(batches))))
    with jax.set_mesh(mesh):
        state, history = run(training.make_state(), np.stack(batches))
    return jax.device_get(state.params), jax.device_get(history)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("activation", "prefixes"), [
    ("topk", (24, 48)), ("topk", ()), ("batch_topk", ()), ("batch_topk", (48,))])
def test_a_known_dictionary_is_found(activation: Any, prefixes: tuple[int, ...]) -> None:
    """Mean largest cosine ≥ 0.9 on at least 90 % of the atoms."""
    rows, dictionary = mixtures(40_000, d=32, atoms=48, active=3)
    batches = [rows[np.random.default_rng(i).integers(0, len(rows), 256)] for i in range(1200)]
    config = SAEConfig(d_model=32, n_latents=96, k=3, activation=activation)
    params, history = trained_at_length(config, SAELossConfig(dead_after=5000, prefixes=prefixes), batches)
    decoder = params["decoder"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(decoder, axis=1), 1, atol=1e-5)
    best = (dictionary @ decoder.T).max(axis=1)
    assert (best >= 0.9).mean() >= 0.9
    assert history["fvu"][-1] < 0.1 < history["fvu"][0] and history["l0"][-1] <= 3
    # In inference, with a threshold instead of a batch, sparsity and fit are similar.
    model = split_params(TopKSAE(config, rngs=nnx.Rngs(0)))[0].merge(params)
    found = reconstruction_quality(model, Activations(Path(), (rows[:4000],), {}, "", 0, 4000))
    assert found["explained_variance"] > 0.9 and 2.5 < found["l0"] < 3.5


@pytest.mark.parametrize(("activation", "max_active", "prefixes"), [
    ("topk", 0, (5, 20)), ("batch_topk", 0, ()), ("batch_topk", 48, ()), ("batch_topk", 48, (5, 20))])
def test_the_loss_equals_that_of_dense_codes(activation: Any, max_active: int,
                                             prefixes: tuple[int, ...]) -> None:
    """Compares values and gradients, with all codes of a row and with at most 4 · k."""
    config = SAEConfig(d_model=16, n_latents=48, k=4, activation=activation, max_active=max_active)
    x, _ = mixtures(64, d=16, atoms=24, active=3)
    model = TopKSAE(config, rngs=nnx.Rngs(0))
    model.encoder.bias[...] = jnp.asarray(0.1 * np.random.default_rng(0).standard_normal(48), jnp.float32)
    network, params = split_params(model)
    loss = AutoencoderLoss(config, SAELossConfig(prefixes=prefixes), batch_size=64, steps=9)
    batch = {"activations": x, "dead": jnp.zeros(48, bool), "k": jnp.int32(4)}
    (total, metrics), grads = jax.jit(jax.value_and_grad(
        lambda params: loss(network.merge(params), batch, jax.random.key(0)), has_aux=True))(params)
    expected, slopes = jax.value_and_grad(dense_loss)(params, x, config, prefixes)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert float(metrics["fvu"]) == pytest.approx(float(dense_loss(params, x, config, ())), rel=1e-5)
    chex.assert_trees_all_close(grads, slopes, atol=1e-6, rtol=1e-4)
    pre = np.maximum((x - model.bias[...]) @ model.encoder.kernel[...] + model.encoder.bias[...], 0)
    falling = -np.sort(-pre.ravel())
    if activation == "batch_topk":
        active = (pre >= falling[64 * 4 - 1]).sum(axis=1)
        assert active.min() < 4 < active.max() <= 16  # rows differ, and the bound does not bind
        assert float(metrics["l0"]) == 4
        assert float(metrics["threshold"]) == pytest.approx(float(falling[64 * 4 - 1]), rel=1e-5)
        assert not grads["threshold"].any()


def test_batch_topk_with_max_active_k_is_topk() -> None:
    rows, _ = mixtures(64 * 6, d=16, atoms=24, active=3)
    config = SAEConfig(d_model=16, n_latents=32, k=4)
    expected, _ = trained(config, SAELossConfig(), list(rows.reshape(6, 64, 16)))
    bound = dataclasses.replace(config, activation="batch_topk", max_active=4)
    found, _ = trained(bound, SAELossConfig(), list(rows.reshape(6, 64, 16)))
    assert found.pop("threshold") > 0
    # Two programs, whose products may be rounded differently.
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_threshold_is_a_moving_average() -> None:
    """The threshold averages the smallest active values and starts at the first; training ignores it."""
    rows, _ = mixtures(64 * 12, d=16, atoms=24, active=3)
    config = SAEConfig(d_model=16, n_latents=32, k=3, activation="batch_topk")
    batches = list(rows.reshape(12, 64, 16))
    batches[5] = np.zeros_like(batches[5]) - 100  # nothing is active
    model = TopKSAE(config, rngs=nnx.Rngs(0))
    model.encoder.kernel[...] = jnp.abs(model.encoder.kernel[...])
    alone, history = trained(config, SAELossConfig(threshold_decay=0), batches, model=model)
    mean, averaged_history = trained(config, SAELossConfig(threshold_decay=0.8), batches, model=model)
    smallest = [float(row["threshold"]) for row in history]
    assert history[5]["l0"] == 0 and smallest[5] == smallest[4] and len(set(smallest)) == 11
    expected = smallest[0]
    for step, row in enumerate(averaged_history):
        if step and step != 5:
            expected = 0.8 * expected + 0.2 * smallest[step]
        assert float(row["threshold"]) == pytest.approx(expected, rel=1e-5)
    assert mean.pop("threshold") == averaged_history[-1]["threshold"]
    assert alone.pop("threshold") == history[-1]["threshold"]
    chex.assert_trees_all_close(mean, alone, rtol=1e-5, atol=1e-5)  # two programs: rounding may differ


@pytest.mark.exhaustive
def test_bfloat16_learns_as_well() -> None:
    rows, _ = mixtures(20_000, d=32, atoms=48, active=3)
    batches = [rows[np.random.default_rng(i).integers(0, len(rows), 256)] for i in range(1000)]
    config, objective = ROUNDED
    final_fvu = {}
    for dtype in ("float32", "bfloat16"):
        compute = ComputeConfig(dtype=dtype)  # type: ignore[arg-type]
        params, history = trained_at_length(config, objective, batches, compute=compute)
        final_fvu[dtype] = np.mean(history["fvu"][-50:])
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert final_fvu["bfloat16"] != final_fvu["float32"] < 0.1
    # Measured, three runs: −2 to +1.5 %.
    assert final_fvu["bfloat16"] == pytest.approx(final_fvu["float32"], rel=0.05)


def test_bfloat16_rounds_operands_alone() -> None:
    """Parameters, the optimiser's state and every sum are float32."""
    config, objective = ROUNDED
    loss = AutoencoderLoss(config, objective, batch_size=256, steps=9)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    training = make_training(config, ComputeConfig(dtype="bfloat16"), FAST, steps=9, loss=loss, seed=0,
                             mesh=mesh)
    assert not [leaf for leaf in jax.tree.leaves(training.abstract_state) if leaf.dtype == jnp.bfloat16]
    batch = {"activations": jax.ShapeDtypeStruct((1, 256, 32), np.float32)}
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(training.update)(training.abstract_state, batch, np.int32(0))
    sums = list(operations(program.jaxpr, ("dot_general", "reduce_sum", "scatter-add", "add", "add_any")))
    assert {str(var.aval.dtype) for operation in sums for var in operation.outvars} <= {
        "float32", "int32", "uint32"}
    assert any(var.aval.dtype == jnp.bfloat16 for operation in sums for var in operation.invars)


def operations(program: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """Yields the operations of a program with these names, at any depth."""
    for equation in program.eqns:
        if equation.primitive.name in names:
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from operations(inner, names)


@pytest.mark.eight_devices
@pytest.mark.parametrize(("mesh", "parts", "activation"), [
    pytest.param(MeshConfig(data=8), 1, "topk", marks=pytest.mark.exhaustive),
    pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), 1, "topk", marks=pytest.mark.exhaustive),
    (MeshConfig(data=1, fsdp=4, tensor=2), 2, "topk"),
    pytest.param(MeshConfig(data=8), 1, "batch_topk", marks=pytest.mark.exhaustive),
    (MeshConfig(data=2, fsdp=2, tensor=2), 1, "batch_topk")])
def test_meshes_change_nothing(mesh: MeshConfig, parts: int, activation: Any) -> None:
    rows, _ = mixtures(64 * 12, d=16, atoms=24, active=3)
    batches = list(rows.reshape(12, 64, 16))
    config = SAEConfig(d_model=16, n_latents=32, k=4, activation=activation)
    objective = SAELossConfig(normalize=parts == 1, dead_after=64,  # a part has its own variance
                                prefixes=() if activation == "topk" else (8, 16))
    expected, reference_history = trained(config, objective, batches)
    found, history = trained(config, objective, batches, devices=8, mesh=mesh, parts=parts)
    chex.assert_trees_all_close(found, expected, atol=2e-4)
    for row, other in zip(history, reference_history, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3) and row["dead"] == other["dead"]


@pytest.mark.exhaustive
def test_dead_latents_come_back() -> None:
    """Latents that no input activates learn by predicting the residual, and only so."""
    rows, _ = mixtures(128 * 250, d=16, atoms=24, active=4)
    batches, config = list(rows.reshape(250, 128, 16)), SAEConfig(d_model=16, n_latents=64, k=4)
    dead = {}
    for weight in (0.0, 1 / 32):
        model = TopKSAE(config, rngs=nnx.Rngs(0))
        model.encoder.bias[...] = jnp.where(jnp.arange(64) < 32, -1.0, 0.0)
        objective = SAELossConfig(aux_weight=weight, dead_after=512)
        dead[weight] = trained_at_length(config, objective, batches, model=model)[1]["dead"]
    assert dead[0.0][10] == dead[1 / 32][10] > 0.4
    assert dead[1 / 32][-1] < 0.6 * dead[0.0][-1]  # measured: 0.16 against 0.34


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_k_falls_from_k_start_to_k(activation: Any) -> None:
    rows, _ = mixtures(64 * 12, d=16, atoms=24, active=3)
    _, history = trained(SAEConfig(d_model=16, n_latents=32, k=2, activation=activation),
                         SAELossConfig(k_start=10, k_steps=8), list(rows.reshape(12, 64, 16)))
    most = [row["l0"] for row in history]
    assert most[0] > 6 and max(most[8:]) <= 2 and most[4] < most[0]


def test_gradients_along_the_rows_are_removed() -> None:
    config = SAEConfig(d_model=8, n_latents=16, k=4)
    model = TopKSAE(config, rngs=nnx.Rngs(0))
    _, params = split_params(model)
    loss = AutoencoderLoss(config, SAELossConfig(), batch_size=4, steps=10)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params)
    projected = loss.transform_grads(params, grads)["decoder"]["kernel"]
    np.testing.assert_allclose(jnp.sum(projected * params["decoder"]["kernel"], axis=1), 0, atol=1e-5)
    assert jnp.abs(projected).max() > 0.1


def test_the_geometric_median() -> None:
    rows = np.random.default_rng(0).exponential(size=(40, 3)) ** 2
    expected = scipy.optimize.minimize(lambda m: np.linalg.norm(rows - m, axis=1).sum(), rows.mean(axis=0)).x
    np.testing.assert_allclose(geometric_median(rows), expected, atol=1e-3)
    outlier = np.r_[rows, [[1e6, 1e6, 1e6]]]
    assert np.abs(geometric_median(outlier) - expected).max() < 0.2
    assert np.abs(outlier.mean(axis=0) - expected).min() > 1e4


@pytest.mark.eight_devices
def test_latents_lie_over_the_tensor_axis() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = SAEConfig(d_model=16, n_latents=32, k=4)
    loss = AutoencoderLoss(config, SAELossConfig(), batch_size=8, steps=9)
    training = make_training(config, ComputeConfig(), FAST, steps=9, loss=loss, seed=0, mesh=mesh)
    specs = jax.tree.map(lambda leaf: tuple(leaf.sharding.spec), training.abstract_state.params)
    assert specs["encoder"]["kernel"] == ("fsdp", "tensor")
    assert specs["decoder"]["kernel"] == ("tensor", "fsdp")


def test_dead_after_of_the_published_configuration() -> None:
    """A latent is dead after more than 50 updates without firing, also in a short run."""
    config = config_lib.load(ExperimentConfig, Path(__file__).parents[2] / "configs" / "sae-published.yaml",
                             ["train.steps=60"])
    assert isinstance(config.model, SAEConfig)
    loss = AutoencoderLoss(config.model, config.sae, batch_size=config.train.batch_size, steps=60)
    silent = jnp.array([50, 51]) * config.train.batch_size
    assert loss.extra_batch({"silent": silent}, jnp.int32(0))["dead"].tolist() == [False, True]
