"""A time budget (`train.minutes`): measures how fast a run is, and decides how many updates fit.

The updates that are timed are discarded: a run of N updates is the same to the bit whether N comes from a
budget or from `train.steps`.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import jax
import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.training.config import TrainConfig
from tilelli_jax.training.distributed import of_first_process
from tilelli_jax.training.step import Training
from tilelli_jax.training.tasks.base import Task

TIMED = 0.01  # fraction of the budget that the longest timing of updates takes at least
RESERVED = 0.1  # fraction of the budget for saving, the export and the report
MIN_STEPS = 10  # a budget for fewer updates is refused: the network would hardly be trained


class StepTimes(NamedTuple):
    """Seconds that the first process needs to compile the update, for an update, and for a validation."""

    compilation: float
    update: float
    validation: float


def measure_step_times(task: Task, training: Training, budget: float) -> StepTimes:
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
    return StepTimes(compilation, seconds / n, validation)


def steps_within(seconds: float, costs: StepTimes, config: TrainConfig) -> int:
    """Returns how many updates fit into the seconds, with their validations: at most `config.steps`."""
    return max(0, min(config.steps, int((seconds - costs.validation) / _per_update(costs, config))))


def _per_update(costs: StepTimes, config: TrainConfig) -> float:
    return costs.update + costs.validation / config.eval_every


def decide_steps(task: Task, training: Training, config: TrainConfig, begin: float) -> tuple[int, StepTimes]:
    """Returns the number of updates, the same in all processes, and what was measured.

    Args:
        begin: `time.monotonic()` at the start of the run.

    Raises:
        InputError: fewer than MIN_STEPS updates fit (or fewer than `config.steps`, if that is less).
    """
    assert config.minutes is not None
    budget = 60 * config.minutes
    costs = measure_step_times(task, training, budget)
    # The schedule is a constant of the program, so that the update is compiled again.
    spent = time.monotonic() - begin + costs.compilation
    steps = int(of_first_process(steps_within((1 - RESERVED) * budget - spent, costs, config)))
    if steps < (least := min(MIN_STEPS, config.steps)):
        needed = (spent + costs.validation + least * _per_update(costs, config)) / (1 - RESERVED) / 60
        raise InputError(
            f"train.minutes: expected at least {math.ceil(of_first_process(needed))} on this machine, found "
            f"{config.minutes:g}: compiling takes {costs.compilation:.0f} s, twice, and an update "
            f"{costs.update:.2g} s")
    return steps, costs
