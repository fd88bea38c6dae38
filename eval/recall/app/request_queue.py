"""One network shared by concurrent requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..predictor import KnowledgePredictor, Prediction
from . import thought_seeding


class RequestQueue:
    """Runs requests to one network one at a time, in order of arrival.

    Long requests are split into pieces; requests that arrive meanwhile run between two pieces.
    """

    def __init__(self, predictor: KnowledgePredictor, max_new_tokens: int = thought_seeding.MAX_NEW) -> None:
        self.predictor, self.max_new_tokens = predictor, max_new_tokens
        self._worker = ThreadPoolExecutor(1, "network")  # unlike a lock, it serves in order of arrival

    def predict(self, questions: Sequence[str],
                done: Callable[[int], None] = lambda n: None) -> list[Prediction]:
        """Runs `KnowledgePredictor.predict` in batches.

        Args:
            done: called with the number of questions done after each batch.
        """
        predictions: list[Prediction] = []
        size = self.predictor.reader.batch_size
        for start in range(0, len(questions), size):
            batch = questions[start:start + size]
            predictions += self._worker.submit(self.predictor.predict, batch).result()
            done(len(predictions))
        return predictions

    def answer_seeded(self, question: str, thought: str = "") -> Iterator[thought_seeding.SeededAnswer]:
        """Runs `thought_seeding.answer_seeded` piece by piece."""
        submit = self._worker.submit
        states = submit(thought_seeding.answer_seeded, self.predictor, question, thought,
                        max_new=self.max_new_tokens).result()
        while (state := submit(next, states, None).result()) is not None:
            yield state
