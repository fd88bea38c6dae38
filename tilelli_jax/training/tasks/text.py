"""The language-modelling task: predict the next byte of text."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from tilelli_jax.data.corpus import open_corpus
from tilelli_jax.data.reading import check_batches
from tilelli_jax.data.windows import (
    TrainingBatch,
    ValidationBatch,
    training_batches,
    validation_batches,
)
from tilelli_jax.estimators.sae import SAEConfig
from tilelli_jax.models.trigram import fit_trigram
from tilelli_jax.parallel.sharding import Mesh, local_rows, place_rows, replicated
from tilelli_jax.training.config import ExperimentConfig
from tilelli_jax.training.distributed import compile_barrier
from tilelli_jax.training.flops import train_flops_per_token
from tilelli_jax.training.step import Network
from tilelli_jax.training.tasks.base import LanguageTask
from tilelli_jax.training.tasks.text_loss import NextByteLoss, next_byte_nats

log = logging.getLogger(__name__)
MIN_VALID_SEQUENCES = 8  # with fewer, the validation loss is mostly noise
MAX_PASSES = 20  # with more over one text, small networks overfit


class TextTask(LanguageTask):
    """Trains on windows of a text. Raises InputError if the text is unreadable or too short."""

    key = "data.source"
    logged = ("load_balance", "router_use", "router_entropy", "zero_fraction")

    def __init__(self, config: ExperimentConfig, mesh: Mesh) -> None:
        assert not isinstance(config.model, SAEConfig)
        super().__init__(config, mesh)
        train = config.train
        check_batches(train.batch_size, train.eval_batch_size, train.seq_len + 1, jax.process_count())
        self.splits = splits = open_corpus(config.data)
        self.batches = training_batches(splits.train, batch_size=train.batch_size, seq_len=train.seq_len,
                                        seed=config.data.shuffle_seed, rows=self.rows,
                                        prefetch=config.data.prefetch)
        self.held_out = validation_batches(splits.valid, batch_size=train.eval_batch_size,
                                           seq_len=train.seq_len, max_bytes=train.eval_bytes or None,
                                           rows=local_rows(mesh, train.eval_batch_size))
        if len(splits.valid) < MIN_VALID_SEQUENCES * train.seq_len and jax.process_index() == 0:
            log.warning("%s: only %s bytes to validate on: the validation loss is unreliable", splits.name,
                        f"{len(splits.valid):,}")
        self.source = splits.name
        self.size = f"{len(splits.train):,} bytes to train on, {len(splits.valid):,} to validate on"
        self.fingerprint = splits.fingerprint()
        self.tokens = train.batch_size * train.seq_len
        self.flops_per_token = train_flops_per_token(config.model, train.seq_len)

    def advice(self, steps: int, *, at_most: bool = False) -> str:
        size, n_read = len(self.splits.train), steps * self.tokens
        if n_read <= MAX_PASSES * size:
            return ""
        times = f"{'up to ' if at_most else ''}{n_read / size:,.0f} times"
        enough = math.ceil(n_read / MAX_PASSES / (1 - self.config.data.valid_fraction) / 1000)
        return (f"{size:,} bytes to train on are read {times} in {steps:,} updates: expect the network to "
                f"overfit; use {enough:,} kB of text or more, or fewer updates")

    def make_loss(self, steps: int) -> NextByteLoss:
        del steps
        return NextByteLoss(self.config.train.load_balance_weight)

    def arrays(self, batch: TrainingBatch) -> dict[str, np.ndarray]:
        return {"bytes": batch.bytes}

    def describe_batch(self, batch: TrainingBatch) -> str:
        """Names the starts of a batch's windows, at most four."""
        starts = np.sort(batch.starts)
        return (f"whose windows start at bytes {', '.join(map(str, starts[:4]))}"
                f"{', …' if len(starts) > 4 else ''} of the training split")

    def evaluate(self, params: Any) -> float:
        """Returns nats per byte of the validation split, or of its first `train.eval_bytes`."""
        return self._held_out_nats(params)

    @functools.cached_property
    def _held_out_nats(self) -> Callable[[Any], float]:
        return held_out_nats(self.network, self.held_out, self.mesh,
                             batch_size=self.config.train.eval_batch_size)

    def summarize(self, model: Any) -> dict[str, Any]:
        """Returns `trigram_valid_loss`, the byte-trigram baseline in nats per byte, or None if not wanted."""
        del model
        if not self.config.report.trigram:
            return {"trigram_valid_loss": None}
        trigram = fit_trigram(self.splits.train)
        return {"trigram_valid_loss": trigram.nats_per_byte(self.splits.valid,
                                                            self.config.train.eval_bytes or None)}


def held_out_nats(network: Network, batches: Iterable[ValidationBatch], mesh: Mesh, *,
                  batch_size: int) -> Callable[[Any], float]:
    """Returns `evaluate(params)`: the mean negative log-likelihood in nats per byte over unmasked positions.

    Windows do not overlap and each starts without context, so the mean is slightly higher than with a
    sliding window.

    Args:
        batches: this process's rows; each iteration starts from the beginning.
        batch_size: rows of a batch over all processes.
    """
    @compile_barrier
    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def total(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return next_byte_nats(network.merge(params), batch)

    def evaluate(params: Any) -> float:
        sums = [total(params, {name: place_rows(array, mesh, batch_size)
                               for name, array in batch._asdict().items()})
                for batch in batches]
        # Sum in double precision: single precision loses digits over thousands of batches.
        nats, count = (sum(float(value) for value in column)
                       for column in zip(*jax.device_get(sums), strict=True))
        return nats / count

    return evaluate
