"""Continuous batching: many requests share one network, and join and leave its batch between two steps.

The batch has a fixed number of slots. A new prompt is processed alone, padded to one of a few lengths, and
its keys and values are copied into a free slot. Then one step decodes the next token of every slot. Caches
have room for a few numbers of positions; they grow when a request needs more. A server compiles all
programs before the first request, and none afterwards; a page compiles each when it is first needed.

    engine = Engine(language.model, slots=4, max_len=512)
    engine.compile()
    with engine.running():
        request = engine.submit(Request(ids, Sampling(max_new=20, temperature=0.0)), print)
        request.wait()
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from tilelli_jax.errors import InputError
from tilelli_jax.generation import decoding
from tilelli_jax.generation.programs import MAX_TOP, Choice, Chosen, Programs, Signals, no_choices
from tilelli_jax.models.causal_lm import CausalLM
from tilelli_jax.models.sampling import Sampling
from tilelli_jax.signals.batching import max_time

log = logging.getLogger(__name__)

DAMAGED = "expected finite probabilities, found infinite or NaN: the network's weights may be damaged"
Reason = Literal["stop", "length", "cancelled", "abstained", "error"]


class Full(Exception):
    """The queue of waiting requests is full."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One continuation.

    Attributes:
        ids: the prompt, at least one token.
        sampling: as for `generate`; the text does not depend on other requests.
        stream: index of the random stream, as of the prompt in `generate`.
        n_top: number of most likely tokens reported with each token, up to MAX_TOP.
        end_ids: ids that end it; None: those of the configuration.
        question: the span `[start, stop)` of the question in the prompt, for the signals.
        observe: called in the engine's thread with the prompt's signals before the first token; False ends
            the request with reason "abstained".
    """

    ids: Sequence[int]
    sampling: Sampling
    stream: int = 0
    n_top: int = 0
    end_ids: Sequence[int] | None = None
    question: tuple[int, int] = (0, 0)
    observe: Callable[[Any], bool] | None = None


class Token(NamedTuple):
    """A new token, its log-probability at temperature 1 in nats, and the most likely tokens with theirs."""

    id: int
    log_prob: float
    top: list[tuple[int, float]]


class Finished(NamedTuple):
    """The end of a request.

    Attributes:
        reason: "stop": an end token; "length": max_new tokens.
        error: a message if the reason is "error".
        token: the end token, which is not delivered as one of the text; None for other reasons.
    """

    reason: Reason
    error: str = ""
    token: Token | None = None


Deliver = Callable[[Token | Finished], object]


class Ticket:
    """A submitted request."""

    def __init__(self, request: Request, deliver: Deliver) -> None:
        self.request, self.cancelled = request, False
        self.submitted = time.perf_counter()
        self._deliver, self._done = deliver, threading.Event()

    def cancel(self) -> None:
        """Ends the request before its next token."""
        self.cancelled = True

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the end of the request. Returns whether it has ended."""
        return self._done.wait(timeout)

    def deliver(self, event: Token | Finished) -> None:
        """Passes an event to the caller; one that fails ends the request, not the engine."""
        try:
            self._deliver(event)
        except Exception:
            log.exception("delivering a token")
            self.cancelled = True
        if isinstance(event, Finished):
            self._done.set()


class Load(NamedTuple):
    """How busy an engine is: occupied slots, all slots, and waiting requests."""

    active: int
    slots: int
    waiting: int


