"""Validation: the mean loss over a fixed stretch of text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from tilelli_jax.data.windows import ValidationBatch
from tilelli_jax.parallel.sharding import place_rows, replicated
from tilelli_jax.training.distributed import compile_barrier
from tilelli_jax.training.step import Network
from tilelli_jax.training.tasks.text_loss import next_byte_nats


def make_evaluate(network: Network, batches: Iterable[ValidationBatch], mesh: Mesh, *,
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
