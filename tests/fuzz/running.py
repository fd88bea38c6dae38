"""Runs a command on a mutated copy of its input and reports faults in how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fnmatch
import io
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutators import BY_KIND, LARGE, Mutator, Rng, kind_of

SEED = int(os.environ.get("FUZZ_SEED", "0"))  # another seed gives other mutations
TIME_LIMIT = 60  # seconds per input
MEMORY_LIMIT = 4 << 30  # resident bytes of the process
MAX_CHARACTERS = 2000  # in an error message
DIVERGED = 3
NOTE_PREFIXES = ("note: ",)


@dataclasses.dataclass(frozen=True)
class Target:
    """A command and the files that it reads.

    Attributes:
        make: fills the current directory with a valid input. main: the command, run in that directory. argv:
        its arguments, separated by spaces. mutated: patterns of the paths that are mutated, separated by
        spaces. inputs: number of mutated inputs. writes: patterns of paths that may change although the input
        is rejected, such as completed stages. prints_progress: whether stderr may also contain progress
        lines.
        statuses: valid exit statuses. large: whether to make files of 1 TiB. False for texts of unlimited
        size, which take too long to read. expected_error: part of the error on the valid input, for commands
        that read all files before they fail
            for another reason; "" if the command succeeds.
    """

    name: str
    make: Callable[[], None]
    main: Callable[[list[str]], int]
    argv: str
    mutated: str
    inputs: int
    writes: str = ""
    prints_progress: bool = False
    statuses: Sequence[int] = (0, 2)
    large: bool = True
    expected_error: str = ""

    def plan(self, base: Path) -> list[tuple[Path, Mutator]]:
        """File and mutator of each input: cycles through all files, and per file through all mutators."""
        files = sorted({path.relative_to(base) for pattern in self.mutated.split()
                        for path in base.glob(pattern)})
        assert files, f"{self.name}: no file matches {self.mutated}"
        remaining: dict[Path, list[Mutator]] = {}
        rng, plan = generator(self.name), []
        while len(plan) < self.inputs:
            file = files[len(plan) % len(files)]
            if not remaining.get(file):
                mutators = BY_KIND[kind_of(base / file)]
                candidates = [mutator for mutator in mutators if self.large or mutator not in LARGE]
                remaining[file] = [candidates[i] for i in rng.permutation(len(candidates))]
            plan.append((file, remaining[file].pop()))
        return plan


@dataclasses.dataclass
class Outcome:
    """How a command ended: status or exception, output, warnings, seconds, peak bytes, changed files."""

    status: int | None
    raised: str
    out: str
    err: str
    warned: list[str]
    seconds: float
    peak: int
    changed: list[str]


class TimeLimitExceeded(BaseException):
    """Raised after TIME_LIMIT; not an Exception, so that the command does not catch it."""


def generator(name: str, number: int = -1) -> Rng:
    """The random generator of an input; of the plan of a target if `number` is -1."""
    return np.random.default_rng([SEED, zlib.crc32(name.encode()), number + 1])


def mutate_copy(target: Target, base: Path, directory: Path, number: int) -> str:
    """Copies the valid input and mutates one file of it; returns a description of the mutation."""
    shutil.copytree(base, directory, symlinks=True)
    file, mutate = target.plan(base)[number]
    return f"{file}: {mutate.__name__}: {mutate(directory / file, generator(target.name, number))}"


def run_target(target: Target, directory: Path) -> Outcome:
    """Runs a command in a directory with limits on time and memory."""
    before, out, err = _listing(directory), io.StringIO(), io.StringIO()
    status, raised, warned = None, "", list[str]()
    with contextlib.suppress(OSError):  # resets the memory peak; Linux only
        Path("/proc/self/clear_refs").write_text("5")
    start = time.monotonic()
    with contextlib.chdir(directory), _empty_stdin(), _collect_warnings(warned), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with _limits():
                status = target.main(target.argv.split())
        except (Exception, TimeLimitExceeded, SystemExit):
            raised = traceback.format_exc()
    seconds = time.monotonic() - start
    return Outcome(status, raised, out.getvalue(), err.getvalue(), warned, seconds, memory("VmHWM"),
                   _changed(before, _listing(directory)))


def faults_of(target: Target, outcome: Outcome) -> list[str]:
    """Descriptions of all faults of an outcome; empty if there is none."""
    faults = []
    if outcome.raised:
        faults.append(f"raised {outcome.raised}")
    elif outcome.status not in target.statuses:
        faults.append(f"ended with status {outcome.status}")
    if "Traceback" in outcome.out + outcome.err:
        faults.append("printed a traceback")
    if outcome.seconds > TIME_LIMIT:
        faults.append(f"took {outcome.seconds:.0f} s")
    if outcome.peak > MEMORY_LIMIT:
        faults.append(f"took {outcome.peak / 2**30:.1f} GiB")
    if outcome.warned:
        faults.append(f"warned {outcome.warned[0]}")
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if outcome.status == 2:
        if len(errors) != 1 or lines[-1] != errors[0]:
            faults.append("did not end with exactly one line that begins with error:")
        if not target.prints_progress and any(not line.startswith(NOTE_PREFIXES) for line in lines[:-1]):
            faults.append("printed other lines on stderr")
        if len(outcome.err) > MAX_CHARACTERS and not target.prints_progress:
            faults.append(f"printed {len(outcome.err)} characters")
        if left_over := [name for name in outcome.changed if not any(
                fnmatch.fnmatch(name, pattern) for pattern in target.writes.split())]:
            faults.append(f"left {', '.join(left_over[:5])}")
    return faults


# ---------------------------------------------------------------------------------------------


def _listing(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of every path below a directory; opens no file."""
    listing = {}
    for root, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(root, name)
            stat = path.lstat()
            is_directory = path.is_dir() and not path.is_symlink()
            listing[path.relative_to(directory).as_posix()] = (
                stat.st_mode, *((0, 0) if is_directory else (stat.st_size, stat.st_mtime_ns)))
    return listing


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limits the time and the memory of one input.

    If Python cannot raise the exception, the process ends 30 seconds later. pytest-timeout uses the same
    timer, which is restored. Allocated but unused memory counts; mapped files do not.
    """
    def end(number: int, frame: Any) -> None:
        raise TimeLimitExceeded
    handler = signal.signal(signal.SIGALRM, end)
    timer = signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    faulthandler.dump_traceback_later(TIME_LIMIT + 30, exit=True, file=sys.__stderr__)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if used := memory("VmData"):
        resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY_LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def _empty_stdin() -> Iterator[None]:
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


@contextlib.contextmanager
def _collect_warnings(warned: list[str]) -> Iterator[None]:
    """Appends the warnings that Python would print to `warned`."""
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("default")
        yield
    warned += [f"{record.message} ({record.filename}, line {record.lineno})" for record in records
               if not issubclass(record.category,
                                 DeprecationWarning | PendingDeprecationWarning | ResourceWarning)]


def memory(name: str) -> int:
    """Bytes of this process: VmRSS (resident), VmHWM (peak resident) or VmData. 0 without Linux."""
    with contextlib.suppress(OSError):
        match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(match[1]) * 1024 if match else 0
    return 0
