"""What a command leaves when it is killed, at every operation on files that it makes.

    def action(): main(["--source", "a.txt", "--out", "out", "--force"])
    def check(at): ...  # what `out` holds now is the older version, the newer one, or refused; and so on
    kill_at_every_file_operation(action, check, prepare=older_version, below=tmp_path)

The process gets SIGKILL before its first operation, then before its second, and so on until it ends by
itself. Operations are: opening a file to write, each write that reaches the system (killed before it and in
its middle), truncating, fsync, renaming, linking, removing, making directories, changing modes and times.
Those of modules like `shutil` and `pathlib` count as the calls that they make. Nothing is seen of what C++
libraries write by themselves (Orbax's arrays), of memory maps, or of processes that the action starts.
"""

from __future__ import annotations

import atexit
import builtins
import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Tell a process of its own which point is its last, what counts, and where to write how many it came to.
AT, BELOW, COUNT = "KILL_POINTS_AT", "KILL_POINTS_BELOW", "KILL_POINTS_COUNT"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events of Python's audit: where their arguments have paths, each with where it has its directory's handle.
EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),)}
# Functions that raise no such event, whose first argument is the handle of what they write to.
SILENT = ("fsync", "fdatasync", "write", "pwrite", "writev", "sendfile", "posix_fallocate")


def kill_at_every_file_operation(action: Callable[[], object], check: Callable[[int], object], *,
                                 prepare: Callable[[], object] = lambda: None, below: Path | None = None,
                                 step: int = 1, patience: float = 60) -> int:
    """Runs an action in a fork of this process, again and again, each time killed one operation later.

    Args:
        action: must not use JAX, whose threads a fork does not have; see
            `kill_command_at_every_file_operation`.
        check: called after each kill with the number of the operation that was not carried out.
        prepare: called before each run.
        below: operations elsewhere do not count; None counts all but those on devices and pipes.
        step: kill at every so-many-th operation only.
        patience: seconds that a run may take.

    Returns:
        How often it was killed.

    Raises:
        AssertionError: the action raises something, or takes longer.
    """
    def run(at: int) -> tuple[int, str]:
        reader, writer = os.pipe()
        with warnings.catch_warnings():  # of Python and JAX: this process has threads
            warnings.simplefilter("ignore")
            child = os.fork()
        if not child:
            _carry_out(action, at, below, writer)
        os.close(writer)
        with open(reader, encoding="utf-8") as report:
            return _wait(child, patience), report.read()

    return _enumerate(run, check, prepare, step)


def kill_command_at_every_file_operation(arguments: Sequence[str], check: Callable[[int], object], *,
                                         prepare: Callable[[], object] = lambda: None,
                                         below: Path | None = None, step: int = 1, kills: int | None = None,
                                         environment: Mapping[str, str] | None = None) -> int:
    """As `kill_at_every_file_operation`, for `python ARGUMENTS` in a process of its own, with or without JAX.

    Args:
        arguments: `["-m", MODULE, …]` or `["-c", CODE, …]`.
        kills: about so many, spread over the whole of what a run without any does; in place of `step`.
        environment: of the process; this one's by default.
    """
    def run(at: int) -> tuple[int, str]:
        status, report, _ = run_and_kill(arguments, at, below, environment)
        return status, report

    if kills is not None:
        prepare()
        step = max(1, run_and_kill(arguments, 0, below, environment)[2] // kills)
    return _enumerate(run, check, prepare, step)


def run_and_kill(arguments: Sequence[str], at: int, below: Path | None = None,
                 environment: Mapping[str, str] | None = None, patience: float = 300) -> tuple[int, str, int]:
    """Runs `python ARGUMENTS`, which is killed at its operation number `at`; 0 lets it go on to its end.

    Returns:
        Exit status, what it wrote to stderr, and how many operations there were if it came to its end.
    """
    given = os.environ if environment is None else environment
    path = os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as beside:
        count = Path(beside, "count")
        known = {**given, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", AT: str(at),
                 BELOW: str(below or ""), COUNT: str(count)}
        done = subprocess.run(
            [sys.executable, "-c", "from tests import kill_points; kill_points.main()", *arguments],
            env=known, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=patience)
        return done.returncode, done.stderr, int(count.read_text()) if count.exists() else 0


def install(at: int, below: Path | None = None) -> _Points:
    """From now on this process is killed when it comes to its operation number `at`. There is no way back."""
    points = _Points(at, None if below is None else os.path.realpath(below))
    sys.addaudithook(points.heard)
    for name in SILENT:
        if hasattr(os, name):
            setattr(os, name, points.announced(name))
    opened = points.opened(io.open)
    io.open = builtins.open = opened  # type: ignore[assignment]
    return points


def main() -> None:
    """Runs `-m MODULE …` or `-c CODE …` under `install`, as the environment says."""
    points = install(int(os.environ[AT]), Path(os.environ[BELOW]) if os.environ[BELOW] else None)
    atexit.register(lambda: Path(os.environ[COUNT]).write_text(str(points.count)))
    how, what, *rest = sys.argv[1:]
    sys.argv = [what if how == "-m" else how, *rest]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


# ---------------------------------------------------------------------------------------------


def _enumerate(run: Callable[[int], tuple[int, str]], check: Callable[[int], object],
               prepare: Callable[[], object], step: int) -> int:
    kills = 0
    while True:
        at = 1 + kills * step
        prepare()
        status, report = run(at)
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, f"before operation {at} it ended with {status}: {report}"
        check(at)
        kills += 1


def _carry_out(action: Callable[[], object], at: int, below: Path | None, writer: int) -> None:
    """The forked process, which never returns to what its parent was doing."""
    try:
        install(at, below)
        action()
        os._exit(0)
    except BaseException:
        with open(writer, "w", encoding="utf-8") as report:
            report.write(traceback.format_exc()[-10_000:])
    finally:
        os._exit(1)


def _wait(child: int, patience: float) -> int:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"it takes longer than {patience} s")


