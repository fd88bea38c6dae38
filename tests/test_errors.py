"""Commands say what is wrong in one line, and what is worth a note in another."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tilelli_jax.errors import LONGEST, InputError, command

NOTES = """
import logging
import orbax.checkpoint  # which gives the root logger a handler of its own
from tilelli_jax.errors import command
@command
def main(argv):
    logging.getLogger("some.module").warning("text.txt: not UTF-8 at byte 3")
main([])
"""


def test_notes_are_one_line_whatever_is_imported(environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", NOTES], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "WARNING: text.txt: not UTF-8 at byte 3\n")


def test_an_error_is_a_line_however_long_a_key_is(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str]) -> None:
        raise InputError(f"a.yaml: unknown key '{'x' * 100_000}'\n (did you\tmean 'y'?)")
    assert main([]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: a.yaml: unknown key 'xxx") and err.endswith("xxx' (did you mean 'y'?)\n")
    assert " … " in err and err.count("\n") == 1 and len(err) < LONGEST + 20


def test_a_name_that_no_file_can_have(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: list[str]) -> None:
        Path(argv[0]).stat()
    assert main(["x" * 5000]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: xxx") and err.endswith("xxx: File name too long\n") and err.count("\n") == 1


def test_a_handler_of_the_callers_own_stays_as_it_is() -> None:
    class Mine(logging.StreamHandler):  # type: ignore[type-arg]
        pass
    mine = Mine()
    logging.getLogger().addHandler(mine)
    try:
        command(lambda argv: 0)([])
        assert mine.formatter is None
    finally:
        logging.getLogger().removeHandler(mine)
