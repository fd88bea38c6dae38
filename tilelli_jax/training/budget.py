"""A time budget (`train.minutes`): measures how fast a run is, and decides how many updates fit.

The updates that are timed are discarded: a run of N updates is the same bit for bit whether N comes from a
budget or from `train.steps`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
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
MIN_STEPS = 10  # a budget for fewer updates is an error: the network would hardly be trained
GENEROUS = 1.5  # a budget that is recommended is larger by this factor: the machine may get busier
FEW, ENOUGH = 200, 800  # fewer updates than FEW get a note, which recommends a budget for ENOUGH
SAVED = "/jax/compilation_cache/compile_time_saved_sec"  # JAX's event when its cache has a program
WARMUPS = 4  # so do fewer than this multiple of `optimizer.warmup_steps`


class StepTimes(NamedTuple):
    """Seconds that the first process needs to compile the update, for an update, and for a validation.

    Attributes:
        compilation: without a cache; another number of updates is another program.
        start: seconds from the start of the run to its first update, with what is measured.
    """

    compilation: float
    update: float
    validation: float
    start: float = 0.0


def measure_step_times(task: Task, training: Training, budget: float,
                       check: Callable[[StepTimes], object] = lambda costs: None) -> StepTimes:
    """Runs some updates and a validation from a new state, and discards the result.

    All processes must call it.

    Args:
        budget: the time budget in seconds.
        check: called after each part with what is measured so far, 0 where nothing is; may raise.
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

    with _saved_by_cache() as saved:
        compilation, n = run_updates(1), 1
    compilation += max(0.0, of_first_process(sum(saved)))
    check(StepTimes(compilation, 0.0, 0.0))
    while (seconds := run_updates(n)) < TIMED * budget:
        n *= 2
    check(StepTimes(compilation, seconds / n, 0.0))
    validation = validate()  # with compiling
    if validation < TIMED * budget:
        validation = validate()
    return StepTimes(compilation, seconds / n, validation)


def steps_within(seconds: float, costs: StepTimes, config: TrainConfig) -> int:
    """Returns how many updates fit into the seconds, with their validations: at most `config.steps`."""
    return max(0, min(config.steps, int((seconds - costs.validation) / _per_update(costs, config))))


def minutes_for(steps: int, costs: StepTimes, config: TrainConfig) -> int:
    """Returns a budget in minutes that is large enough for so many updates, also on a busier machine."""
    return math.ceil(GENEROUS * _needed(steps, costs, config) / (1 - RESERVED) / 60)


def decide_steps(task: Task, training: Training, config: TrainConfig, begin: float) -> tuple[int, StepTimes]:
    """Returns the number of updates, the same in all processes, and what was measured.

    Args:
        begin: `time.monotonic()` at the start of the run.

    Raises:
        InputError: fewer than MIN_STEPS updates fit (or fewer than `config.steps`, if that is less); as soon
            as what has been measured shows it.
    """
    assert config.minutes is not None
    budget, min_steps = 60 * config.minutes, min(MIN_STEPS, config.steps)

    def check(costs: StepTimes) -> StepTimes:
        # The schedule is a constant of the program, so that the update is compiled again.
        costs = costs._replace(start=time.monotonic() - begin + costs.compilation)
        needed = of_first_process(_needed(min_steps, costs, config))
        if needed > (1 - RESERVED) * budget:
            update = f", and an update {costs.update:.2g} s" if costs.update else ""
            at_least = math.ceil(GENEROUS * needed / (1 - RESERVED) / 60)
            raise InputError(
                f"train.minutes: expected at least {at_least} on this machine, found {config.minutes:g}: "
                f"compiling takes {costs.compilation:.0f} s, up to twice{update}; train.minutes=null "
                "train.steps=N does N updates, however long they take")
        return costs

    costs = check(measure_step_times(task, training, budget, check))
    steps = of_first_process(steps_within((1 - RESERVED) * budget - costs.start, costs, config))
    return max(int(steps), min_steps), costs


def few_updates(steps: int, costs: StepTimes, config: TrainConfig, warmup_steps: int) -> str:
    """Returns a note if so few updates fit that the network will hardly learn; empty otherwise.

    Args:
        warmup_steps: `optimizer.warmup_steps`.
    """
    warmup = WARMUPS * warmup_steps
    if steps >= min(config.steps, max(FEW, warmup)):
        return ""
    enough = min(config.steps, max(ENOUGH, warmup))
    in_warmup = f", {min(steps, warmup_steps):,} of them in the warm-up of the learning rate"
    return (f"only {steps:,} updates fit into {config.minutes:g} minutes{in_warmup * (warmup > steps)}: the "
            f"network will hardly learn; train.minutes={minutes_for(enough, costs, config)} is enough for "
            f"{enough:,} updates (in another run_dir)")


# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _saved_by_cache() -> Iterator[list[float]]:
    """In this context, collects the seconds of compiling that JAX's cache of compiled programs saves."""
    saved: list[float] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == SAVED:
            saved.append(duration_secs)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield saved
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _per_update(costs: StepTimes, config: TrainConfig) -> float:
    return costs.update + costs.validation / config.eval_every


def _needed(steps: int, costs: StepTimes, config: TrainConfig) -> float:
    """Returns the seconds from the start of the run to the last validation."""
    return costs.start + costs.validation + steps * _per_update(costs, config)
