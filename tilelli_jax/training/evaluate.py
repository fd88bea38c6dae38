"""Validation: the mean loss over a fixed part of the text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from tilelli_jax.data.windows import ValidationBatch
from tilelli_jax.sharding import place_rows, replicated
from tilelli_jax.training.distributed import together
from tilelli_jax.training.losses import next_byte_nats
from tilelli_jax.training.step import Network


def make_evaluate(network: Network, batches: Iterable[ValidationBatch], mesh: Mesh, *,
                  batch_size: int) -> Callable[[Any], float]:
    """`evaluate(params) -> nats per byte`: the mean loss over what the batches' masks leave in.

    Windows follow one another, and each starts without context: the mean is a little above what a
    sliding window would give.

    Args:
        batches: the rows that this process reads, from the beginning at every iteration.
        batch_size: rows of a batch over all processes.
    """
    @together
    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def total(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return next_byte_nats(network.merge(params), batch)

    def evaluate(params: Any) -> float:
        sums = [total(params, {name: place_rows(array, mesh, batch_size)
                               for name, array in batch._asdict().items()})
                for batch in batches]
        # Added up in double precision: thousands of batches would wear single precision out.
        nats, count = (sum(float(value) for value in column)
                       for column in zip(*jax.device_get(sums), strict=True))
        return nats / count

    return evaluate
