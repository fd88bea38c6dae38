"""The task of training a sparse autoencoder on activations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.data.activations import Activations, open_activations, training_rows
from tilelli_jax.data.reading import check_batches
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.loading.store import build
from tilelli_jax.parallel.sharding import Mesh, local_rows, path_name, place_rows, replicated
from tilelli_jax.training.distributed import compile_barrier
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.step import Network, Training, TrainState, make_training
from tilelli_jax.training.tasks.base import UNEXPLAINED, Task
from tilelli_jax.training.tasks.sae_loss import geometric_median, make_objective

CENTER_ROWS = 16_384  # most training rows that initialise the decoder's bias


def sae_task(config: ExperimentConfig, mesh: Mesh) -> Task:
    """Builds the task. Raises InputError if the activations are unreadable, too few or of another width."""
    model_config, train, section = config.model, config.train, config.activations
    assert isinstance(model_config, SAEConfig) and section is not None
    if not section.source:
        raise InputError("activations.source: expected a directory of activations, found nothing")
    source = open_activations(section.source)
    if source.d_model != model_config.d_model:
        raise InputError(f"model.d_model: {section.source} has activations of width {source.d_model}, "
                         f"found {model_config.d_model}")
    check_batches(train.batch_size, train.eval_batch_size, source.d_model * source.shards[0].dtype.itemsize,
                  jax.process_count())
    n_valid = max(1, round(len(source) * section.valid_fraction))
    n_train = len(source) - n_valid
    train_rows, valid_rows = source.part(0, n_train), source.part(n_train, len(source))
    if len(train_rows) < train.batch_size:
        raise InputError(f"train.batch_size: {section.source} has {len(train_rows)} rows to train on, "
                         f"found {train.batch_size}")
    first = valid_rows.gather(np.arange(min(len(valid_rows), train.eval_bytes or len(valid_rows), 1024)))
    if (first == first[:1]).all():
        raise InputError(f"activations.valid_fraction: expected held-out rows that differ, found {n_valid} "
                         f"without variance in {section.source}")
    loss, hooks = make_objective(model_config, config.sae, batch_size=train.batch_size, steps=train.steps)
    part = train.batch_size // train.accumulate
    rows = np.concatenate([i * part + local_rows(mesh, part) for i in range(train.accumulate)])

    def place(batch: np.ndarray) -> dict[str, jax.Array]:
        return {"activations": place_rows(batch.reshape(train.accumulate, -1, batch.shape[-1]), mesh, part,
                                          axis=1)}

    def training(model: Any) -> Training:
        if model is None:
            model = build(model_config, config.seed, config.compute)
            model.bias[...] = jnp.asarray(_center(train_rows, config.sae.center), jnp.float32)
        return make_training(model_config, config.compute, config.optimizer, steps=train.steps, loss=loss,
                             seed=config.seed, mesh=mesh, model=model, hooks=hooks)

    def diagnoser(network: Network) -> Callable[[TrainState, np.ndarray], list[str]]:
        del network
        def describe_state(state: TrainState, batch: np.ndarray) -> list[str]:
            leaves, _ = jax.tree_util.tree_flatten_with_path(state.params)
            bad = [path_name(path) for path, leaf in leaves if not bool(jnp.isfinite(leaf).all())]
            return [f"parameters not finite before the update: {', '.join(bad)}"] * bool(bad) + [
                f"the largest activation of the batch is {np.abs(batch.astype(np.float32)).max():.3g}"]
        return describe_state

    evaluate = functools.partial(_evaluator, held_out=valid_rows, mesh=mesh, batch_size=train.eval_batch_size,
                                 most=train.eval_bytes)

    def summarize(model: TopKSAE) -> dict[str, Any]:
        n_rows = min(len(valid_rows), train.eval_bytes or 2**62)
        return {"held_out": describe(model, valid_rows.part(0, n_rows))}

    return Task(
        source=str(section.source), key="activations.source",
        size=f"{len(train_rows):,} activations to train on, {len(valid_rows):,} to validate on",
        fingerprint=source.fingerprint,
        batches=training_rows(train_rows, batch_size=train.batch_size, seed=section.shuffle_seed, rows=rows,
                              prefetch=section.prefetch),
        place=place, describe_batch=lambda batch: f"{len(batch)} rows", training=training, evaluate=evaluate,
        diagnose=diagnoser, extra=lambda network: lambda params: {},
        logged=("mse", "fvu", "l0", "dead", "auxiliary", "threshold"), tokens=train.batch_size,
        flops_per_token=0.0, loss_unit=UNEXPLAINED, summarize=summarize)


def _center(rows: Activations, kind: str) -> np.ndarray:
    """Returns the decoder's initial bias, `[d_model]`."""
    if kind == "zero":
        return np.zeros(rows.d_model)
    sample = rows.gather(np.linspace(0, len(rows) - 1, min(len(rows), CENTER_ROWS)).astype(int))
    sample = sample.astype(np.float64)
    return geometric_median(sample) if kind == "geometric_median" else sample.mean(axis=0)


def _evaluator(network: Network, *, held_out: Activations, mesh: Mesh, batch_size: int,
               most: int) -> Callable[[Any], float]:
    """Returns `evaluate(params)`: the held-out rows' fraction of variance unexplained."""
    rows = held_out.part(0, min(len(held_out), most or len(held_out)))
    total = _total_variance(rows)

    @compile_barrier
    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def squares(params: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return jnp.sum(jnp.where(mask[:, None], (network.merge(params)(x) - x)**2, 0.0))

    def evaluate(params: Any) -> float:
        sums = []
        for start in range(0, len(rows), batch_size):
            block = rows.gather(np.arange(start, min(start + batch_size, len(rows))))
            mask = np.arange(batch_size) < len(block)
            padded = np.zeros((batch_size, rows.d_model), block.dtype)
            padded[:len(block)] = block
            own = local_rows(mesh, batch_size)
            sums.append(squares(params, place_rows(padded[own], mesh, batch_size),
                                place_rows(mask[own], mesh, batch_size)))
        return sum(float(value) for value in jax.device_get(sums)) / total

    return evaluate


def _total_variance(rows: Activations) -> float:
    """Returns the squared distance from the mean row, summed over rows and dimensions."""
    mean = sum(block.astype(np.float64).sum(axis=0) for block in rows.blocks()) / len(rows)
    return float(sum(((block.astype(np.float64) - mean)**2).sum() for block in rows.blocks()))


def describe(model: TopKSAE, rows: Activations) -> dict[str, float]:
    """Measures an autoencoder on rows: `explained_variance`, `l0`, `dead_fraction` (latents never active)."""
    @jax.jit
    def encode_block(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        codes = model.encode(x)
        fired = jnp.zeros(model.config.n_latents, bool).at[codes.latents].max(codes.values > 0)
        return jnp.sum((model.decode(codes) - x)**2), jnp.sum(codes.values > 0), fired

    residual, active, fired = 0.0, 0, np.zeros(model.config.n_latents, bool)
    for block in rows.blocks():
        squares, count, block_fired = jax.device_get(encode_block(jnp.asarray(block, jnp.float32)))
        residual, active, fired = residual + float(squares), active + int(count), fired | block_fired
    return {"rows": len(rows), "explained_variance": 1 - residual / max(_total_variance(rows), 1e-12),
            "l0": active / len(rows), "dead_fraction": float(1 - fired.mean())}
