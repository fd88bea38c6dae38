"""Errors that are the user's to mend, and how a command reports them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tilelli_jax import interrupts

INTERRUPTED = 130  # exit status: 128 + SIGINT
LONGEST = 1500  # characters of an error


class InputError(ValueError):
    """Bad input: names the file, key or value, and what was expected, in one line."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose complaints are one line as all others here; `--help` tells the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """Wraps a command's `main(argv) -> exit status`: bad input, or an optional package
    that is not installed, is one line and exit 2.

    Any other exception keeps its traceback: it is our fault, not the user's.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        _settle_streams()
        _settle_logs()
        with interrupts.handled() as is_outermost:
            status = _status(main, sys.argv[1:] if argv is None else argv)
            if is_outermost and interrupts.ends_process() and not _is_one_of_several():
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(status)
            return status

    return run


def _status(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """The exit status of a command; what went wrong is said on stderr."""
    try:
        return _carried_out(main, argv)
    except InputError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        from tilelli_jax import extras
        if not extras.is_optional(error.name):
            raise
        print(f"error: {extras.missing(error.name or '', 'this command')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as error:
        if not interrupts.ends_process() or not isinstance(error.code, int):
            raise
        return error.code
    except BrokenPipeError:  # the reader (head, less) has gone: nothing is wrong
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENAMETOOLONG):
            raise
        print(f"error: {_one_line(str(error.filename or 'output'))}: {error.strerror}", file=sys.stderr)
        if error.errno == errno.ENOSPC:
            _drop_output()
        return 2


def _is_one_of_several() -> bool:
    """Processes that compute together leave together: JAX sees to that on the ordinary way out."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _one_line(text: str) -> str:
    """A text without line breaks; the middle of a long one, as of a key that a file has, is left out."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST // 2]} … {line[-LONGEST // 2:]}"


def _settle_logs() -> None:
    """Warnings are `WARNING: …` on stderr, also where a library that was imported has chosen otherwise."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    for handler in root.handlers:
        if type(handler) is logging.StreamHandler:  # none that is somebody's own
            handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))


def _carried_out(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """The exit status; or the interrupt that something has caught, or has made another error of."""
    try:
        status = main(argv) or 0
        sys.stdout.flush()
    except Exception as error:
        if interrupts.is_cause_of(error):
            interrupts.raise_if_dropped()
        raise
    interrupts.raise_if_dropped()
    return status


def _drop_output() -> None:
    """What is still buffered goes nowhere, lest the flush at exit fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _settle_streams() -> None:
    """Output that is closed goes nowhere; a character that its encoding lacks becomes '?'."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
