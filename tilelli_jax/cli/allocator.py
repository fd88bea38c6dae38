"""Settings of glibc's allocator, from which XLA takes its arrays on a CPU. Without glibc they do nothing."""

from __future__ import annotations

import contextlib
import ctypes
import sys

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGE = 2**31 - 1  # bytes; the largest value that mallopt takes


def share_one_arena() -> None:
    """Makes all threads of this process allocate from one arena; call it before the first thread starts.

    By default each of the first threads has an arena to itself, and free memory in one arena serves no other
    thread: after 10,000 questions Recall's page held 130 MiB more.
    """
    _set(_ARENA_MAX, 1)


def keep_freed_memory() -> None:
    """Makes this process keep the memory that it frees, for its next arrays; needs `share_one_arena`.

    By default every large array is mapped and unmapped, and the system clears its pages each time. A training
    step makes the same arrays again and again: without this it spent a quarter of its time there.
    """
    _set(_MMAP_THRESHOLD, _LARGE)  # an arena of another thread would still map arrays above 32 MiB
    _set(_TRIM_THRESHOLD, _LARGE)


def _set(parameter: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).mallopt(parameter, value)
