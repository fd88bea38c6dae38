"""The training loop: runs updates, and logs, validates and saves checkpoints between them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from tilelli_jax.config import Section, setting
from tilelli_jax.errors import InputError
from tilelli_jax.training.checkpoint import Checkpoints
from tilelli_jax.training.diagnose import Diverged
from tilelli_jax.training.distributed import should_stop
from tilelli_jax.training.log import MetricsLog, Progress
from tilelli_jax.training.step import Metrics, TrainState, Update
from tilelli_jax.training.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """Length of the run, batch sizes, and intervals of logging, validation and checkpoints."""

    steps: int = setting(1000, "number of updates", min=1)
    batch_size: int = setting(32, "sequences (or activations) per update, over all devices", min=1)
    seq_len: int = setting(256, "context length of a training sequence, in bytes", min=1)
    accumulate: int = setting(
        1, "gradient accumulation: parts that an update's batch is split into and computed one after "
        "another; the load-balance loss is computed per part and averaged", min=1)
    load_balance: float = setting(
        0.01, "weight of the load-balance loss (routed networks trained on text)", min=0)
    init_from: str = setting("", "model directory to start from; empty: random weights")
    log_every: int = setting(10, "updates between rows of metrics.jsonl", min=1)
    eval_every: int = setting(500, "updates between validations; the last update is always validated", min=1)
    eval_batch_size: int = setting(32, "sequences (or activations) in a validation batch", min=1)
    eval_bytes: int = setting(
        1_000_000, "maximum number of bytes (or activations) to validate on; 0: the whole validation split",
        min=0, max=2**62)
    checkpoint_every: int = setting(
        500, "updates between checkpoints; the last update is always saved", min=1)
    keep: int = setting(2, "number of newest checkpoints to keep; the best one is also kept", min=1)
    export: Literal["best", "last"] = setting(
        "best", "weights written to model/: those with the lowest validation loss, or the last")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate: expected a divisor of batch_size {self.batch_size}, "
                             f"found {self.accumulate}")

    def check_shared(self, n_devices: int) -> None:
        """Raises InputError unless the batch sizes are multiples of `n_devices`."""
        for key, size in (("train.batch_size / train.accumulate", self.batch_size // self.accumulate),
                          ("train.eval_batch_size", self.eval_batch_size)):
            if size % n_devices:
                raise InputError(f"{key}: expected a multiple of the {n_devices} devices that share a "
                                 f"batch (mesh.data × mesh.fsdp), found {size}")


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
    evaluate: Callable[[Any], float]
    diagnose: Callable[[TrainState, Any], list[str]]
    extra: Callable[[Any], Metrics]
    peak_flops: float | None
    checkpoints: Checkpoints
    notes: dict[str, Any]  # saved with every checkpoint besides the run state
    record: Callable[[], None]  # called before each checkpoint; records changed settings
    log: MetricsLog | None  # None in all processes but the first
    progress: Progress

    def run(self, state: TrainState, batches: Any, run_state: RunState) -> tuple[TrainState, RunState]:
        """Trains from `run_state.step` to the last step, or until a request to stop.

        Args:
            batches: an iterator with `get_state()`, advanced by `run_state.step` batches.

        Raises:
            Diverged: an update's numbers, or the validation loss, were not finite.
        """
        config, clock = self.config, _Clock(run_state.seconds)
        pending: _Pending | None = None
        for step in range(run_state.step + 1, config.steps + 1):
            batch = next(batches)
            state, metrics = self.update(state, self.task.place(batch), np.int32(step - 1))
            if self._logs(step):
                metrics = metrics | self.extra(state.params)
            if pending:  # fetch the last update's numbers while this one is computed
                self._log_update(pending, state, run_state, clock)
            run_state = run_state._replace(step=step, tokens=run_state.tokens + self.task.tokens)
            pending = _Pending(step, run_state.tokens, metrics, batch)

            last, stop = step == config.steps, should_stop(step)
            due = self._validates(step)
            if due or stop or step % config.checkpoint_every == 0:
                finite = self._check(pending, state)
                with clock.paused():
                    if due:
                        run_state = self._validate(state, run_state)
                self._log_update(pending, state, run_state, clock, finite)
                pending = None
                with clock.paused():
                    if stop or last or step % config.checkpoint_every == 0 or run_state.best_step == step:
                        run_state = run_state._replace(seconds=clock.total())
                        self.record()
                        self.checkpoints.save(
                            state, {**run_state._asdict(), **self.notes, "data": batches.get_state()})
            if stop:
                break
        self.checkpoints.wait()
        return state, run_state._replace(seconds=clock.total())

    def _validates(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.config.steps

    def _logs(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == 1 or self._validates(step)

    def _validate(self, state: TrainState, run_state: RunState) -> RunState:
        valid_loss = self.evaluate(state.params)
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
            reasons = "\n".join(f"  - {sentence}" for sentence in self.diagnose(state, batch))
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
        tokens = self.task.tokens
        loss = float(metrics["loss"])
        self.progress.update(step, loss, clock.rate(step, tokens))
        if self.log is None or not self._logs(step):
            return
        speed = clock.lap(step, tokens)
        row: dict[str, Any] = {
            "step": step, "loss": loss, **self.task.loss_unit.columns(loss),
            "lr": float(metrics["learning_rate"]), "grad_norm": float(metrics["grad_norm"]),
            "tokens": pending.tokens, "seconds": round(clock.total(), 3), "tokens_per_second": speed}
        if speed and self.peak_flops and self.task.flops_per_token:
            row["mfu"] = speed * self.task.flops_per_token / (self.peak_flops * jax.device_count())
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
    """Measures training time, in total over all sessions and per lap; laps exclude validation and saving."""

    def __init__(self, before: float):
        self._start = time.monotonic() - before
        self._lap_start: float | None = None  # None until the first update has been compiled and run
        self._lap_step = 0
        self._paused = 0.0

    def total(self) -> float:
        """Returns the run's total seconds, including compilation, validation and saving."""
        return time.monotonic() - self._start

    def paused(self) -> _Pause:
        return _Pause(self)

    def add_pause(self, seconds: float) -> None:
        self._paused += seconds

    def rate(self, step: int, tokens: int) -> float | None:
        """Returns tokens per second since the lap began; None before there is anything to measure."""
        if self._lap_start is None:
            self._lap_start, self._lap_step, self._paused = time.monotonic(), step, 0.0
            return None
        busy = time.monotonic() - self._lap_start - self._paused
        return (step - self._lap_step) * tokens / busy if busy > 0 and step > self._lap_step else None

    def lap(self, step: int, tokens: int) -> float | None:
        """Returns the rate and begins the next lap."""
        rate = self.rate(step, tokens)
        self._lap_start, self._lap_step, self._paused = time.monotonic(), step, 0.0
        return None if rate is None else round(rate, 1)


class _Pause:
    def __init__(self, clock: _Clock):
        self._clock = clock

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._clock.add_pause(time.monotonic() - self._begin)
