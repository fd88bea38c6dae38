"""One network and all who ask it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from . import thoughts
from .knower import Knower, Told


class Desk:
    """One network, which is asked one thing at a time: clicks that come together wait for each other.

    Long things are done in pieces, and whoever has come meanwhile is heard between two of them.
    """

    def __init__(self, knower: Knower, most_new: int = thoughts.MOST_NEW) -> None:
        self.knower, self.most_new = knower, most_new
        self._one = ThreadPoolExecutor(1, "network")  # first come, first served: a lock would not be so

    def ask(self, questions: Sequence[str], done: Callable[[int], None] = lambda n: None) -> list[Told]:
        """As `Knower.ask`.

        Args:
            done: called with how many have been read.
        """
        found: list[Told] = []
        size = self.knower.reader.batch_size
        for start in range(0, len(questions), size):
            found += self._one.submit(self.knower.ask, questions[start:start + size]).result()
            done(len(found))
        return found

    def speak(self, question: str, thought: str = "") -> Iterator[thoughts.Spoken]:
        """As `thoughts.speak`."""
        one = self._one.submit
        pieces = one(thoughts.speak, self.knower, question, thought, most=self.most_new).result()
        while (spoken := one(next, pieces, None).result()) is not None:
            yield spoken
