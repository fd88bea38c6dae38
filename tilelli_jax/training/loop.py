"""The training loop: runs updates, and logs, validates and saves checkpoints between them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from tilelli_jax.training.checkpoint import Checkpoints
from tilelli_jax.training.config import TrainConfig
from tilelli_jax.training.diagnose import Diverged
from tilelli_jax.training.distributed import should_stop
from tilelli_jax.training.flops import peak_flops
from tilelli_jax.training.log import MetricsLog, Progress
from tilelli_jax.training.loss import Metrics
from tilelli_jax.training.run import RunDirectory
from tilelli_jax.training.step import TrainState, Update
from tilelli_jax.training.tasks.base import Task

RECENT = 100  # updates over which the rate that is shown is averaged


class RunState(NamedTuple):
    """The progress of a run besides its arrays; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    valid_loss: float = math.inf
    tokens: int = 0  # tokens processed, at each update's own batch size


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The training loop and the components it uses."""

    config: TrainConfig
    task: Task
    update: Update
    checkpoints: Checkpoints
    run: RunDirectory
    log: MetricsLog | None  # None in all processes but the first
    progress: Progress

    def train(self, state: TrainState, batches: Any, run_state: RunState) -> tuple[TrainState, RunState]:
        """Trains from `run_state.step` to the last step, or until a request to stop.

        Args:
            batches: an iterator with `get_state()`, advanced by `run_state.step` batches.

        Raises:
            Diverged: an update's numbers, or the validation loss, were not finite.
        """
        config, clock, first = self.config, _Clock(run_state.seconds), run_state.step
        pending: _Pending | None = None
        for step in range(run_state.step + 1, config.steps + 1):
            batch = next(batches)
            state, metrics = self.update(state, self.task.to_devices(batch), np.int32(step - 1))
            if self._logs(step):
                metrics = metrics | self.task.extra_metrics(state.params)
            if pending:  # fetch the last update's numbers while this one is computed
                self._log_update(pending, state, run_state, clock)
            run_state = run_state._replace(step=step, tokens=run_state.tokens + self.task.tokens)
            pending = _Pending(step, run_state.tokens, metrics, batch)

            last, stop = step == config.steps, should_stop(step)
            due = self._validates(step)
            if due or stop or step % config.checkpoint_every == 0:
                finite = self._check(pending, state)
                if due:
                    with clock.paused(), self.progress.activity("validating"):
                        run_state = self._validate(state, run_state)
                self._log_update(pending, state, run_state, clock, finite)
                pending = None
                if stop or last or step % config.checkpoint_every == 0 or run_state.best_step == step:
                    with clock.paused(), self.progress.activity("saving"):
                        run_state = run_state._replace(seconds=clock.total())
                        self.run.record(from_step=first)
                        self.checkpoints.save(state, {
                            **run_state._asdict(), "corpus": self.task.fingerprint,
                            "data": batches.get_state()})
            if stop:
                break
        self.checkpoints.wait()
        return state, run_state._replace(seconds=clock.total())

    def _validates(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.steps

    def _logs(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == 1 or self._validates(step)

    def _validate(self, state: TrainState, run_state: RunState) -> RunState:
        valid_loss = self.task.evaluate(state.params)
        if not math.isfinite(valid_loss):
            raise Diverged(f"step {run_state.step}: the validation loss is {valid_loss}, although the "
                           f"training loss is finite\n{self._last_good()}")
        formatted = self.task.loss_unit.format(valid_loss)
        self.progress.print_line(f"step {run_state.step}: validation {formatted}")
        run_state = run_state._replace(valid_loss=valid_loss)
        if valid_loss < run_state.best_loss:
            run_state = run_state._replace(best_loss=valid_loss, best_step=run_state.step)
        return run_state

    def _check(self, pending: _Pending, state: TrainState) -> Metrics:
        """Fetches the update's metrics. Raises Diverged if they are not finite."""
        step, batch = pending.step, pending.batch
        metrics = jax.device_get(pending.metrics)
        if not metrics["finite"]:
            reasons = "\n".join(f"  - {sentence}" for sentence in self.task.diagnose(state, batch))
            raise Diverged(
                f"step {step}: the loss is {metrics['loss']:.4g}, the gradient norm "
                f"{metrics['grad_norm']:.4g} and the update norm {metrics['update_norm']:.4g}; "
                f"training stopped before this update\n"
                f"  - batch {step - 1} of the data (counted from 0), {self.task.describe_batch(batch)}\n"
                f"{reasons}\n{self._last_good()}")
        return metrics

    def _last_good(self) -> str:
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return f"  - last good checkpoint: {f'step {steps[-1]}' if steps else 'none yet'}"

    def _log_update(self, pending: _Pending, state: TrainState, run_state: RunState,
                    clock: _Clock, metrics: Metrics | None = None) -> None:
        """Waits for an update's metrics, and logs them if a row is due."""
        step = pending.step
        metrics = metrics or self._check(pending, state)
        loss, tokens = float(metrics["loss"]), self.task.tokens
        clock.tick(step)
        rate = clock.rate()
        self.progress.update(step, loss, rate and rate * tokens,
                             clock.seconds_left(self.config.steps - step))
        if self.log is None or not self._logs(step):
            return
        speed = None if (lap := clock.lap()) is None else round(lap * tokens, 1)
        row: dict[str, Any] = {
            "step": step, "loss": loss, **self.task.loss_unit.columns(loss),
            "lr": float(metrics["learning_rate"]), "grad_norm": float(metrics["grad_norm"]),
            "tokens": pending.tokens, "seconds": round(clock.total(), 3), "tokens_per_second": speed}
        peak = peak_flops(jax.devices()[0])
        if speed and peak and self.task.flops_per_token:
            row["mfu"] = speed * self.task.flops_per_token / (peak * jax.device_count())
        row |= {key: metrics[key] for key in self.task.logged if key in metrics}
        if self._validates(step):
            row |= {"valid_loss": run_state.valid_loss,
                    **self.task.loss_unit.columns(run_state.valid_loss, "valid_")}
        self.log.write(row)


