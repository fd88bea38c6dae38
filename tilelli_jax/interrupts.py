"""SIGINT (Ctrl-C) and SIGTERM: how a command is asked to stop, and how it ends.

The first signal raises KeyboardInterrupt in the main thread, or for SIGTERM SystemExit(143); within `deferred`
it raises nothing, and the work itself looks at `received`. Python drops what is raised in a callback of
garbage collection or in a finaliser, and libraries catch some: it is then raised once more, at the latest by
`raise_if_received`, which loops and stages call. A second signal ends the process, at the latest after GRACE seconds,
also where Python cannot run a handler because XLA compiles.
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

GRACE = 1.0  # seconds between a second signal and the end of the process
PATIENCE = 1.0  # seconds after which somebody who waits for the end is told why
AGAIN = 0.01  # seconds until what Python dropped is raised once more
REPEATED = 1.0  # seconds in which SIGTERM is the same request: schedulers send it to a process and its group
TAKEN = 0.05  # seconds in which Python runs a handler, where it can run one at all
SIGNALS = (signal.SIGINT, signal.SIGTERM)
RAISED = (KeyboardInterrupt, SystemExit)  # of SIGINT, of SIGTERM


@contextlib.contextmanager
def handled(numbers: Sequence[int] = SIGNALS) -> Iterator[bool]:
    """Within it these signals are handled here. In another thread than the main one it does nothing.

    Yields whether they are from here on: not within another such block.

    A signal that is ignored, as of what a shell starts in the background, stays ignored.
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
    """To be called by a package as it is imported: its commands own the signals from then on.

    That is, where `python -m PACKAGE…` or the script `tilelli` is what runs. Until `handled`, a signal ends
    the process at once, as nothing has begun.
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
    """Within it nothing has begun yet, as while modules are imported: a signal ends the process at once."""
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
def deferred(says: str = "", call: Callable[[int], object] = lambda number: None,
          numbers: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Within it the first signal raises nothing: the work looks at `received`, and ends by itself.

    Args:
        says: what somebody who presses Ctrl-C is told.
        call: called with the signal's number.
        numbers: of `handled`, if that has not begun.
    """
    with handled(numbers):
        if _handlers is None:  # not in the main thread
            yield
            return

        def note(number: int) -> None:
            if says and number == signal.SIGINT:
                _tell(f"\n{says}; press Ctrl-C again to stop immediately\n")
            call(number)

        before, _handlers.note = _handlers.note, note
        try:
            yield
        finally:
            _handlers.note = before


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Within it, which must be short, no signal does anything; one that came does it at the end."""
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
    """The signal that has asked the running command to stop."""
    return _handlers.received if _handlers else None


def raise_if_received() -> None:
    """Raises what a signal asks for, if one has come. For loops and stages, between two pieces of work."""
    if _handlers and _handlers.received is not None:
        _handlers.raised = _handlers.received
        _raise(_handlers.received)


def forget_interrupt() -> None:
    """Ctrl-C asked for something less than the command's end, and that is done."""
    if _handlers and _handlers.received == signal.SIGINT:
        _handlers.forget()


def raise_if_dropped() -> None:
    """Raises what a signal has raised in vain: something caught it, and the work went on to its end."""
    if _handlers and _handlers.raised is not None:
        _raise(_handlers.raised)


def is_cause_of(error: BaseException | None) -> bool:
    """Whether an error is what a library has made of what a signal raised: its cause, or in its text."""
    if _handlers is None or _handlers.raised is None or error is None:
        return False
    return (isinstance(error, RAISED) or any(kind.__name__ in str(error) for kind in RAISED)
            or is_cause_of(error.__cause__ or error.__context__))


def ends_process() -> bool:
    """Whether a signal has ended the command that this process is there for.

    Its threads may then be anywhere: JAX's compile on, and have crashed on the interpreter's way out.
    """
    return _handlers is not None and _handlers.from_start and _handlers.received is not None


# ---------------------------------------------------------------------------------------------


class _Handlers:
    """Handlers, and a thread that sees signals while the main thread cannot run them."""

    def __init__(self, numbers: Sequence[int] = SIGNALS, from_start: bool = False) -> None:
        self.from_start = from_start
        self.starting = True  # nothing has begun yet, or all is over
        self.holding = False
        self.held: int | None = None  # the signal that came meanwhile
        self.note: Callable[[int], object] | None = None
        self.timers: list[threading.Timer] = []
        self.forget()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.ends = ours, theirs
        self.before: dict[int, Any] = {number: signal.signal(number, self.handle) for number in numbers
                                       if signal.getsignal(number) is not signal.SIG_IGN}
        # With it the system's own handler, which runs always, writes the signal's number there.
        self.woken = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self.unraisable = sys.unraisablehook
        sys.unraisablehook = self.dropped
        self.thread = threading.Thread(target=self.watch, args=(ours,), name="signals", daemon=True)
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
        """Nothing has been asked. Where the process is ending, the timer that ends it goes on."""
        self.received: int | None = None
        self.first = 0.0  # when that was
        self.raised: int | None = None
        self.calls = 0  # of the handler
        self.waiting = 0  # signals that no handler has been run for
        if not ending:
            for timer in self.timers:
                timer.cancel()
            self.timers = []

    def handle(self, number: int, frame: types.FrameType | None) -> None:
        """In the main thread, between two steps of Python."""
        with contextlib.suppress(BlockingIOError):
            self.ends[0].recv(64)  # the thread need not see to it
        if self.holding:
            self.held = self.held or number
            return
        if self.calls and self.is_repeated(number):  # the first is none, however late it is handled
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

    def dropped(self, what: Any) -> None:
        """In place of sys.unraisablehook."""
        if self.raised is None or not issubclass(what.exc_type, RAISED):
            self.unraisable(what)
            return
        self.calls, self.first = self.calls - 1, 0.0
        self.later(AGAIN, os.kill, os.getpid(), self.raised)

    def watch(self, ours: socket.socket) -> None:
        while True:
            select.select([ours], [], [])
            try:
                if not ours.recv(1, socket.MSG_PEEK):
                    return
                time.sleep(TAKEN)
                calls = self.calls  # first: a handler that runs after this line counts them itself
                numbers = ours.recv(64)
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
            _tell("\nstopping after the current computation; press Ctrl-C again to stop immediately\n")

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
        _tell("interrupted\n")
    os._exit(128 + number)


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, line.encode())  # print may be in use
