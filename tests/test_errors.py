"""Commands end as they were asked to: an interrupt that comes at a bad moment is not lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import gc, os, signal, sys, time
from tilelli_jax.errors import command
{settings}
@command
def main(argv):
    {moment}
    time.sleep(20)
    print("went on to its end")
sys.exit(main([]))
"""
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT); [None for _ in range(1000)]"
MOMENTS = {
    "garbage collection": (f"def called(phase, info):\n    gc.callbacks.clear()\n    {INTERRUPT}\n"
                           "gc.callbacks.append(called)", "gc.collect()"),
    "a finaliser": (f"class Held:\n    def __del__(self): {INTERRUPT}", "held = Held(); del held"),
    "plain work": ("", INTERRUPT)}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_is_not_lost(moment: str, environment: dict[str, str]) -> None:
    settings, line = MOMENTS[moment]
    # What a shell starts in the background ignores Ctrl-C.
    program = PROGRAM.format(settings=f"signal.signal(signal.SIGINT, signal.default_int_handler)\n{settings}",
                             moment=line)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True,
                          timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
