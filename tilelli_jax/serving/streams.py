"""One continuation of a request: its events arrive from the engine's thread, and become pieces of text."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException

from tilelli_jax.generation.engine import Engine, Finished, Request, Ticket, Token
from tilelli_jax.loading.language import LanguageModel
from tilelli_jax.models.sampling import Sampling

from .knowledge import Knowledge, Knows, Located
from .metrics import Metrics
from .requests import Abstain
from .text import Piece, TextBuilder


class Prompt(NamedTuple):
    """A prompt as text and ids, and where its question is."""

    text: str
    ids: list[int]
    located: Located


class Choice(NamedTuple):
    """A finished continuation, and the end token, if one ended it."""

    text: str
    tokens: list[Token]
    reason: str
    end: Token | None = None


class Backend(NamedTuple):
    """What serves continuations. `knows`: None without P(knows)."""

    language: LanguageModel
    engine: Engine
    knows: Knows | None
    metrics: Metrics


class Stream:
    """One continuation of a request.

    Args:
        index: its number among the request's choices, and its random stream.
        abstain: when not to generate; None: never.

    Attributes:
        knowledge: P(knows) of its prompt, known before the first piece; None without a predictor.
        n_new: number of new tokens so far.
    """

    def __init__(self, backend: Backend, prompt: Prompt, sampling: Sampling, index: int, stop: Sequence[str],
                 n_top: int, abstain: Abstain | None) -> None:
        self.backend, self.prompt, self.index, self.abstain = backend, prompt, index, abstain
        self.knowledge: Knowledge | None = None
        self.n_new = 0
        self._sampling, self._n_top = sampling, n_top
        self._events: asyncio.Queue[Token | Finished] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._ticket: Ticket | None = None
        language = backend.language
        self._text = TextBuilder(language.tokenizer, prompt.ids, language.model.is_byte_level, stop)

    def submit(self) -> None:
        """Queues the request. Raises Full or InputError."""
        located = self.prompt.located
        self._ticket = self.backend.engine.submit(Request(
            self.prompt.ids, self._sampling, self.index, self._n_top, None, (located.start, located.stop),
            None if self.backend.knows is None else self._observe), self._deliver)

    def cancel(self) -> None:
        if self._ticket is not None:
            self._ticket.cancel()

    def _observe(self, outputs: Any) -> bool:
        """Runs in the engine's thread."""
        assert self.backend.knows is not None
        self.knowledge = self.backend.knows.predict(outputs)
        if not self.prompt.located.calibrated:  # the thresholds are those of the study's prompts
            self.knowledge = self.knowledge._replace(verdict=None)
        self.backend.metrics.knows.observe(self.knowledge.p)
        return self.abstain is None or self.knowledge.p >= self.abstain.below

    def _deliver(self, event: Token | Finished) -> None:
        """Runs in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def pieces(self) -> AsyncIterator[Piece | Choice]:
        """Pieces of text, of which the first may be empty, and at the end a `Choice` with the rest."""
        while True:
            event = await self._events.get()
            if isinstance(event, Token):
                if not self.n_new and self._ticket is not None:
                    self.backend.metrics.first_token.observe(time.perf_counter() - self._ticket.submitted)
                self.n_new += 1
                self.backend.metrics.tokens.labels("completion").inc()
                piece = self._text.add(event)
                if piece.stopped:
                    self.cancel()
                    yield self._finished(piece.text, piece.tokens, "stop")
                    return
                if piece.text or self.n_new == 1:  # P(knows) does not wait for a whole character
                    yield piece
            elif event.reason == "error":
                raise HTTPException(500, event.error)
            elif event.reason == "cancelled":
                raise HTTPException(503, "the server is stopping")
            elif event.reason == "abstained":
                assert self.abstain is not None
                yield self._finished(self.abstain.text, [], "abstained")
                return
            else:
                rest = self._text.end()
                yield self._finished(rest.text, rest.tokens, "stop" if rest.stopped else event.reason,
                                     None if rest.stopped else event.token)
                return

    async def choice(self) -> Choice:
        """The whole continuation."""
        text, tokens = "", list[Token]()
        async for piece in self.pieces():
            text += piece.text
            tokens += piece.tokens
            if isinstance(piece, Choice):
                return piece._replace(text=text, tokens=tokens)
        raise AssertionError("a stream ends with a choice")

    def _finished(self, text: str, tokens: list[Token], reason: str, end: Token | None = None) -> Choice:
        self.backend.metrics.finished.labels(reason).inc()
        return Choice(text, tokens, reason, end)
