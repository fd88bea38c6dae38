"""Runs a command on a spoilt copy of its input, and says what is wrong with how it ended."""

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

from tests.fuzz.mutators import LARGE, OF_KIND, Mutator, Rng, kind_of

SEED = int(os.environ.get("FUZZ_SEED", "0"))  # another one spoils otherwise: to look for more
SECONDS = 60  # of one input
BYTES = 4 << 30  # resident, of the process
MOST_CHARACTERS = 2000  # of a message
DIVERGED = 3
NOTES = ("note: ",)


@dataclasses.dataclass(frozen=True)
class Target:
    """A command and the files that it reads.

    Attributes:
        make: fills the current directory with an input that the command takes.
        main, argv: the command, in that directory; arguments with spaces between.
        spoilt: patterns of paths in it that are mutated, with spaces between.
        inputs: how many.
        writes: patterns of what may have changed although the input was refused: stages that are whole.
        tells: whether stderr has lines of progress as well.
        statuses: those that are right.
        large: whether files are made enormous: of a text that may be of any size, to read it takes as long.
        refused: what is said of an input that is not spoilt, where that is refused for something else; such
            commands read all files first.
    """

    name: str
    make: Callable[[], None]
    main: Callable[[list[str]], int]
    argv: str
    spoilt: str
    inputs: int
    writes: str = ""
    tells: bool = False
    statuses: Sequence[int] = (0, 2)
    large: bool = True
    refused: str = ""

    def plan(self, base: Path) -> list[tuple[Path, Mutator]]:
        """Which file is spoilt, and how, for each number: every file in turn, every way before one again."""
        files = sorted({path.relative_to(base) for pattern in self.spoilt.split()
                        for path in base.glob(pattern)})
        assert files, f"{self.name}: there is none of {self.spoilt}"
        left: dict[Path, list[Mutator]] = {}
        rng, found = generator(self.name), []
        while len(found) < self.inputs:
            file = files[len(found) % len(files)]
            if not left.get(file):
                every = OF_KIND[kind_of(base / file)]
                ways = [way for way in every if self.large or way not in LARGE]
                left[file] = [ways[i] for i in rng.permutation(len(ways))]
            found.append((file, left[file].pop()))
        return found


@dataclasses.dataclass
class Outcome:
    """How a command ended: its status or what it raised, what it printed, what it cost and what it wrote."""

    status: int | None
    raised: str
    out: str
    err: str
    warned: list[str]
    seconds: float
    peak: int
    changed: list[str]


class TooLong(BaseException):
    """SECONDS are over. No `except Exception` catches it."""


def generator(name: str, number: int = -1) -> Rng:
    return np.random.default_rng([SEED, zlib.crc32(name.encode()), number + 1])


def spoil(target: Target, base: Path, place: Path, number: int) -> str:
    """A copy of the base with one file spoilt; what was done, in words."""
    shutil.copytree(base, place, symlinks=True)
    file, mutate = target.plan(base)[number]
    return f"{file}: {mutate.__name__}: {mutate(place / file, generator(target.name, number))}"


def carry_out(target: Target, place: Path) -> Outcome:
    """Runs a command in a directory, within its limits."""
    before, out, err = _listing(place), io.StringIO(), io.StringIO()
    status, raised, warned = None, "", list[str]()
    with contextlib.suppress(OSError):  # so that what earlier tests took does not count; only Linux can
        Path("/proc/self/clear_refs").write_text("5")
    start = time.monotonic()
    with contextlib.chdir(place), _no_stdin(), _collected(warned), contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        try:
            with _limited():
                status = target.main(target.argv.split())
        except (Exception, TooLong, SystemExit):
            raised = traceback.format_exc()
    seconds = time.monotonic() - start
    return Outcome(status, raised, out.getvalue(), err.getvalue(), warned, seconds, memory("VmHWM"),
                   _changed(before, _listing(place)))


def complaints(target: Target, found: Outcome) -> list[str]:
    """What is wrong with it; nothing where it ended as it should."""
    said = []
    if found.raised:
        said.append(f"raised {found.raised}")
    elif found.status not in target.statuses:
        said.append(f"ended with status {found.status}")
    if "Traceback" in found.out + found.err:
        said.append("printed a traceback")
    if found.seconds > SECONDS:
        said.append(f"took {found.seconds:.0f} s")
    if found.peak > BYTES:
        said.append(f"took {found.peak / 2**30:.1f} GiB")
    if found.warned:
        said.append(f"warned {found.warned[0]}")
    lines = [line for line in found.err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if found.status == 2:
        if len(errors) != 1 or lines[-1] != errors[0]:
            said.append("did not end with one line that begins with error:")
        if not target.tells and any(not line.startswith(NOTES) for line in lines[:-1]):
            said.append("printed other lines on stderr")
        if len(found.err) > MOST_CHARACTERS and not target.tells:
            said.append(f"printed {len(found.err)} characters")
        if more := [name for name in found.changed if not any(
                fnmatch.fnmatch(name, pattern) for pattern in target.writes.split())]:
            said.append(f"left {', '.join(more[:5])}")
    return said


# ---------------------------------------------------------------------------------------------


def _listing(place: Path) -> dict[str, tuple[int, int, int]]:
    """What is there, and whether it changes; nothing is opened."""
    found = {}
    for root, directories, files in os.walk(place):
        for name in (*directories, *files):
            path = Path(root, name)
            about = path.lstat()
            is_directory = path.is_dir() and not path.is_symlink()
            found[path.relative_to(place).as_posix()] = (
                about.st_mode, *((0, 0) if is_directory else (about.st_size, about.st_mtime_ns)))
    return found


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """The time and the memory that one input may take.

    Where Python cannot raise anything, the process ends 30 seconds later. pytest-timeout uses the same timer,
    and gets it back. What is asked for and never used counts as memory, files that are mapped do not.
    """
    def end(number: int, frame: Any) -> None:
        raise TooLong
    handler = signal.signal(signal.SIGALRM, end)
    others = signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(SECONDS + 30, exit=True, file=sys.__stderr__)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if used := memory("VmData"):
        resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, *others)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def _no_stdin() -> Iterator[None]:
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = before


@contextlib.contextmanager
def _collected(warned: list[str]) -> Iterator[None]:
    """Python's warnings, which a terminal would show."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        yield
    warned += [f"{one.message} ({one.filename}, line {one.lineno})" for one in found if not issubclass(
        one.category, DeprecationWarning | PendingDeprecationWarning | ResourceWarning)]


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, what is resident; VmHWM, the most that was; VmData. 0 without Linux."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0
