"""Settings of glibc's allocator."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tilelli_jax.cli import allocator

FAULTS = """
import resource
import numpy as np
from tilelli_jax.cli.allocator import keep_freed_memory, share_one_arena

share_one_arena()
keep_freed_memory()
np.ones(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(8 << 20)  # 64 MiB, 16384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


ARENAS = """
import ctypes, threading
from tilelli_jax.cli.command import command

@command
def main(argv):
    import jax.numpy as jnp
    jnp.ones(3).block_until_ready()
    together = threading.Barrier(8)
    def use():
        bytearray(10_000), together.wait()
    threads = [threading.Thread(target=use) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
    libc.fflush(None)

main([])
"""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")


@needs_glibc
def test_all_threads_of_a_command_share_one_arena() -> None:
    process = subprocess.run([sys.executable, "-c", ARENAS], check=True, capture_output=True)
    assert process.stdout.count(b"<heap nr") == 1


@needs_glibc
def test_freed_memory_is_used_again() -> None:
    """Without the setting each array is mapped anew, and each of its pages faults."""
    process = subprocess.run([sys.executable, "-c", FAULTS], env=os.environ, check=True, capture_output=True,
                             text=True)
    assert int(process.stdout) < 500


def test_without_glibc_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    for library in (SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments)), SimpleNamespace()):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, library=library: library)
        monkeypatch.setattr(sys, "platform", "linux")
        allocator.share_one_arena()
    monkeypatch.setattr(sys, "platform", "darwin")
    allocator.share_one_arena()
    assert calls == [(-8, 1)]
