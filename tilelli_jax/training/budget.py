"""A time budget (`train.minutes`): measures how fast a run is, and decides how many updates fit.

The updates that are timed are discarded: a run of N updates is the same to the bit whether N comes from a
budget or from `train.steps`.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import jax
import numpy as np

from tilelli_jax.training.distributed import of_first_process
from tilelli_jax.training.experiment import TrainConfig
from tilelli_jax.training.step import Training
from tilelli_jax.training.tasks.base import Task

TIMED = 0.01  # fraction of the budget that the longest timing of updates takes at least
RESERVED = 0.1  # fraction of the budget for saving, the export and the report


class Costs(NamedTuple):
    """Seconds that the first process needs to compile the update, for an update, and for a validation."""

    compilation: float
    update: float
    validation: float


def measure_costs(task: Task, training: Training, budget: float) -> Costs:
    """Runs some updates and a validation from a new state, and discards the result.

    All processes must call it.

    Args:
        budget: the time budget in seconds.
    """
    state, batches, done = training.make_state(), iter(task.batches), 0

    def run_updates(n: int) -> float:
        nonlocal state, done
        begin, metrics = time.monotonic(), None
        for _ in range(n):
            state, metrics = training.update(state, task.to_devices(next(batches)), np.int32(done))
            done += 1
        jax.block_until_ready(metrics)
        return of_first_process(time.monotonic() - begin)

    def validate() -> float:
        begin = time.monotonic()
        task.evaluate(state.params)
        return of_first_process(time.monotonic() - begin)

    compilation, n = run_updates(1), 1
    while (seconds := run_updates(n)) < TIMED * budget:
        n *= 2
    validation = validate()  # with compiling
    if validation < TIMED * budget:
        validation = validate()
    return Costs(compilation, seconds / n, validation)


def steps_within(seconds: float, costs: Costs, config: TrainConfig) -> int:
    """Returns how many updates fit into the seconds, with their validations: 1 to `config.steps`."""
    per_update = costs.update + costs.validation / config.eval_every
    return max(1, min(config.steps, int((seconds - costs.validation) / per_update)))


def decide_steps(task: Task, training: Training, config: TrainConfig, begin: float) -> tuple[int, Costs]:
    """Returns the number of updates, the same in all processes, and what was measured.

    Args:
        begin: `time.monotonic()` at the start of the run.
    """
    assert config.minutes is not None
    budget = 60 * config.minutes
    costs = measure_costs(task, training, budget)
    # The schedule is a constant of the program, so that the update is compiled again.
    left = (1 - RESERVED) * budget - (time.monotonic() - begin) - costs.compilation
    return int(of_first_process(steps_within(left, costs, config))), costs
