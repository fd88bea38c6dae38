"""Errors that are the user's to mend, and how a command reports them."""

from __future__ import annotations

import argparse
import errno
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

AGAIN = 0.01  # seconds until an interrupt that was lost is raised once more


class InputError(ValueError):
    """Bad input: names the file, key or value, and what was expected, in one line."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose complaints are one line as all others here; `--help` tells the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def command(main: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """Wraps a command's `main(argv) -> exit status`: bad input is one line and exit 2.

    Any other exception keeps its traceback: it is our fault, not the user's.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        _settle_streams()
        before = sys.unraisablehook
        sys.unraisablehook = functools.partial(_lost, before)
        try:
            status = main(sys.argv[1:] if argv is None else argv) or 0
            sys.stdout.flush()
            return status
        except InputError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader (head, less) has gone: nothing is wrong
            _drop_output()
            return 141
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
            _drop_output()
            return 2
        finally:
            sys.unraisablehook = before

    return run


def _lost(before: Callable[[Any], object], what: Any) -> None:
    """Ctrl-C that came where Python can raise nothing is raised once more, a moment later.

    In a callback of garbage collection, for instance, or in a finaliser. The work would go on to its end.
    """
    if issubclass(what.exc_type, KeyboardInterrupt):
        threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        before(what)


def _drop_output() -> None:
    """What is still buffered goes nowhere, lest the flush at exit fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _settle_streams() -> None:
    """Output that is closed goes nowhere; a character that its encoding lacks becomes '?'."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if getattr(sys.stdout, "errors", "") == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
