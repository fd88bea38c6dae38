"""Logs metrics to metrics.jsonl, the terminal and, optionally, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from tilelli_jax import extras
from tilelli_jax.cli.progress import INTERVAL, Heartbeat, duration
from tilelli_jax.config import Section, setting
from tilelli_jax.io.files import write_atomically


@dataclasses.dataclass(frozen=True)
class LogConfig(Section):
    """Log destinations besides metrics.jsonl."""

    tensorboard: bool = setting(False, "also write TensorBoard events (extra: tensorboard)")
    wandb_project: str = setting("", "also log to this Weights & Biases project (extra: wandb); empty: off")


def require_extras(config: LogConfig) -> None:
    """Raises InputError if a configured log needs a package that is not installed."""
    for key, wanted, package in (("tensorboard", config.tensorboard, "tensorboardX"),
                                 ("wandb_project", config.wandb_project, "wandb")):
        if wanted and importlib.util.find_spec(package) is None:
            raise extras.missing(package, f"log.{key}")


class MetricsLog:
    """The metrics of a run, one row per logged step; drops old rows later than the step it resumes from."""

    def __init__(self, path: Path, config: LogConfig, *, from_step: int, name: str,
                 settings: dict[str, Any]):
        old_rows = [row for row in read_metrics(path) if row["step"] <= from_step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in old_rows).encode())
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._writers: list[_TensorBoard | _WeightsAndBiases] = []
        if config.tensorboard:
            self._writers.append(_TensorBoard(path.parent / "tensorboard", from_step))
        if config.wandb_project:
            self._writers.append(_WeightsAndBiases(config.wandb_project, path.parent, name, settings))

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row, which must have `step`. Arrays become lists; a non-finite number becomes null."""
        plain = {key: _plain(value) for key, value in row.items()}
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()
        for writer in self._writers:
            writer.write(plain)

    def close(self) -> None:
        self._file.close()
        for writer in self._writers:
            writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl up to the first invalid line, such as a truncated last one."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


class Progress:
    """Progress of a run with loss, speed and time left: a bar in a terminal, otherwise lines at intervals.

    Without a terminal, a line is printed every `progress.INTERVAL` seconds, also while the first update
    compiles and during a validation.

    Args:
        unit: what the speed counts, in the plural.
    """

    def __init__(self, steps: int, start: int, format_loss: Callable[[float], str], *, unit: str = "tokens",
                 show: bool = True):
        self._steps, self._step, self._format_loss, self._show = steps, start, format_loss, show
        self._unit = unit
        self._state = ""  # loss, speed and time left after the last update
        self._activity, self._since = "compiling", time.monotonic()  # other work than updates, or ""
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, dynamic_ncols=True, file=sys.stderr,
                         disable=not (show and terminal), bar_format="{desc}")
        self._heartbeat = (None if not show else Heartbeat(1.0, self._refresh) if terminal else
                           Heartbeat(INTERVAL, lambda: self.print_line(f"step {self._step} of {self._steps}: "
                                                                       f"{self.describe()}")))

    def update(self, step: int, loss: float, tokens_per_second: float | None,
               seconds_left: float | None) -> None:
        """Shows an update that has been computed; None: not known yet."""
        speed = f", {tokens_per_second:,.0f} {self._unit}/s" if tokens_per_second else ""
        left = f", {duration(seconds_left)} left" if seconds_left is not None and step < self._steps else ""
        self._step, self._state = step, f"loss {self._format_loss(loss)}{speed}{left}"
        if self._activity == "compiling":
            self._activity = ""
        if not self._bar.disable:
            self._bar.bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar.set_postfix_str(self._state, refresh=False)
            self._bar.update(step - self._bar.n)

    def is_compiling(self) -> bool:
        """Whether the first update is still being compiled."""
        return self._activity == "compiling"

    def describe(self) -> str:
        """Describes what is computed: `compiling … 45 s`, or the last update."""
        if self._activity:
            return f"{self._activity} … {duration(time.monotonic() - self._since)}"
        return self._state

    @contextlib.contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """In this context the run computes no updates but does something else, such as validating."""
        before = self._activity, self._since
        self._activity, self._since = name, time.monotonic()
        try:
            yield
        finally:
            self._activity, self._since = before

    def print_line(self, text: str) -> None:
        """Prints a line, above the bar if one is shown."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)
        elif self._show:
            sys.stdout.write(f"{text}\n")  # at once: another thread may print, too
            sys.stdout.flush()

    def close(self) -> None:
        if self._heartbeat:
            self._heartbeat.close()
        self._bar.close()

    def _refresh(self) -> None:
        if self._activity:
            self._bar.set_description_str(self.describe(), refresh=False)
        self._bar.refresh()


class _TensorBoard:
    def __init__(self, path: Path, from_step: int):
        from tensorboardX import SummaryWriter
        self._writer = SummaryWriter(str(path), purge_step=from_step + 1, filename_suffix=f".{from_step}")

    def write(self, row: dict[str, Any]) -> None:
        for key, value in flat(row).items():
            if key != "step":
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, project: str, path: Path, name: str, settings: dict[str, Any]):
        import wandb
        id_path = path / "wandb-id.txt"  # names repeat; all sessions of a run share one id
        if not id_path.exists():
            write_atomically(id_path, uuid.uuid4().hex[:12].encode())
        self._run = wandb.init(project=project, dir=str(path), name=name, id=id_path.read_text(),
                               config=settings, resume="allow")

    def write(self, row: dict[str, Any]) -> None:
        self._run.log(flat(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Flattens lists by index: {"a": [1, [2]]} → {"a/0": 1, "a/1/0": 2}; drops non-numbers."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, list):
            numbers |= flat({str(i): item for i, item in enumerate(value)}, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers[prefix + key] = value
    return numbers


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
