"""Progress of long work: a bar in a terminal, a plain line every 30 seconds elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from tilelli_jax.cli import interrupts

INTERVAL = 30.0  # seconds between two plain lines


@contextlib.contextmanager
def shown(total: int, what: str, unit: str, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of units just completed.

    Args:
        total: number of units.
        what: label of the bar and the lines.
        unit: name of a unit, in the singular.
        quiet: print nothing.

    Raises:
        KeyboardInterrupt, SystemExit: from the function, after a signal (`interrupts.raise_if_received`).
    """
    terminal = sys.stderr.isatty()
    done, last = 0, time.monotonic()

    def advance(newly_done: int) -> None:
        nonlocal done, last
        interrupts.raise_if_received()
        done += newly_done
        bar.update(newly_done)
        if not quiet and not terminal and time.monotonic() - last >= INTERVAL:
            last = time.monotonic()
            print(f"{what}: {done:,} of {total:,} {unit}s", file=sys.stderr, flush=True)

    with tqdm(total=total, desc=what, unit=unit, leave=False, disable=quiet or not terminal) as bar:
        yield advance