class Engine:
    """Decodes the requests of several clients with one network.

    Args:
        slots: number of requests that are decoded at once.
        max_len: maximum number of tokens of a prompt with its continuation.
        max_waiting: maximum number of requests that wait for a slot.
        signals: computed from each prompt's pass.
        reads_questions: whether the signals use the activations at the question's positions.

    Attributes:
        ended: called in the engine's thread at its end; `failed`: whether an error ended it.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(self, model: CausalLM, *, slots: int = 4, max_len: int = 1024, max_waiting: int = 64,
                 signals: Signals | None = None, reads_questions: bool = True) -> None:
        context = max_time(model)
        for name, value, low, high in (("slots", slots, 1, 1024), ("max_waiting", max_waiting, 0, 1 << 20),
                                       ("max_len", max_len, 2, context or 1 << 20)):
            if not low <= value <= high:
                raise InputError(f"{name}: expected {low} to {high}, found {value}")
        self.slots, self.max_len, self.max_waiting = slots, max_len, max_waiting
        self.programs = Programs(model, slots, max_len, signals, reads_questions)
        self.vocab_size = self.programs.vocab_size
        self.end_ids = tuple(getattr(model.config, "end_ids", ()))
        self._waiting: collections.deque[Ticket | tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._condition = threading.Condition()  # reentrant
        self._stopping: Literal["", "drain", "now"] = ""
        self._thread: threading.Thread | None = None
        self.ready = self.failed = False
        self.ended: Callable[[], object] = lambda: None
        self._reset()

    def compile(self, advance: Callable[[int, int], object] = lambda done, total: None) -> None:
        """Compiles all programs; `advance` is called with the number of programs so far and of all."""
        programs = list(self.programs.all())
        for i, compile_program in enumerate(programs):
            if self._stopping:
                return
            advance(i, len(programs))
            compile_program()
        self.ready = True
        advance(len(programs), len(programs))

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Queues a request.

        Args:
            deliver: called in the engine's thread with each `Token`, and once with `Finished`; it must return
                quickly.

        Raises:
            InputError: the prompt is empty, too long, or outside the vocabulary, or `n_top` is out of range.
            Full: too many requests wait, or the engine is stopping.
        """
        ids = np.asarray(request.ids)
        if ids.ndim != 1 or not len(ids):
            raise InputError("prompt: expected at least one token, found none")
        if len(ids) + request.sampling.max_new > self.max_len:
            raise InputError(f"prompt: expected at most {self.max_len} tokens together with the "
                             f"{request.sampling.max_new} new ones, found {len(ids)}")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise InputError(f"prompt: expected tokens from 0 to {self.vocab_size - 1}, found "
                             f"{ids.min() if ids.min() < 0 else ids.max()}")
        if not 0 <= request.n_top <= MAX_TOP:
            raise InputError(f"n_top: expected 0 to {MAX_TOP}, found {request.n_top}")
        ticket = Ticket(request, deliver)
        with self._condition:
            self._drop_cancelled()
            load = self._load()
            if self._stopping or load.waiting >= self.max_waiting + load.slots - load.active:
                raise Full
            self._waiting.append(ticket)
            self._condition.notify()
        return ticket

    def stream(self, request: Request) -> Generator[Token | Finished]:
        """Queues a request, and returns its events as they come; closing the iterator cancels it.

        Raises: as `submit`, at the call.
        """
        events: queue.SimpleQueue[Token | Finished] = queue.SimpleQueue()
        ticket = self.submit(request, events.put)

        def until_finished() -> Generator[Token | Finished]:
            try:
                event: Token | Finished | None = None
                while not isinstance(event, Finished):
                    event = events.get()
                    yield event
            finally:
                ticket.cancel()
        return until_finished()

    def example_outputs(self) -> Any:
        """The signals of a prompt of zeros."""
        time = self.programs.sizes[0]
        width = self.programs.widths(time)[0]
        outputs = self.programs.prefill(time, width)(
            self.programs.params, np.zeros((1, time), np.int32), np.ones(1, np.int32),
            np.zeros((1, width + 1), np.int32), np.ones((1, width + 1), bool), no_choices(1))[2]
        return jax.tree.map(lambda array: np.asarray(array)[0], outputs)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Calls a function in the engine's thread between two steps, in order of arrival."""
        future: Future[Any] = Future()
        with self._condition:
            if self._stopping:
                raise Full
            self._waiting.append((function, future))
            self._condition.notify()
        return future

    def score(self, ids: Sequence[int], n_top: int = 0) -> Future[list[Token]]:
        """The tokens of a text after its first, with their log-probabilities and the most likely ones."""
        row = np.asarray(ids, np.int32)

        def scored() -> list[Token]:
            time = self.programs.size(len(row))
            targets = decoding.pad([row[1:]], time)
            log_probs, best, top = jax.device_get(self.programs.score(time)(
                self.programs.params, decoding.pad([row], time), targets))
            return [Token(int(row[i + 1]), float(log_probs[0, i]),
                          list(zip(best[0, i, :n_top].tolist(), top[0, i, :n_top].tolist(), strict=True)))
                    for i in range(len(row) - 1)]
        return self.call(scored)

    @property
    def load(self) -> Load:
        """How busy the engine is."""
        with self._condition:
            return self._load()

    def _load(self) -> Load:
        """`load`, for those who hold the lock."""
        active = sum(ticket is not None for ticket in self._tickets)
        return Load(active, self.slots, sum(isinstance(item, Ticket) and not item.cancelled
                                            for item in self._waiting))

    def _drop_cancelled(self) -> None:
        """Ends waiting requests that were cancelled; the caller holds the lock."""
        for ticket in [item for item in self._waiting if isinstance(item, Ticket) and item.cancelled]:
            self._waiting.remove(ticket)
            ticket.deliver(Finished("cancelled"))

    @property
    def alive(self) -> bool:
        """Whether the engine accepts requests."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @contextlib.contextmanager
    def running(self, *, ahead: bool = True) -> Iterator[None]:
        """Runs the engine's thread (`start`); at the end, requests that have not finished are cancelled."""
        self.start(ahead=ahead)
        try:
            yield
        finally:
            self.stop(drain=False)

    def start(self, advance: Callable[[int, int], object] = lambda done, total: None, *,
              ahead: bool = True) -> None:
        """Starts the engine's thread.

        Args:
            advance: see `compile`.
            ahead: whether the thread first compiles all programs, if that has not been done; otherwise each
                is compiled when it is first needed.
        """
        assert self._thread is None
        self.ready |= not ahead
        self._thread = threading.Thread(target=self._run, args=(advance,), name="engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool, timeout: float | None = None) -> bool:
        """Ends the engine's thread; with `drain`, after all requests. Returns whether it has ended."""
        with self._condition:
            self._stopping = "drain" if drain and self._stopping != "now" else "now"
            self._condition.notify()
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- the engine's thread ----------------------------------------------------------------------

    def _reset(self) -> None:
        """Empties all slots."""
        self._tickets: list[Ticket | None] = [None] * self.slots
        self._size, self._caches = self.programs.sizes[0], None
        self._ids, self._position, self._n_done = (np.zeros(self.slots, np.int32) for _ in range(3))
        self._choices = no_choices(self.slots)

    def _run(self, advance: Callable[[int, int], object]) -> None:
        try:
            if not self.ready:
                self.compile(advance)
            self._serve()
        except BaseException as error:  # of a compilation, or of `advance`
            log.error("the engine ends: %s: %s", type(error).__name__, error)
            self.failed = True
            self._stopping = "now"
            self._cancel_all()
        finally:
            self.ended()

    def _serve(self) -> None:
        while self._wait():
            try:
                self._admit()
                if any(self._tickets):
                    self._decode()
            except Exception as error:  # the caches may be lost, but the next requests can be served
                log.exception("decoding")
                for ticket in filter(None, self._tickets):
                    ticket.deliver(Finished("error", f"{type(error).__name__}: {error}"))
                self._reset()
        self._cancel_all()

    def _cancel_all(self) -> None:
        for ticket in filter(None, self._tickets):
            ticket.deliver(Finished("cancelled"))
        self._reset()
        for item in self._waiting:
            if isinstance(item, Ticket):
                item.deliver(Finished("cancelled"))
            else:
                item[1].cancel()
        self._waiting.clear()

    def _wait(self) -> bool:
        """Waits for work. Returns whether the thread goes on."""
        with self._condition:
            while not (self._stopping or self._waiting or any(self._tickets)):
                self._condition.wait()
            return self._stopping != "now" and bool(not self._stopping or self._waiting or any(self._tickets))

    def _admit(self) -> None:
        """Calls waiting functions, and moves one waiting request into a free slot."""
        while True:
            with self._condition:
                free = [i for i, ticket in enumerate(self._tickets) if ticket is None]
                if not self._waiting or (isinstance(self._waiting[0], Ticket) and not free):
                    return
                item = self._waiting.popleft()
                if isinstance(item, Ticket) and not item.cancelled:
                    self._tickets[free[0]] = item  # before the lock is released: `load` counts it
            if not isinstance(item, Ticket):
                _call(*item)
            elif item.cancelled:
                item.deliver(Finished("cancelled"))
            else:
                self._begin(free[0], item)
                return

    def _begin(self, slot: int, ticket: Ticket) -> None:
        """Processes a prompt, delivers its first token, and keeps the slot if more are to come."""
        request, sampling, n = ticket.request, ticket.request.sampling, len(ticket.request.ids)
        programs, time, (start, stop) = self.programs, self.programs.size(n), request.question
        width = next(width for width in programs.widths(time) if width >= stop - start or not width)
        ids = decoding.pad([np.asarray(request.ids, np.int32)], time)
        positions, question = np.zeros((1, width + 1), np.int32), np.zeros((1, width + 1), bool)
        if width:
            positions[0, :stop - start], question[0, :stop - start] = np.arange(start, stop), True
        positions[0, -1] = n - 1
        key = programs.stream()(np.uint32(sampling.seed), np.uint32(request.stream))
        choice = Choice(np.asarray(key)[None], *(np.full(1, value, dtype) for value, dtype in (
            (0, np.int32), (sampling.temperature, np.float32),
            (min(sampling.top_k, self.vocab_size), np.int32), (sampling.top_p, np.float32),
            (request.n_top, np.int32))))
        row, chosen, outputs = programs.prefill(time, width)(
            programs.params, ids, np.array([n], np.int32), positions, question, choice)
        if request.observe is not None:
            try:
                goes_on = request.observe(jax.tree.map(lambda array: np.asarray(array)[0], outputs))
            except Exception as error:
                log.exception("observing a prompt")
                self._end(slot, Finished("error", str(error)))
                return
            if not goes_on:
                self._end(slot, Finished("abstained"))
                return
        self._n_done[slot], self._position[slot] = 0, n
        for mine, new in zip(self._choices, choice, strict=True):
            mine[slot] = np.asarray(new)[0]
        if sampling.max_new == 0:
            self._end(slot, Finished("length"))
        elif self._deliver(slot, jax.device_get(chosen), 0):
            if self._caches is None or not any(
                    other is not None for i, other in enumerate(self._tickets) if i != slot):
                self._size = time
                self._caches = programs.empty(time)
            self._grow_to(time)
            self._caches = programs.insert(time, self._size)(self._caches, row, np.int32(slot))

    def _decode(self) -> None:
        """Decodes one token of every slot."""
        active = [i for i, ticket in enumerate(self._tickets) if ticket is not None]
        self._grow_to(int(self._position[active].max()) + 1)
        idle = np.array([ticket is None for ticket in self._tickets])
        self._position[idle] = 0
        for values, default in zip(self._choices, no_choices(self.slots), strict=True):
            values[idle] = default[idle]
        self._choices.n_done[:] = self._n_done
        self._caches, chosen = self.programs.step(self._size)(
            self.programs.params, self._caches, self._ids, self._position, self._choices)
        chosen = jax.device_get(chosen)
        self._position[active] += 1
        for slot in active:
            self._deliver(slot, chosen, slot)

    def _grow_to(self, n: int) -> None:
        """Gives the caches room for n positions."""
        while self._size < n:
            larger = self.programs.size(self._size + 1)
            self._caches = self.programs.grow(self._size, larger)(self._caches)
            self._size = larger

    def _deliver(self, slot: int, chosen: Chosen, row: int) -> bool:
        """Delivers the token of a slot. Returns whether the request goes on."""
        ticket = self._tickets[slot]
        assert ticket is not None
        request, token = ticket.request, int(chosen.ids[row])
        if ticket.cancelled:
            return self._end(slot, Finished("cancelled"))
        if not np.isfinite(chosen.log_probs[row]):
            return self._end(slot, Finished("error", DAMAGED))
        self._ids[slot] = token
        self._n_done[slot] += 1
        top = zip(chosen.top_ids[row, :request.n_top].tolist(),
                  chosen.top_log_probs[row, :request.n_top].tolist(), strict=True)
        new = Token(token, float(chosen.log_probs[row]), list(top))
        if token in (self.end_ids if request.end_ids is None else request.end_ids):
            return self._end(slot, Finished("stop", token=new))
        ticket.deliver(new)
        if self._n_done[slot] == request.sampling.max_new:
            return self._end(slot, Finished("length"))
        return True

    def _end(self, slot: int, finished: Finished) -> bool:
        """Frees a slot. Returns False."""
        ticket = self._tickets[slot]
        assert ticket is not None
        self._tickets[slot] = None
        ticket.deliver(finished)
        return False


# ---------------------------------------------------------------------------------------------


def _call(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
