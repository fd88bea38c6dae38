"""One network shared by concurrent requests."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.generation.decoding import ContinuedIds
from tilelli_jax.generation.engine import Engine, Finished, Full, Request, Token
from tilelli_jax.models.sampling import Sampling

from ..predictor import KnowledgePredictor, Prediction
from . import thought_seeding

SLOTS = 4  # answers that are generated at once
CHUNK = 8  # tokens between two updates of the page


class RequestQueue:
    """Runs the requests of several clients to one network: answers share a batch, predictions run between
    two of its steps, in order of arrival.

    It is a context manager: its thread runs inside.
    """

    def __init__(self, predictor: KnowledgePredictor, max_new_tokens: int = thought_seeding.MAX_NEW) -> None:
        self.predictor, self.max_new_tokens = predictor, max_new_tokens
        model = predictor.language.model
        self._engine = Engine(model, slots=SLOTS, max_len=model.config.max_seq_len)

    def __enter__(self) -> RequestQueue:
        self._engine.start(ahead=False)  # most pages need few of its programs
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine.stop(drain=False)

    def predict(self, questions: Sequence[str],
                done: Callable[[int], None] = lambda n: None) -> list[Prediction]:
        """Runs `KnowledgePredictor.predict` in batches; other requests run between two of them.

        Args:
            done: called with the number of questions done after each batch.

        Raises:
            InputError: a question is invalid, or the page is closing.
        """
        predictions: list[Prediction] = []
        size = self.predictor.reader.batch_size
        for start in range(0, len(questions), size):
            batch = questions[start:start + size]
            with _refusals():
                future = self._engine.call(functools.partial(self.predictor.predict, batch))
            predictions += future.result()
            done(len(predictions))
        return predictions

    def answer_seeded(self, question: str, thought: str = "") -> Iterator[thought_seeding.SeededAnswer]:
        """Runs `thought_seeding.answer_seeded`; closing the iterator ends the request.

        Raises:
            InputError: as there, or too many requests wait.
        """
        return thought_seeding.answer_seeded(self.predictor, question, thought, self._continued,
                                             max_new=self.max_new_tokens)

    def _continued(self, ids: Sequence[int], max_new: int, end_ids: Sequence[int]) -> Generator[ContinuedIds]:
        """The most likely continuation, in pieces of CHUNK tokens."""
        with _refusals():
            events = self._engine.stream(Request(ids, Sampling(max_new=max_new, temperature=0.0),
                                                 end_ids=end_ids))
        return _pieces(events)


def _pieces(events: Generator[Token | Finished]) -> Generator[ContinuedIds]:
    new: list[int] = []
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Finished):
                if event.reason in ("error", "cancelled"):
                    raise InputError(event.error or "the page is closing")
                yield ContinuedIds(np.array(new, np.int32), event.reason == "stop")
            else:
                new.append(event.id)
                if len(new) == CHUNK:
                    yield ContinuedIds(np.array(new, np.int32), False)
                    new = []


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Full:
        raise InputError("expected room in the queue, found it full: try again later") from None
