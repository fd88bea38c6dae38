"""The language-modelling task: predict the next byte of text."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.reading import check_batches
from tilelli_jax.data.windows import TrainingBatch, training_batches, validation_batches
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.models import weights
from tilelli_jax.models.trigram import fit_trigram
from tilelli_jax.parallel.sharding import Mesh, local_rows, place_rows, replicated
from tilelli_jax.training.diagnose import diagnose
from tilelli_jax.training.distributed import compile_barrier
from tilelli_jax.training.evaluate import make_evaluate
from tilelli_jax.training.experiment import ExperimentConfig
from tilelli_jax.training.flops import train_flops_per_token
from tilelli_jax.training.step import Metrics, Network, TrainState, make_training
from tilelli_jax.training.tasks.base import NATS, Task
from tilelli_jax.training.tasks.text_loss import next_byte_loss

log = logging.getLogger(__name__)
MIN_VALID_SEQUENCES = 8  # with fewer, the validation loss is mostly noise


def text_task(config: ExperimentConfig, mesh: Mesh) -> Task:
    """Builds the task. Raises InputError if the text is unreadable or too short."""
    assert not isinstance(config.model, SAEConfig)
    train = config.train
    check_batches(train.batch_size, train.eval_batch_size, train.seq_len + 1, jax.process_count())
    splits = open_corpus(config.data)
    loss = next_byte_loss(train.load_balance)
    # The batch rows on this process's devices, part by part.
    part = train.batch_size // train.accumulate
    rows = np.concatenate([i * part + local_rows(mesh, part) for i in range(train.accumulate)])
    batches = training_batches(splits.train, batch_size=train.batch_size, seq_len=train.seq_len,
                               seed=config.data.shuffle_seed, rows=rows, prefetch=config.data.prefetch)
    held_out = validation_batches(splits.valid, batch_size=train.eval_batch_size, seq_len=train.seq_len,
                                  max_bytes=train.eval_bytes or None,
                                  rows=local_rows(mesh, train.eval_batch_size))

    if len(splits.valid) < MIN_VALID_SEQUENCES * train.seq_len and jax.process_index() == 0:
        log.warning("%s: only %s bytes to validate on: the validation loss is unreliable", splits.name,
                    f"{len(splits.valid):,}")

    def place(batch: TrainingBatch) -> dict[str, jax.Array]:
        split = batch.bytes.reshape(train.accumulate, -1, batch.bytes.shape[-1])
        return {"bytes": place_rows(split, mesh, part, axis=1)}

    def diagnoser(network: Network) -> Any:
        def describe_state(state: TrainState, batch: TrainingBatch) -> list[str]:
            arrays = {name: array.reshape(-1, *array.shape[2:]) for name, array in place(batch).items()}
            return diagnose(network, state.params, arrays, jax.random.wrap_key_data(state.key), loss, mesh)
        return describe_state

    def summarize(model: Any) -> dict[str, Any]:
        del model
        trigram = fit_trigram(splits.train).nats_per_byte(splits.valid, train.eval_bytes or None) \
            if config.report.trigram else None
        return {"trigram_valid_loss": trigram}

    return Task(
        source=splits.name, key="data.source",
        size=f"{len(splits.train):,} bytes to train on, {len(splits.valid):,} to validate on",
        fingerprint=splits.fingerprint(), batches=batches, place=place, describe_batch=describe_batch,
        training=lambda model: make_training(
            config.model, config.compute, config.optimizer, steps=train.steps, loss=loss, seed=config.seed,
            mesh=mesh, model=model),
        evaluate=lambda network: make_evaluate(network, held_out, mesh, batch_size=train.eval_batch_size),
        diagnose=diagnoser, extra=zero_fraction(mesh),
        logged=("load_balance", "router_use", "router_entropy", "zero_fraction"),
        tokens=train.batch_size * train.seq_len,
        flops_per_token=train_flops_per_token(config.model, train.seq_len), loss_unit=NATS,
        summarize=summarize)


def zero_fraction(mesh: Mesh) -> Callable[[Network], Callable[[Any], Metrics]]:
    """Returns the function network → params → metric `zero_fraction`, the fraction of quantised weights at
    zero.

    The metric is left out if no weight is quantised.
    """
    def for_network(network: Network) -> Callable[[Any], Metrics]:
        def measure(params: Any) -> Metrics:
            codes = [weight.codes() for weight in weights(network.merge(params)).values()
                     if weight.quantizer.levels]
            if not codes:
                return {}
            zeros = jnp.stack([jnp.sum(code == 0) for code in codes]).sum()
            return {"zero_fraction": zeros / sum(code.size for code in codes)}
        return compile_barrier(jax.jit(measure, out_shardings=replicated(mesh)))
    return for_network


def describe_batch(batch: TrainingBatch) -> str:
    """Names the starts of a batch's windows, at most four."""
    starts = np.sort(batch.starts)
    return (f"whose windows start at bytes {', '.join(map(str, starts[:4]))}"
            f"{', …' if len(starts) > 4 else ''} of the training split")
