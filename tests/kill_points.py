"""Kills a command at every file operation and checks what it leaves behind.

    def action(): main(["--source", "a.txt", "--out", "out", "--force"])
    def check(at): ...  # for example: `out` holds the older version or the newer one, or is rejected
    kill_at_every_file_operation(action, check, prepare=older_version, below=tmp_path)

The process gets SIGKILL before its first file operation, in the next run before its second, and so on until
it completes. Operations are: opening a file to write, each write system call (killed before it and in its
middle), truncating, fsync, renaming, linking, removing, making directories, changing modes and times.
Functions of `shutil` and `pathlib` count as the system calls that they make. Writes by C++ libraries (Orbax's
arrays), memory maps, and child processes of the action are not detected.
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
# Environment variables of a separate process: the operation to be killed at, the directory in which
# operations count, and the file for the number of operations.
AT, BELOW, COUNT = "KILL_POINTS_AT", "KILL_POINTS_BELOW", "KILL_POINTS_COUNT"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python's audit events → (index of the path, index of its directory's handle) among the arguments.
EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.rename": ((0, 2), (1, 3)), "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),),
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),)}
# Functions of `os` without an audit event; the first argument is the handle of the file.
UNAUDITED = ("fsync", "fdatasync", "write", "pwrite", "writev", "sendfile", "posix_fallocate")


def kill_at_every_file_operation(action: Callable[[], object], check: Callable[[int], object], *,
                                 prepare: Callable[[], object] = lambda: None, below: Path | None = None,
                                 step: int = 1, patience: float = 60) -> int:
    """Runs an action repeatedly in forks of this process and kills each run one operation later.

    Args:
        action: must not use JAX, whose threads do not exist in a fork; for JAX use
            `kill_command_at_every_file_operation`.
        check: called after each kill with the number of the operation that was prevented.
        prepare: called before each run.
        below: count only operations below this path; None counts all except those on devices and pipes.
        step: kill only at every `step`-th operation.
        patience: maximum seconds per run.

    Returns:
        The number of kills.

    Raises:
        AssertionError: the action raises an exception, or takes longer than `patience`.
    """
    def run(at: int) -> tuple[int, str]:
        reader, writer = os.pipe()
        with warnings.catch_warnings():  # Python and JAX warn of a fork with threads
            warnings.simplefilter("ignore")
            child = os.fork()
        if not child:
            _run_child(action, at, below, writer)
        os.close(writer)
        with open(reader, encoding="utf-8") as report:
            return _wait(child, patience), report.read()

    return _enumerate(run, check, prepare, step)


def kill_command_at_every_file_operation(arguments: Sequence[str], check: Callable[[int], object], *,
                                         prepare: Callable[[], object] = lambda: None,
                                         below: Path | None = None, step: int = 1, kills: int | None = None,
                                         environment: Mapping[str, str] | None = None) -> int:
    """Like `kill_at_every_file_operation`, for `python ARGUMENTS` in a new process, with or without JAX.

    Args:
        arguments: `["-m", MODULE, …]` or `["-c", CODE, …]`.
        kills: approximate number of kills, spread evenly over all operations; replaces `step`.
        environment: of the process; by default that of this process.
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
    """Runs `python ARGUMENTS` and kills it at its operation number `at`; with 0 it completes.

    Returns:
        Exit status, stderr, and the number of operations (0 if it was killed).
    """
    base_environment = os.environ if environment is None else environment
    path = os.pathsep.join(filter(None, [str(ROOT), base_environment.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as directory:
        count = Path(directory, "count")
        variables = {**base_environment, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", AT: str(at),
                     BELOW: str(below or ""), COUNT: str(count)}
        process = subprocess.run(
            [sys.executable, "-c", "from tests import kill_points; kill_points.main()", *arguments],
            env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=patience)
        return process.returncode, process.stderr, int(count.read_text()) if count.exists() else 0


def install(at: int, below: Path | None = None) -> _Points:
    """From now on, counts file operations and kills this process at number `at`. Cannot be undone."""
    points = _Points(at, None if below is None else os.path.realpath(below))
    sys.addaudithook(points.on_audit_event)
    for name in UNAUDITED:
        if hasattr(os, name):
            setattr(os, name, points.counted_function(name))
    counted_open = points.counted_open(io.open)
    io.open = builtins.open = counted_open  # type: ignore[assignment]
    return points


def main() -> None:
    """Runs `-m MODULE …` or `-c CODE …` with the kill point that the environment variables set."""
    points = install(int(os.environ[AT]), Path(os.environ[BELOW]) if os.environ[BELOW] else None)
    atexit.register(lambda: Path(os.environ[COUNT]).write_text(str(points.count)))
    option, target, *arguments = sys.argv[1:]
    sys.argv = [target if option == "-m" else option, *arguments]
    if option == "-m":
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        exec(compile(target, "<string>", "exec"), {"__name__": "__main__"})


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


def _run_child(action: Callable[[], object], at: int, below: Path | None, writer: int) -> None:
    """Runs the action in the forked process, which then exits without returning."""
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
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"a run takes longer than {patience} s")


class _Points:
    """Counts file operations below a real path, or all except those on devices and pipes if it is None."""

    def __init__(self, at: int, below: str | None) -> None:
        self.at, self.below, self.count = at, below, 0

    def count_operation(self, *paths: tuple[Any, Any],
                        before_kill: Callable[[], object] = lambda: None) -> None:
        """Counts an operation on files, each given as a path or handle and the handle of its directory."""
        if any(self._counts(_path(*file)) for file in paths):
            self.count += 1
            if self.count == self.at:
                before_kill()
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the signal may arrive late; this thread must not continue

    def on_audit_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """A hook for Python's audit events."""
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self.count_operation((arguments[0], -1))
        elif event in EVENTS:
            self.count_operation(*((arguments[path], -1 if handle is None else arguments[handle])
                                   for path, handle in EVENTS[event]))

    def counted_function(self, name: str) -> Callable[..., Any]:
        """The function of `os` with this name, which also counts the operation."""
        original = getattr(os, name)

        def function(handle: int, *arguments: Any) -> Any:
            self.count_operation((handle, -1))
            if name == "write":
                half = memoryview(arguments[0]).cast("B")[:len(arguments[0]) // 2]
                self.count_operation((handle, -1), before_kill=lambda: original(handle, half))
            return original(handle, *arguments)
        return function

    def counted_open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`open`, returning files that count their write operations."""
        points = self

        class Raw(io.FileIO):
            def write(self, data: Any, /) -> int:
                file = self.fileno(), -1
                half = memoryview(data).cast("B")[:memoryview(data).nbytes // 2]
                points.count_operation(file)
                points.count_operation(file, before_kill=lambda: io.FileIO.write(self, half))
                return super().write(data)

            def truncate(self, size: int | None = None, /) -> int:
                points.count_operation((self.fileno(), -1))
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
    """The absolute path of an operand; resolves symbolic links except in the last component."""
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
