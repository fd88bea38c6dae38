"""How many updates fit into a time budget."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.training import budget
from tilelli_jax.training.budget import StepTimes, decide_steps, measure_step_times, steps_within
from tilelli_jax.training.config import TrainConfig
from tilelli_jax.training.step import Training


@pytest.mark.parametrize(("seconds", "costs", "eval_every", "expected"), [
    (100, StepTimes(0, 0.5, 0), 10, 200),
    (100, StepTimes(0, 0.5, 5), 10, 95),  # nine validations of 5 s, the last one, and 95 updates: 97.5 s
    (100, StepTimes(0, 0.001, 0), 10, 1000),  # train.steps
    (100, StepTimes(0, 0.001, 200), 10, 0),
    (-5, StepTimes(0, 0.5, 0), 10, 0)])
def test_updates_and_validations_fit(seconds, costs, eval_every, expected):
    assert steps_within(seconds, costs, TrainConfig(steps=1000, eval_every=eval_every)) == expected


class Clock:
    """A clock that only the work below moves."""

    def __init__(self):
        self.seconds = 50.0

    def monotonic(self):
        return self.seconds


class Run:
    """Updates of 0.25 s, the first with 20 s of compiling; validations of 2 s, the first with 8 s."""

    def __init__(self, clock):
        self.clock, self.indices, self.validations = clock, [], 0
        self.batches = iter(range(10**6))
        self.training = Training(None, None, lambda: SimpleNamespace(params=None), self.update)

    def update(self, state, batch, index):
        assert batch == index, "the batches of a run, from the first on"
        self.clock.seconds += 0.25 if self.indices else 20.25
        self.indices.append(int(index))
        return state, {}

    def to_devices(self, batch):
        return batch

    def evaluate(self, params):
        self.clock.seconds += 2 if self.validations else 10
        self.validations += 1


def test_what_is_measured_and_decided(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    run = Run(clock)
    # At least 1 % of 1000 s, so 64 updates are timed; the validation takes 1 % and is timed only once.
    assert measure_step_times(run, run.training, 1000) == StepTimes(20.25, 0.25, 10)
    assert run.indices == list(range(1 + 1 + 2 + 4 + 8 + 16 + 32 + 64)) and run.validations == 1
    run = Run(clock)
    assert measure_step_times(run, run.training, 1100).validation == 2 and run.validations == 2

    clock.seconds = 50.0
    run = Run(clock)
    steps, costs = decide_steps(run, run.training, TrainConfig(steps=10**6, minutes=20, eval_every=100),
                               begin=40.0)
    spent = 10 + 20.25 + (len(run.indices) - 1) * 0.25 + 10 + 2
    left = 0.9 * 1200 - spent - 20.25 - 2
    assert costs == StepTimes(20.25, 0.25, 2) and steps == int(left / (0.25 + 0.02))


def test_a_budget_for_hardly_any_updates(monkeypatch):
    """Compiling takes 20.25 s twice, validating 10 + 2 s; with 10 updates that is 57.25 s of 90 %."""
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    with pytest.raises(InputError, match=(
            r"^train.minutes: expected at least 2 on this machine, found 0.5: "
            r"compiling takes 20 s, twice, and an update 0.25 s$")):
        run = Run(clock)
        decide_steps(run, run.training, TrainConfig(steps=1000, minutes=0.5), begin=50.0)
    run = Run(clock)
    config = TrainConfig(steps=1000, minutes=2, eval_every=100)
    assert decide_steps(run, run.training, config, begin=clock.seconds)[0] >= 10


def test_slow_updates_are_timed_once(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    run = Run(clock)
    assert measure_step_times(run, run.training, 20).update == 0.25 and run.indices == [0, 1]


def test_the_clock_is_real():
    assert budget.time is time and np.isfinite(budget.time.monotonic())
