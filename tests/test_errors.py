"""Commands say what is wrong in one line, and what is worth a note in another."""

from __future__ import annotations

import logging
import subprocess
import sys

from tilelli_jax.errors import command

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
