"""How far long work has come: a bar in a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from tilelli_jax import interrupts

EVERY = 30.0  # seconds between two plain lines


@contextlib.contextmanager
def shown(total: int, what: str, unit: str, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A function to be called with the number of units that are newly done; between two calls work can stop.

    Args:
        quiet: shows nothing.

    Raises:
        KeyboardInterrupt, SystemExit: from that function, after a signal (`interrupts.raise_if_received`).
    """
    terminal = sys.stderr.isatty()
    done, last = 0, time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, last
        interrupts.raise_if_received()
        done += more
        bar.update(more)
        if not quiet and not terminal and time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(f"{what}: {done:,} of {total:,} {unit}s", file=sys.stderr, flush=True)

    with tqdm(total=total, desc=what, unit=unit, leave=False, disable=quiet or not terminal) as bar:
        yield advance
