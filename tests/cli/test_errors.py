"""Commands print errors and warnings in one line each."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tilelli_jax.cli.command import MAX_LENGTH, command
from tilelli_jax.errors import InputError

NOTES = """
import logging
import orbax.checkpoint  # which adds a handler to the root logger
from tilelli_jax.cli.command import command
@command
def main(argv):
    logging.getLogger("some.module").warning("text.txt: not UTF-8 at byte 3")
main([])
"""


def test_warnings_are_one_line_for_any_imports(environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", NOTES], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "WARNING: text.txt: not UTF-8 at byte 3\n")


def test_an_error_with_a_long_key_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str]) -> None:
        raise InputError(f"a.yaml: unknown key '{'x' * 100_000}'\n (did you\tmean 'y'?)")
    assert main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: a.yaml: unknown key 'xxx") and err.endswith("xxx' (did you mean 'y'?)\n")
    assert " … " in err and err.count("\n") == 1 and len(err) < MAX_LENGTH + 20


def test_a_file_name_that_is_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str]) -> None:
        Path(argv[0]).stat()
    assert main(["x" * 5000]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: xxx") and err.endswith("xxx: File name too long\n") and err.count("\n") == 1


def test_a_custom_handler_is_not_changed() -> None:
    class CustomHandler(logging.StreamHandler):  # type: ignore[type-arg]
        pass
    handler = CustomHandler()
    logging.getLogger().addHandler(handler)
    try:
        command(lambda argv: 0)([])
        assert handler.formatter is None
    finally:
        logging.getLogger().removeHandler(handler)
