"""One network and all who ask it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from . import thought_seeding
from .predictor import KnowledgePredictor, Prediction


class RequestQueue:
    """One network, which is asked one thing at a time: clicks that come together wait for each other.

    Long things are done in pieces, and whoever has come meanwhile is heard between two of them.
    """

    def __init__(self, predictor: KnowledgePredictor, max_new_tokens: int = thought_seeding.MAX_NEW) -> None:
        self.predictor, self.max_new_tokens = predictor, max_new_tokens
        self._one = ThreadPoolExecutor(1, "network")  # first come, first served: a lock would not be so

    def ask(self, questions: Sequence[str], done: Callable[[int], None] = lambda n: None) -> list[Prediction]:
        """As `Knower.ask`.

        Args:
            done: called with how many have been read.
        """
        found: list[Prediction] = []
        size = self.predictor.reader.batch_size
        for start in range(0, len(questions), size):
            found += self._one.submit(self.predictor.ask, questions[start:start + size]).result()
            done(len(found))
        return found

    def answer_seeded(self, question: str, thought: str = "") -> Iterator[thought_seeding.SeededAnswer]:
        """As `thoughts.speak`."""
        one = self._one.submit
        pieces = one(thought_seeding.answer_seeded, self.predictor, question, thought, most=self.max_new_tokens).result()
        while (spoken := one(next, pieces, None).result()) is not None:
            yield spoken
