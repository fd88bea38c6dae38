"""Waits for what another thread prints."""

from __future__ import annotations

import time
from collections.abc import Callable


class Printed:
    """Collects text from `read`, which returns what is new, e.g. `lambda: capsys.readouterr().out`."""

    def __init__(self, read: Callable[[], str]) -> None:
        self._read, self._text = read, ""

    def wait_for(self, line: str) -> None:
        """Waits up to ten seconds for a line, and forgets the text up to it."""
        deadline = time.monotonic() + 10
        while line not in self._text and time.monotonic() < deadline:
            time.sleep(0.005)
            self._text += self._read()
        assert line in self._text
        self._text = self._text.partition(line)[2]
