"""Handles SIGINT (Ctrl-C) and SIGTERM: how commands are asked to stop, and how they end.

The first signal raises KeyboardInterrupt in the main thread, or SystemExit(143) for SIGTERM. Within
`deferred` it raises nothing, and the work itself checks `received`. Python drops exceptions raised in a
garbage-collection callback or a finaliser, and some libraries catch them. They are then raised again, at the
latest by `raise_if_received`, which loops and stages call. A second signal ends the process within GRACE
seconds, also while Python cannot run a handler because XLA is compiling.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tilelli_jax.cli import allocator

GRACE = 1.0  # seconds from a second signal to the end of the process
PATIENCE = 1.0  # seconds until a message explains why the process has not ended yet
RETRY = 0.01  # seconds until a dropped exception is raised again
REPEATED = 1.0  # seconds in which SIGTERMs are one request: schedulers signal a process and its group
HANDLER_DELAY = 0.05  # seconds within which Python runs a handler, if it can run one at all
STOPPING = "stopping after the current computation"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
RAISED = (KeyboardInterrupt, SystemExit)  # exceptions for SIGINT and SIGTERM


@contextlib.contextmanager
def handled(numbers: Sequence[int] = SIGNALS) -> Iterator[bool]:
    """In this context this module handles the signals. Outside the main thread it does nothing.

    Yields whether this context installed the handlers; false inside another such context.

    An ignored signal stays ignored, as in processes that a shell starts in the background.
    """
    global _handlers
    if (_handlers and not _handlers.starting) or threading.current_thread() is not threading.main_thread():
        yield False
        return
    handlers = _handlers = _handlers or _Handlers(numbers)
    handlers.starting = False
    try:
        yield True
    finally:
        handlers.starting = handlers.from_start
        handlers.forget(ending=handlers.from_start)
        if not handlers.from_start:
            _handlers = None
            handlers.close()


def handle_from_start(package: str) -> None:
    """Installs the handlers while a package is imported, if this process runs one of its commands.

    That is the case for `python -m PACKAGE…` and the script `tilelli`. Until `handled` is entered, a signal
    ends the process immediately, as no work has begun.
    """
    global _handlers
    # `-m MODULE` or `-mMODULE`
    module = " ".join(sys.orig_argv).partition(" -m")[2].split()[:1]
    is_module = sys.argv[:1] == ["-m"] and bool(module) and module[0].partition(".")[0] == package
    is_script = package == "tilelli_jax" and bool(sys.argv) and Path(sys.argv[0]).stem == "tilelli"
    if (is_module or is_script) and _handlers is None:
        _handlers = _Handlers(from_start=True)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """In this context, used while modules are imported, a signal ends the process immediately."""
    handlers = _handlers
    if handlers is None or not handlers.from_start:
        yield
        return
    before, handlers.starting = handlers.starting, True
    try:
        yield
    finally:
        handlers.starting = before


@contextlib.contextmanager
def deferred(message: str | Callable[[], str] = "", call: Callable[[int], object] = lambda number: None,
             numbers: Sequence[int] = SIGNALS) -> Iterator[None]:
    """In this context the first signal raises nothing: the work checks `received` and ends by itself.

    Args:
        message: printed when the user presses Ctrl-C, or a function that returns it; empty: nothing.
        call: called with the signal's number.
        numbers: signals for `handled`, if it is not active yet.
    """
    with handled(numbers):
        if _handlers is None:  # not in the main thread
            yield
            return

        def note(number: int) -> None:
            if number == signal.SIGINT:
                handlers.announce()
            call(number)

        handlers = _handlers
        before = handlers.note, handlers.message
        handlers.note, handlers.message = note, message if callable(message) else lambda: message
        try:
            yield
        finally:
            handlers.note, handlers.message = before


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """In this context, which must be short, signals are delayed; a received one is handled at its end."""
    handlers = _handlers
    if handlers is None or handlers.holding or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers.holding = True
    try:
        yield
    finally:
        handlers.holding = False
        number, handlers.held = handlers.held, None
        if number is not None:
            handlers.handle(number, None)


def received() -> int | None:
    """Returns the signal that asked the running command to stop, or None."""
    return _handlers.received if _handlers else None


def raise_if_received() -> None:
    """Raises a received signal's exception. Loops and stages call it between two pieces of work."""
    if _handlers and _handlers.received is not None:
        _handlers.raised = _handlers.received
        _raise(_handlers.received)


def forget_interrupt() -> None:
    """Forgets a Ctrl-C that asked for less than ending the command, such as stopping an answer."""
    if _handlers and _handlers.received == signal.SIGINT:
        _handlers.forget()


def raise_if_dropped() -> None:
    """Raises a signal's exception again if other code caught it and the work continued."""
    if _handlers and _handlers.raised is not None:
        _raise(_handlers.raised)


def mark_reported() -> None:
    """Notes that a command ends by the signal: its exception has arrived, and is not raised again."""
    if _handlers:
        _handlers.raised = None


