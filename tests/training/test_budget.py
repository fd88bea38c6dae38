"""How many updates fit into a time budget."""

from __future__ import annotations

import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tilelli_jax.errors import InputError
from tilelli_jax.training import budget
from tilelli_jax.training.budget import (
    StepTimes,
    decide_steps,
    few_updates,
    measure_step_times,
    minutes_for,
    steps_within,
)
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
    assert costs == StepTimes(20.25, 0.25, 2, spent + 20.25) and steps == int(left / (0.25 + 0.02))


@pytest.mark.parametrize(("minutes", "before", "updates", "validations", "expected"), [
    # Compiling takes 20.25 s twice: 40.5 s of 90 % of 42 s. 1.5 × 40.5 s / 0.9 = 67.5 s.
    (0.7, 0, 1, 0, "at least 2 on this machine, found 0.7: compiling takes 20 s, up to twice"),
    # The same after 60 s of other work: 1.5 × 100.5 s / 0.9 = 167.5 s.
    (1, 60, 1, 0, "at least 3 on this machine, found 1: compiling takes 20 s, up to twice"),
    # With 1 + 2 updates for the timing and 10 updates: 43.75 s of 43.2 s; 1.5 × 43.75 s / 0.9 = 72.9 s.
    (0.8, 0, 4, 0,
     "at least 2 on this machine, found 0.8: compiling takes 20 s, up to twice, and an update 0.25 s"),
    # And with two validations of 10 s: 64.95 s of 54 s; 1.5 × 64.95 s / 0.9 = 108.2 s.
    (1, 0, 8, 1,
     "at least 2 on this machine, found 1: compiling takes 20 s, up to twice, and an update 0.25 s")])
def test_a_budget_that_does_not_fit_ends_as_soon_as_that_is_known(minutes, before, updates, validations,
                                                                  expected, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    run = Run(clock)
    with pytest.raises(InputError) as refused:
        decide_steps(run, run.training, TrainConfig(steps=1000, minutes=minutes), clock.seconds - before)
    assert str(refused.value) == (
        f"train.minutes: expected {expected}; train.minutes=null train.steps=N does N updates, however long "
        "they take")
    assert (len(run.indices), run.validations) == (updates, validations)
    enough = int(expected.split()[2])
    assert enough >= 1.5 * minutes
    run = Run(clock)
    config = TrainConfig(steps=1000, minutes=enough, eval_every=100)
    assert decide_steps(run, run.training, config, clock.seconds - before)[0] >= 10


def test_a_cached_program_does_not_hide_the_time_of_compiling(monkeypatch):
    """The program of the run itself, with another number of updates, is not in the cache."""
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    run = Run(clock)
    update = run.training.update

    def cached(state, batch, index):
        if not run.indices:
            jax.monitoring.record_event_duration_secs(budget.SAVED, 30.0)
            jax.monitoring.record_event_duration_secs("/jax/another", 30.0)
        return update(state, batch, index)
    assert measure_step_times(run, run.training._replace(update=cached), 20).compilation == 20.25 + 30
    jax.monitoring.record_event_duration_secs(budget.SAVED, 30.0)  # nothing listens any more
    run = Run(clock)
    assert measure_step_times(run, run.training, 20).compilation == 20.25


COSTS = StepTimes(20.0, 0.25, 2.0, 60.0)


@pytest.mark.parametrize(("steps", "most", "warmup", "expected"), [
    (199, 5000, 50, "only 199 updates fit into 5 minutes, 50 of them in the warm-up"),
    (18, 5000, 50, "only 18 updates fit into 5 minutes, 18 of them in the warm-up"),
    (199, 5000, 10, "only 199 updates fit into 5 minutes: the network will hardly learn; "),
    (399, 5000, 100, "only 399 updates"), (200, 5000, 50, None), (400, 5000, 100, None),
    (30, 30, 50, None)])  # train.steps allows no more
def test_a_note_on_few_updates(steps, most, warmup, expected):
    config = TrainConfig(steps=most, minutes=5, eval_every=100)
    note = few_updates(steps, COSTS, config, warmup)
    assert note.startswith(expected) if expected else note == ""
    # 800 updates of 0.27 s, after 62 s: 1.5 × 278 s / 0.9 = 463 s.
    assert not note or note.endswith("train.minutes=8 is enough for 800 updates (in another run_dir)")


def test_the_budget_of_a_note_is_for_the_updates_that_are_needed():
    config = TrainConfig(steps=5000, minutes=5, eval_every=100)
    assert "train.minutes=32 is enough for 4,000 updates" in few_updates(900, COSTS, config, 1000)
    short = TrainConfig(steps=300, minutes=5, eval_every=100)
    assert "train.minutes=4 is enough for 300 updates" in few_updates(100, COSTS, short, 50)
    assert minutes_for(4000, COSTS, config) == 32  # 1.5 × (62 + 1080) s / 0.9 = 1903 s


def test_slow_updates_are_timed_once(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(budget, "time", clock)
    run = Run(clock)
    assert measure_step_times(run, run.training, 20).update == 0.25 and run.indices == [0, 1]


def test_the_clock_is_real():
    assert budget.time is time and np.isfinite(budget.time.monotonic())