class _Pending(NamedTuple):
    """An update whose metrics have not been fetched yet; `tokens` is the run's total up to it."""

    step: int
    tokens: int
    metrics: Metrics
    batch: Any


class _Clock:
    """Measures training time in total over all sessions, and the rate of updates without pauses."""

    def __init__(self, before: float):
        self._start = time.monotonic() - before
        self._first: tuple[int, float] | None = None  # the first update and when it ended: it compiles
        self._paused = 0.0  # seconds since then in which no updates were computed
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=RECENT + 1)
        self._lap = 0, 0.0

    def total(self) -> float:
        """Returns the run's total seconds, including compilation, validation and saving."""
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """In this context no updates are computed."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begin

    def tick(self, step: int) -> None:
        """Notes that an update has ended."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._paused, self._lap = (step, now), 0.0, (step, 0.0)
        self._recent.append((step, now - self._first[1] - self._paused))

    def rate(self) -> float | None:
        """Returns recent updates per second; None before there is anything to measure."""
        return _rate(self._recent[0], self._recent[-1])

    def lap(self) -> float | None:
        """Returns updates per second since the last call."""
        begin, self._lap = self._lap, self._recent[-1]
        return _rate(begin, self._lap)

    def seconds_left(self, updates: int) -> float | None:
        """Returns the seconds that so many updates take, with pauses as frequent and long as before."""
        rate = self.rate()
        if rate is None or self._first is None:
            return None
        return updates * (1 / rate + self._paused / (self._recent[-1][0] - self._first[0]))


def _rate(begin: tuple[int, float], end: tuple[int, float]) -> float | None:
    """Returns updates per second between two (step, seconds)."""
    return (end[0] - begin[0]) / (end[1] - begin[1]) if end[0] > begin[0] and end[1] > begin[1] else None
