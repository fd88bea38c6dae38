"""How a command parses its arguments, reports errors and ends."""

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

from tilelli_jax.cli import interrupts
from tilelli_jax.errors import InputError

INTERRUPTED = 130  # exit status: 128 + SIGINT
MAX_LENGTH = 1500  # characters of an error message


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that reports errors as InputError, in one line without the usage.

    Attributes:
        example: arguments that an error about missing ones gives as an example.
    """

    example = ""

    def error(self, message: str) -> NoReturn:
        is_missing = message.startswith("the following arguments are required")
        raise InputError(message + (f", e.g. {self.example}" if is_missing and self.example else ""))


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """Wraps a command's `main(argv) -> exit status`: for bad input or a missing optional package it prints
    one line and exits with 2.

    Other exceptions keep their traceback: they are bugs of this package.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        _configure_streams()
        _configure_logs()
        with interrupts.handled() as is_outermost:
            status = _status(main, sys.argv[1:] if argv is None else argv)
            if is_outermost and interrupts.ends_process() and not _is_distributed():
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(status)
            return status

    return run


def _status(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Runs a command and returns its exit status; prints errors on stderr."""
    try:
        return _run_main(main, argv)
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
        interrupts.mark_reported()  # a command that runs this one prints it no second time
        return INTERRUPTED
    except SystemExit as error:
        if not interrupts.ends_process() or not isinstance(error.code, int):
            raise
        return error.code
    except BrokenPipeError:  # the reader (head, less) has closed the pipe: no error
        _discard_output()
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENAMETOOLONG):
            raise
        print(f"error: {_one_line(str(error.filename or 'output'))}: {error.strerror}", file=sys.stderr)
        if error.errno == errno.ENOSPC:
            _discard_output()
        return 2


def _is_distributed() -> bool:
    """Whether this process is in a distributed run: JAX then ends all processes together on normal exit."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _one_line(text: str) -> str:
    """Joins a text's lines, and drops the middle of a long text, such as a very long key."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH // 2]} … {line[-MAX_LENGTH // 2:]}"


def _configure_logs() -> None:
    """Formats log records as `WARNING: …` on stderr, also if an imported library has set another format."""
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler())
    for handler in root.handlers:
        if type(handler) is logging.StreamHandler:  # leave custom handlers alone
            handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))


def _run_main(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Runs `main`; raises the interrupt if other code has caught it or turned it into another error."""
    try:
        status = main(argv) or 0
        sys.stdout.flush()
    except Exception as error:
        if interrupts.is_cause_of(error):
            interrupts.raise_if_dropped()
        raise
    interrupts.raise_if_dropped()
    return status


def _discard_output() -> None:
    """Redirects stdout to the null device, so that the flush at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _configure_streams() -> None:
    """Replaces a closed stdout by the null device; prints '?' for characters that its encoding lacks."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
