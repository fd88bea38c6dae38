"""The task of training a sparse autoencoder on activations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.config.schema import TYPE_NAMES
from tilelli_jax.data.activations import INDEX, Activations, open_activations, training_rows
from tilelli_jax.data.reading import check_batches
from tilelli_jax.errors import InputError
from tilelli_jax.estimators.sae import SAEConfig, TopKSAE
from tilelli_jax.loading.store import build
from tilelli_jax.parallel.sharding import Mesh, local_rows, path_name, place_rows, replicated
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.distributed import compile_barrier
from tilelli_jax.training.loss import UNEXPLAINED
from tilelli_jax.training.step import Network, Training, TrainState
from tilelli_jax.training.tasks.base import Task
from tilelli_jax.training.tasks.sae_loss import AutoencoderLoss, geometric_median

CENTER_ROWS = 16_384  # most training rows that initialise the decoder's bias
# What a directory of activations states about them, under the names of the autoencoder's configuration.
PROVENANCE = {"source_model": str, "hook": str, "layer": int, "prepend_bos": bool, "context_size": int,
              "dataset": str}


def with_provenance(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the configuration of a run with the provenance of its activations in that of the autoencoder.

    The provenance is the network, hook and layer, and the texts, as far as the activations state them.
    Without an autoencoder, the configuration is unchanged.

    Raises:
        InputError: the activations are unreadable, or state another value than the configuration.
    """
    model, section = config.model, config.activations
    if not isinstance(model, SAEConfig) or section is None or not section.source:
        return config
    info, index = open_activations(section.source).info, f"{section.source}/{INDEX}"
    stated = {key: info[key] for key in PROVENANCE if info.get(key) is not None}
    for key, value in stated.items():
        if type(value) is not PROVENANCE[key]:
            raise InputError(f"{index}: info.{key}: expected {TYPE_NAMES[PROVENANCE[key]]}, found {value!r}")
        if getattr(model, key) not in (getattr(SAEConfig, key), value):
            raise InputError(f"model.{key}: expected {value}, as in {index}, found {getattr(model, key)}")
    try:
        return dataclasses.replace(config, model=dataclasses.replace(model, **stated))
    except InputError as error:
        raise InputError(f"{index}: info.{error}") from None


class AutoencoderTask(Task):
    """Trains an autoencoder on activations.

    Raises InputError if the activations are unreadable, too few or of another width.
    """

    key = "activations.source"
    unit = "activations"
    logged = ("mse", "fvu", "l0", "dead", "auxiliary", "threshold")
    loss_unit = UNEXPLAINED

    def __init__(self, config: ExperimentConfig, mesh: Mesh) -> None:
        model, train, section = config.model, config.train, config.activations
        assert isinstance(model, SAEConfig) and section is not None
        super().__init__(config, mesh)
        if not section.source:
            raise InputError("activations.source: expected a directory of activations, found nothing")
        source = open_activations(section.source)
        if source.d_model != model.d_model:
            raise InputError(f"model.d_model: expected {source.d_model}, the width of the activations in "
                             f"{section.source}, found {model.d_model}")
        check_batches(train.batch_size, train.eval_batch_size,
                      source.d_model * source.shards[0].dtype.itemsize, jax.process_count())
        n_valid = max(1, round(len(source) * section.valid_fraction))
        n_train = len(source) - n_valid
        self.train_rows, self.valid_rows = source.part(0, n_train), source.part(n_train, len(source))
        if n_train < train.batch_size:
            raise InputError(f"train.batch_size: expected at most {n_train}, the rows to train on in "
                             f"{section.source}, found {train.batch_size}")
        # The rows to validate on.
        self.held_out = self.valid_rows.part(0, min(n_valid, train.eval_bytes or n_valid))
        first = self.held_out.gather(np.arange(min(len(self.held_out), 1024)))
        if (first == first[:1]).all():
            raise InputError(f"activations.valid_fraction: expected held-out rows that differ, found "
                             f"{n_valid} without variance in {section.source}")
        self.batches = training_rows(self.train_rows, batch_size=train.batch_size, seed=section.shuffle_seed,
                                     rows=self.rows, prefetch=section.prefetch)
        self.source = str(section.source)
        self.size = f"{n_train:,} activations to train on, {n_valid:,} to validate on"
        self.fingerprint = source.fingerprint
        self.tokens = train.batch_size

    def make_loss(self, steps: int) -> AutoencoderLoss:
        assert isinstance(self.config.model, SAEConfig)
        return AutoencoderLoss(self.config.model, self.config.sae, batch_size=self.config.train.batch_size,
                               steps=steps)

    def prepare(self, model: Any, steps: int) -> Training:
        if model is None:
            model = build(self.config.model, self.config.seed, self.config.compute)
            model.bias[...] = jnp.asarray(_center(self.train_rows, self.config.sae.bias_init), jnp.float32)
        return super().prepare(model, steps)

    def arrays(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        return {"activations": batch}

    def describe_batch(self, batch: np.ndarray) -> str:
        return f"{len(batch)} rows"

    def evaluate(self, params: Any) -> float:
        """Returns the fraction of the held-out rows' variance that is unexplained."""
        return self._held_out_fvu(params)

    @functools.cached_property
    def _held_out_fvu(self) -> Callable[[Any], float]:
        return held_out_fvu(self.network, self.held_out, self.mesh,
                            batch_size=self.config.train.eval_batch_size)

    def diagnose(self, state: TrainState, batch: np.ndarray) -> list[str]:
        leaves, _ = jax.tree_util.tree_flatten_with_path(state.params)
        bad = [path_name(path) for path, leaf in leaves if not bool(jnp.isfinite(leaf).all())]
        return [f"parameters not finite before the update: {', '.join(bad)}"] * bool(bad) + [
            f"the largest activation of the batch is {np.abs(batch.astype(np.float32)).max():.3g}"]

    def summarize(self, model: TopKSAE) -> dict[str, Any]:
        return {"held_out": reconstruction_quality(model, self.held_out)}


def _center(rows: Activations, kind: str) -> np.ndarray:
    """Returns the decoder's initial bias, `[d_model]`."""
    if kind == "zero":
        return np.zeros(rows.d_model)
    sample = rows.gather(np.linspace(0, len(rows) - 1, min(len(rows), CENTER_ROWS)).astype(int))
    sample = sample.astype(np.float64)
    return geometric_median(sample) if kind == "geometric_median" else sample.mean(axis=0)


def held_out_fvu(network: Network, rows: Activations, mesh: Mesh, *,
                 batch_size: int) -> Callable[[Any], float]:
    """Returns `evaluate(params)`: the rows' fraction of variance unexplained."""
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


def reconstruction_quality(model: TopKSAE, rows: Activations) -> dict[str, float]:
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