def is_cause_of(error: BaseException | None) -> bool:
    """Whether a library turned a signal's exception into this error: it is the cause or named in the text."""
    if _handlers is None or _handlers.raised is None or error is None:
        return False
    return (isinstance(error, RAISED) or any(kind.__name__ in str(error) for kind in RAISED)
            or is_cause_of(error.__cause__ or error.__context__))


def ends_process() -> bool:
    """Whether a signal has ended the command that this process runs.

    Other threads may still be working: JAX's continue to compile, and can crash during a normal exit.
    """
    return _handlers is not None and _handlers.from_start and _handlers.received is not None


# ---------------------------------------------------------------------------------------------


class _Handlers:
    """The signal handlers, and a thread that notices signals while the main thread cannot run handlers."""

    def __init__(self, numbers: Sequence[int] = SIGNALS, from_start: bool = False) -> None:
        self.from_start = from_start
        self.starting = True  # no work has begun, or it is over
        self.holding = False
        self.held: int | None = None  # a signal received while holding
        self.note: Callable[[int], object] | None = None
        self.message: Callable[[], str] = lambda: ""
        self.timers: list[threading.Timer] = []
        self.forget()
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self.ends = reader, writer
        self.before: dict[int, Any] = {number: signal.signal(number, self.handle) for number in numbers
                                       if signal.getsignal(number) is not signal.SIG_IGN}
        # Python's C-level handler, which always runs, writes the signal's number to this socket.
        self.woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self.unraisable = sys.unraisablehook
        sys.unraisablehook = self.dropped
        allocator.share_one_arena()  # before the first thread
        self.thread = threading.Thread(target=self.watch, args=(reader,), name="signals", daemon=True)
        self.thread.start()

    def close(self) -> None:
        sys.unraisablehook = self.unraisable
        signal.set_wakeup_fd(self.woken)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.ends[1].close()  # ends the thread
        self.thread.join()
        self.ends[0].close()

    def forget(self, *, ending: bool = False) -> None:
        """Resets the received signals. If the process is ending, its final timer continues."""
        self.received: int | None = None
        self.first = 0.0  # time of the first signal
        self.raised: int | None = None
        self.announced = False  # whether a message has said how the command stops
        self.calls = 0  # number of handler calls
        self.waiting = 0  # signals without a handler call yet
        if not ending:
            for timer in self.timers:
                timer.cancel()
            self.timers = []

    def handle(self, number: int, frame: types.FrameType | None) -> None:
        """The handler; Python runs it in the main thread, between two bytecode instructions."""
        with contextlib.suppress(BlockingIOError):
            self.ends[0].recv(64)  # the watching thread need not handle it
        if self.holding:
            self.held = self.held or number
            return
        if self.calls and self.is_repeated(number):  # a late first call is not a repetition
            return
        self.waiting, self.calls = 0, self.calls + 1
        self.received, self.first = self.received or number, self.first or time.monotonic()
        if self.starting:
            _end(number)
        if self.calls > 1:
            self.later(GRACE, _end, number)
        elif self.note:
            self.note(number)
            return
        self.raised = number
        _raise(number)

    def dropped(self, error: Any) -> None:
        """Replaces sys.unraisablehook: raises a dropped exception of a signal again."""
        if self.raised is None or not issubclass(error.exc_type, RAISED):
            self.unraisable(error)
            return
        self.calls, self.first = self.calls - 1, 0.0
        self.later(RETRY, os.kill, os.getpid(), self.raised)

    def watch(self, reader: socket.socket) -> None:
        while True:
            select.select([reader], [], [])
            try:
                if not reader.recv(1, socket.MSG_PEEK):
                    return
                time.sleep(HANDLER_DELAY)
                calls = self.calls  # first: a handler that runs after this line counts them itself
                numbers = reader.recv(64)
            except BlockingIOError:
                continue
            for number in numbers:
                if number in SIGNALS and not self.is_repeated(number):
                    self.first = self.first or time.monotonic()
                    self.waiting += 1
                    if calls + self.waiting > 1:
                        self.later(GRACE, _end, number)
                    else:
                        self.later(PATIENCE, self.explain, number)

    def is_repeated(self, number: int) -> bool:
        return bool(number == signal.SIGTERM and self.first and time.monotonic() - self.first < REPEATED)

    def explain(self, number: int) -> None:
        if self.waiting and number == signal.SIGINT:
            self.announce(STOPPING)

    def announce(self, otherwise: str = "") -> None:
        """Prints once how the command stops, or `otherwise` where the work does not say it."""
        message = self.message() or otherwise
        if message and not self.announced:
            self.announced = True
            _write_stderr(f"\n{message}; press Ctrl-C again to stop immediately\n")

    def later(self, seconds: float, call: Callable[..., object], *arguments: Any) -> None:
        timer = threading.Timer(seconds, call, arguments)
        timer.daemon = True
        self.timers.append(timer)
        timer.start()


_handlers: _Handlers | None = None


def _raise(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _end(number: int) -> NoReturn:
    if number == signal.SIGINT:
        _write_stderr("interrupted\n")
    os._exit(128 + number)


def _write_stderr(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, line.encode())  # print may be in use
