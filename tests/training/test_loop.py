"""The training loop with a one-number network: what happens at which step, and in which order."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from tilelli_jax.data.windows import TrainingBatch
from tilelli_jax.training import loop
from tilelli_jax.training.diagnose import Diverged
from tilelli_jax.training.log import LogConfig, MetricsLog, Progress, read_metrics
from tilelli_jax.training.loop import RunState, TrainConfig, Trainer
from tilelli_jax.training.loss import NATS
from tilelli_jax.training.tasks.text import TextTask


class State(NamedTuple):
    step: int
    params: float


class Batches:
    """Batch i holds the number i."""

    def __init__(self, position=0):
        self.position = position

    def __next__(self):
        self.position += 1
        return TrainingBatch(np.full((2, 3), self.position - 1, np.uint8), np.array([50, 40]))

    def get_state(self):
        return {"next_index": self.position}


class Saved:
    """Checkpoints in memory."""

    def __init__(self):
        self.notes = []

    def save(self, state, notes):
        assert notes["corpus"] == "c" and notes["step"] == state.step == notes["data"]["next_index"]
        self.notes.append(notes)

    def steps(self):
        return [notes["step"] for notes in self.notes]

    def wait(self):
        pass


class Setup:
    """A trainer whose loss at update i is 10 − i, with prescribed validation losses."""

    def __init__(self, path, valid=lambda step: 10.0 - step, bad=None, **settings):
        self.saved, self.dispatched, self.recorded, self.path = Saved(), [], [], path
        self.record_steps = []
        self.valid, self.bad = valid, bad
        self.config = TrainConfig(**{"steps": 10, "batch_size": 2, "seq_len": 2, "log_every": 2,
                                     "eval_every": 5, "checkpoint_every": 4} | settings)

    def update(self, state, batch, index):
        assert batch[0, 0] == index  # batch i goes to update i
        self.dispatched.append(int(index))
        finite = self.bad is None or index < self.bad - 1
        return State(state.step + finite, state.params), {
            "loss": np.float32(10 - index) if finite else np.float32(np.nan), "finite": np.bool_(finite),
            "learning_rate": np.float32(0.1), "grad_norm": np.float32(1), "update_norm": np.float32(2)}

    def evaluate(self, params):
        return self.valid(self.dispatched[-1] + 1)

    def record(self, from_step):
        self.record_steps.append(from_step)
        self.recorded.append(len(self.saved.notes))

    def run(self, run_state=None):
        run_state = run_state or RunState()
        task = SimpleNamespace(
            to_devices=lambda batch: batch.bytes, logged=("zero_fraction",), fingerprint="c",
            describe_batch=lambda batch: TextTask.describe_batch(None, batch), tokens=4, flops_per_token=2.0,
            loss_unit=NATS, evaluate=self.evaluate, diagnose=lambda state, batch: ["one reason", "another"],
            extra_metrics=lambda params: {"zero_fraction": np.float32(0.25), "not_logged": 1.0})
        trainer = Trainer(
            config=self.config, task=task, update=self.update, checkpoints=self.saved, run=self,
            progress=Progress(10, 0, NATS.format, show=False),
            log=MetricsLog(self.path, LogConfig(), from_step=run_state.step, name="", settings={}))
        try:
            return trainer.train(State(run_state.step, 0.0), Batches(run_state.step), run_state)
        finally:
            trainer.log.close()

    def rows(self):
        return {row["step"]: row for row in read_metrics(self.path)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.mark.eight_devices
def test_schedule_of_logs_validation_and_checkpoints(path, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda device: 100.0)
    setup = Setup(path)
    state, run_state = setup.run()
    assert state.step == 10 and setup.dispatched == list(range(10))
    assert run_state._replace(seconds=0) == RunState(10, 0, 0.0, 10, 0.0, 40)
    assert run_state.seconds > 0
    assert setup.saved.steps() == [4, 5, 8, 10]  # every fourth, the best so far, the last
    assert setup.recorded == [0, 1, 2, 3], "before each"
    rows = setup.rows()
    assert list(rows) == [1, 2, 4, 5, 6, 8, 10]  # the first, every second, all validated
    assert all(row["loss"] == 11 - step and row["zero_fraction"] == 0.25 for step, row in rows.items())
    assert {step: row["valid_loss"] for step, row in rows.items() if "valid_loss" in row} == {5: 5.0, 10: 0.0}
    assert rows[10]["valid_bits_per_byte"] == 0.0 and rows[2]["tokens"] == 8
    measured = [row for row in rows.values() if row["tokens_per_second"]]
    assert measured  # mfu: two operations per token, peak 100 per second on each of 8 devices
    assert all(row["mfu"] == pytest.approx(row["tokens_per_second"] * 2 / 800) for row in measured)


def test_only_a_better_loss_is_best(path):
    setup = Setup(path, valid=lambda step: {3: 2.0, 6: 2.0, 9: 3.0, 10: 2.5}[step], eval_every=3,
                  checkpoint_every=100)
    _, run_state = setup.run()
    assert (run_state.best_step, run_state.best_loss, run_state.valid_loss) == (3, 2.0, 2.5)
    assert setup.saved.steps() == [3, 10]
    assert [notes["best_step"] for notes in setup.saved.notes] == [3, 3]
    json.dumps(setup.saved.notes)


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_request_to_stop_saves_immediately(path, monkeypatch, at):
    monkeypatch.setattr(loop, "should_stop", lambda step: step == at)
    setup = Setup(path)
    state, run_state = setup.run()
    assert state.step == run_state.step == at and setup.saved.steps()[-1] == at
    assert setup.saved.notes[-1]["valid_loss"] == (5.0 if at == 5 else math.inf)
    # The resumed run ends like an uninterrupted one.
    monkeypatch.undo()
    notes = {key: value for key, value in setup.saved.notes[-1].items() if key not in ("data", "corpus")}
    resumed = Setup(path)
    _, run_state = resumed.run(RunState(**notes))
    assert resumed.dispatched == list(range(at, 10))
    assert run_state._replace(seconds=0) == RunState(10, 0, 0.0, 10, 0.0, 40)
    assert run_state.seconds >= notes["seconds"]
    assert [row["loss"] for row in setup.rows().values()] == [10, 9, 7, 6, 5, 3, 1]


@pytest.mark.parametrize("bad", [1, 3, 4, 5, 10])
def test_bad_numbers_stop_the_run_and_nothing_bad_is_saved(path, bad):
    setup = Setup(path, bad=bad)
    with pytest.raises(Diverged) as raised:
        setup.run()
    message = str(raised.value)
    assert message.startswith(f"step {bad}: the loss is nan, the gradient norm 1 ")
    assert f"batch {bad - 1} of the data" in message and "windows start at bytes 40, 50 of" in message
    assert "- one reason\n" in message and "- another\n" in message
    good = [step for step in (4, 5, 8) if step < bad]
    assert setup.saved.steps() == good
    assert message.endswith(f"last good checkpoint: {f'step {good[-1]}' if good else 'none yet'}")
    # One more update may have been dispatched; it left the state unchanged.
    assert setup.dispatched[-1] in (bad - 1, bad)
    assert all(step < bad for step in setup.rows())


def test_a_validation_loss_that_is_not_finite_stops_the_run(path):
    setup = Setup(path, valid=lambda step: math.nan)
    with pytest.raises(Diverged, match=r"step 5: the validation loss is nan(?s:.*)checkpoint: step 4$"):
        setup.run()
    assert setup.saved.steps() == [4]


def test_a_complete_run_has_nothing_to_do(path):
    setup = Setup(path)
    state, run_state = setup.run(RunState(10, 5.0, 1.0, 5, 2.0))
    assert setup.dispatched == [] and setup.saved.steps() == []
    assert state.step == 10 and run_state.best_step == 5 and run_state.seconds >= 5.0


def test_the_rate_shown_excludes_pauses_and_the_time_left_includes_them(monkeypatch):
    seconds = 0.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: seconds)
    clock, shown = loop._Clock(before=100.0), []
    for step in range(1, 501):
        seconds += 30.0 if step == 1 else 0.5  # the first update compiles
        if step % 100 == 0:
            with clock.paused():
                seconds += 20.0
        clock.tick(step)
        shown.append((clock.rate(), clock.seconds_left(500 - step)))
    rates, left = zip(*shown, strict=True)
    assert rates[0] is None and left[0] is None
    assert rates[1:] == pytest.approx([2.0] * 499)
    assert left[98] == pytest.approx(401 * 0.5), "no pause has been seen"
    assert left[399] == pytest.approx(100 * (0.5 + 80 / 399))
    assert left[499] == 0 and clock.total() == 100 + 30 + 499 * 0.5 + 100


def test_a_lap_is_the_rate_since_the_last_one(monkeypatch):
    seconds = 0.0
    monkeypatch.setattr(loop.time, "monotonic", lambda: seconds)
    clock, laps = loop._Clock(before=0.0), []
    for step in range(1, 7):
        seconds += step
        clock.tick(step)
        if step % 2 == 0 or step == 1:
            laps.append(clock.lap())
    assert laps == [None, 1 / 2, 2 / 7, 2 / 11]