class _Points:
    """Counts operations. `below` is a real path; None counts everything but devices and pipes."""

    def __init__(self, at: int, below: str | None) -> None:
        self.at, self.below, self.count = at, below, 0

    def passed(self, *places: tuple[Any, Any], last_act: Callable[[], object] = lambda: None) -> None:
        """An operation on these files, each a path or handle and the handle of its directory."""
        if any(self._counts(_path(*place)) for place in places):
            self.count += 1
            if self.count == self.at:
                last_act()
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the system may take a moment, in which this thread must not go on

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        """A hook of Python's audit."""
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self.passed((arguments[0], -1))
        elif event in EVENTS:
            self.passed(*((arguments[path], -1 if handle is None else arguments[handle])
                          for path, handle in EVENTS[event]))

    def announced(self, name: str) -> Callable[..., Any]:
        """A function of `os` that counts."""
        original = getattr(os, name)

        def function(handle: int, *arguments: Any) -> Any:
            self.passed((handle, -1))
            if name == "write":
                half = memoryview(arguments[0]).cast("B")[:len(arguments[0]) // 2]
                self.passed((handle, -1), last_act=lambda: original(handle, half))
            return original(handle, *arguments)
        return function

    def opened(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`open`, which gives files that count where they are written to."""
        points = self

        class Raw(io.FileIO):
            def write(self, data: Any, /) -> int:
                place = self.fileno(), -1
                half = memoryview(data).cast("B")[:memoryview(data).nbytes // 2]
                points.passed(place)
                points.passed(place, last_act=lambda: io.FileIO.write(self, half))
                return super().write(data)

            def truncate(self, size: int | None = None, /) -> int:
                points.passed((self.fileno(), -1))
                return super().truncate(size)

        def function(file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
                     errors: str | None = None, newline: str | None = None, closefd: bool = True,
                     opener: Any = None) -> Any:
            if not set(mode) & set("wax+"):
                return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            if buffering == 0:
                return raw
            size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, size)
            if "b" in mode:
                return buffered
            text = io.TextIOWrapper(buffered, io.text_encoding(encoding), errors, newline,
                                    line_buffering=buffering == 1)
            text.mode = mode  # type: ignore[misc]
            return text
        return function

    def _counts(self, path: str) -> bool:
        if self.below is None:
            return path.startswith(os.sep) and not path.startswith(("/dev/", "/proc/"))
        return path == self.below or path.startswith(self.below + os.sep)


def _path(path: Any, directory: Any) -> str:
    """The whole path of what an operation names, symbolic links in its last part left alone."""
    try:
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if isinstance(directory, int) and directory >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
    except OSError:  # a system without /proc
        return os.sep
    head, tail = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(head), tail)
