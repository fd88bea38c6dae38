"""Progress of long work: a bar in a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from tilelli_jax.cli import interrupts

INTERVAL = 30.0  # seconds between two plain lines


class Heartbeat:
    """Calls a function at intervals, in a thread of its own, until it is closed.

    The thread also runs while the main thread waits for a compiler or a device.
    """

    def __init__(self, seconds: float, beat: Callable[[], object]) -> None:
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(seconds, beat), name="progress", daemon=True)
        self._thread.start()

    def _run(self, seconds: float, beat: Callable[[], object]) -> None:
        while not self._closed.wait(seconds):
            with contextlib.suppress(OSError, ValueError):  # a closed stream
                beat()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=1)


@contextlib.contextmanager
def shown(total: int, what: str, unit: str, *, done: int = 0, quiet: bool = False
          ) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of units just completed.

    Args:
        total: number of units.
        what: label of the bar and the lines.
        unit: name of a unit, in the singular.
        done: number of units that an earlier run completed.
        quiet: print nothing.

    Raises:
        KeyboardInterrupt, SystemExit: from the function, after a signal (`interrupts.raise_if_received`).
    """
    terminal = sys.stderr.isatty()
    before, begin = done, time.monotonic()

    def advance(newly_done: int) -> None:
        nonlocal done
        interrupts.raise_if_received()
        done += newly_done
        bar.update(newly_done)

    def print_line() -> None:
        seconds = time.monotonic() - begin
        left = f"; {duration((total - done) / (done - before) * seconds)} left" if done > before else ""
        sys.stderr.write(f"{what}: {done:,} of {total:,} {unit}s{left}\n")
        sys.stderr.flush()

    with contextlib.ExitStack() as cleanup:
        bar = cleanup.enter_context(
            tqdm(total=total, initial=done, desc=what, unit=unit, leave=False, disable=quiet or not terminal))
        if not quiet and not terminal:
            cleanup.callback(Heartbeat(INTERVAL, print_line).close)
        yield advance


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Prints the line `what … 30 s` every 30 seconds while the context lasts."""
    begin, out = time.monotonic(), sys.stdout

    def print_line() -> None:
        out.write(f"{what} … {duration(time.monotonic() - begin)}\n")
        out.flush()

    with contextlib.closing(Heartbeat(INTERVAL, print_line)):
        yield


def duration(seconds: float) -> str:
    """Formats a time span: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    return f"{minutes} min {seconds % 60} s" if hours == 0 else f"{hours} h {minutes % 60} min"
