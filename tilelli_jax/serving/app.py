"""The server's routes: completions in the manner of OpenAI's API, P(knows), health and metrics.

A reply has the object `knows` besides OpenAI's fields: P(knows) of the prompt, from the pass that the prompt
needs anyway. In a stream it is in the first chunk, before any text. A request that abstains generates
nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tilelli_jax.data.turns import STOP
from tilelli_jax.errors import InputError
from tilelli_jax.generation.engine import Engine, Full, Token
from tilelli_jax.io import json_text
from tilelli_jax.loading.language import LanguageModel
from tilelli_jax.models.sampling import Sampling

from .knowledge import Knowledge, Knows, Located
from .metrics import CONTENT_TYPE, Metrics
from .prompts import chat_prompt, text_prompt
from .replies import Replies, Tree, error_object, error_reply, knows_object
from .requests import Abstain, Completion, FieldError, parse_chat, parse_completion, parse_questions
from .streams import Backend, Choice, Prompt, Stream
from .text import Piece

log = logging.getLogger(__name__)
MAX_QUESTIONS = 256  # of one request for P(knows)
BODY_SECONDS = 30  # limit of the time in which a request's body arrives
CODES = {401: "invalid_api_key", 404: "model_not_found"}  # of errors of these routes
T = TypeVar("T")
RETRY_AFTER = 1  # seconds after which a refused client may try again
OPEN = ("/health", "/metrics")  # no key is needed


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        name: the model's name in replies; requests may leave it out.
        api_key: that requests must have; empty: none is needed.
        max_body: limit of a request's body, in bytes.
        timeout: limit of a request, in seconds.
        abstain: applies to requests that do not set it; None: reply always.
        log_prompts: write prompts and replies to the log.
    """

    name: str
    api_key: str = ""
    max_body: int = 1 << 20
    timeout: float = 600.0
    abstain: Abstain | None = None
    log_prompts: bool = False


class Server:
    """One network behind HTTP.

    Args:
        knows: predicts P(knows); None: replies have none.

    Attributes:
        progress: number of compiled programs, and of all.
    """

    def __init__(self, language: LanguageModel, engine: Engine, settings: Settings,
                 knows: Knows | None = None) -> None:
        self.engine, self.settings, self.knows = engine, settings, knows
        self.metrics = Metrics(engine)
        self.backend = Backend(language, engine, knows, self.metrics)
        self.progress = 0, 1
        self.created = int(time.time())

    def warm_up(self) -> None:
        """Predicts P(knows) of an empty prompt, which compiles what the predictor needs."""
        if self.knows is not None:
            self.knows.predict(self.engine.example_outputs())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [Route(path, functools.partial(self._answered, path, handler), methods=[method])
                  for path, method, handler in (
                      ("/v1/models", "GET", self._models), ("/v1/models/{name:path}", "GET", self._model),
                      ("/v1/chat/completions", "POST", self._chat),
                      ("/v1/completions", "POST", self._completions), ("/v1/knows", "POST", self._knows),
                      ("/health", "GET", self._health), ("/metrics", "GET", self._metrics))]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})

    # --- routes -----------------------------------------------------------------------------------

    async def _answered(self, path: str, handler: Callable[[HttpRequest], Awaitable[Response]],
                        request: HttpRequest) -> Response:
        """Checks the key, turns exceptions into replies, and counts."""
        begun = time.perf_counter()

        def count(status: int) -> None:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)
        request.state.count = count
        try:
            if path not in OPEN:
                self._authorise(request)
            response = await handler(request)
        except HTTPException as error:
            response = error_reply(error.status_code, str(error.detail), code=CODES.get(error.status_code))
        except FieldError as error:
            response = error_reply(400, str(error), error.field)
        except InputError as error:
            response = error_reply(400, str(error))
        except Full:
            response = error_reply(429, "expected a free slot, found a full queue; try again later")
            response.headers["Retry-After"] = str(RETRY_AFTER)
        except TimeoutError:
            response = error_reply(504, f"expected a reply within {self.settings.timeout:g} s")
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            log.exception("%s", path)
            response = error_reply(500, "internal error")

        if not isinstance(response, StreamingResponse):  # they count at their end
            count(response.status_code)
        return response

    async def _models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: HttpRequest) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._description())

    async def _health(self, request: HttpRequest) -> Response:
        done, total = self.progress
        if not self.engine.ready:
            return JSONResponse({"status": "compiling", "programs": done, "of": total}, 503)
        if not self.engine.alive:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready"})

    async def _metrics(self, request: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def _chat(self, request: HttpRequest) -> Response:
        completion = parse_chat(await self._body(request))
        self._check(completion)
        return await self._complete(request, completion, [chat_prompt(self.backend, completion.messages)])

    async def _completions(self, request: HttpRequest) -> Response:
        completion = parse_completion(await self._body(request))
        self._check(completion)
        return await self._complete(request, completion, [
            text_prompt(self.backend, prompt, f"prompt[{i}]" if len(completion.prompts) > 1 else "prompt")
            for i, prompt in enumerate(completion.prompts)])

    async def _knows(self, request: HttpRequest) -> Response:
        model, questions = parse_questions(await self._body(request), MAX_QUESTIONS)
        if model is not None:
            self._check_model(model)
        knows = self.knows
        if knows is None:
            raise InputError("this server has no sidecar; `tilelli serve --sidecar DIR` loads one")
        self._check_ready()
        prompts = [knows.prompt(question, f"questions[{i}]") for i, question in enumerate(questions)]
        for i, (ids, _, _) in enumerate(prompts):
            if len(ids) > self.engine.max_len:
                raise FieldError(f"questions[{i}]", f"expected at most {self.engine.max_len} tokens with its "
                                 f"prompt, found {len(ids)}")

        async def work() -> list[Knowledge]:  # one at a time: long lists leave room for other requests
            return [await self._knowledge(list(ids), Located(start, stop, True))
                    for ids, start, stop in prompts]
        found = await self._unless_gone(request, work())
        self._log_prompts(questions, [f"{knowledge.p:.4f}" for knowledge in found])
        return JSONResponse({"object": "list", "model": self.settings.name, "data": [
            {"index": i, "question": question, **knows_object(knows, knowledge, True)}
            for i, (question, knowledge) in enumerate(zip(questions, found, strict=True))]})

    # --- completions ------------------------------------------------------------------------------

    async def _complete(self, request: HttpRequest, completion: Completion, prompts: list[Prompt]
                        ) -> Response:
        streams = [self._stream(completion, prompt, i * completion.n + k)
                   for i, prompt in enumerate(prompts) for k in range(completion.n)]
        capacity = self.engine.slots + self.engine.max_waiting
        if len(streams) > capacity:
            raise FieldError("n", f"expected at most {capacity} choices in one request, as this server has "
                             f"{self.engine.slots} slots and {self.engine.max_waiting} places in its queue, "
                             f"found {len(streams)}")
        replies = Replies(self.backend, self.settings.name, completion, prompts, streams)
        with contextlib.ExitStack() as cleanup:
            for stream in streams:
                cleanup.callback(stream.cancel)
                stream.submit()
            for prompt in prompts:
                self.metrics.tokens.labels("prompt").inc(len(prompt.ids))
            if completion.stream:
                chunks = self._chunks(replies, prompts, streams, cleanup.pop_all())

                async def begin() -> Tree:
                    return await anext(chunks)
                # Errors before the first chunk become replies of their own.
                first = await self._unless_gone(request, begin())
                return StreamingResponse(
                    _server_sent(first, chunks, request.state.count), media_type="text/event-stream",
                    headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

            async def work() -> list[Choice]:
                choices = await asyncio.gather(*(stream.choice() for stream in streams))
                if not completion.echo:
                    return choices
                return [await self._echoed(completion, stream.prompt, choice)
                        for stream, choice in zip(streams, choices, strict=True)]
            choices = await self._unless_gone(request, work())
        self._log_prompts([prompt.text for prompt in prompts], [choice.text for choice in choices])
        return JSONResponse(replies.whole(choices))

    def _log_prompts(self, prompts: list[str], texts: list[str]) -> None:
        if self.settings.log_prompts:
            log.warning("%s", json.dumps({"prompts": prompts, "texts": texts}, ensure_ascii=False))

    def _stream(self, completion: Completion, prompt: Prompt, index: int) -> Stream:
        room = self.engine.max_len - len(prompt.ids)
        max_new = completion.max_new if completion.max_new is not None else max(room, 1)
        if completion.max_new is not None and max_new > self.engine.max_len:
            raise FieldError("max_tokens", f"expected at most {self.engine.max_len} together with the "
                             f"prompt, found {max_new}")
        if max_new > room:
            raise FieldError("messages" if completion.is_chat else "prompt",
                             f"expected at most {self.engine.max_len} tokens together with the {max_new} new "
                             f"ones, found {len(prompt.ids)}")
        if completion.abstain is not None and self.knows is None:
            raise FieldError("abstain", "expected a server with a sidecar")
        is_byte_level = self.backend.language.model.is_byte_level
        stop = [*completion.stop, *([STOP] if completion.is_chat and is_byte_level else [])]
        return Stream(self.backend, prompt, dataclasses.replace(completion.sampling, max_new=max_new), index,
                      stop, completion.n_top or 0, completion.abstain or (
                          self.settings.abstain if prompt.located.calibrated else None))

    async def _chunks(self, replies: Replies, prompts: list[Prompt], streams: list[Stream],
                      cleanup: contextlib.ExitStack) -> AsyncIterator[Tree]:
        """The chunks of a stream; at its end, `cleanup` is closed.

        Several tasks may iterate over it in turn, so that a timeout cannot be that of one task.
        """
        pieces: asyncio.Queue[tuple[Stream, Piece | Choice | BaseException]] = asyncio.Queue()

        async def forward(stream: Stream) -> None:
            try:
                async for piece in stream.pieces():
                    pieces.put_nowait((stream, piece))
            except BaseException as error:
                pieces.put_nowait((stream, error))
        tasks = [asyncio.create_task(forward(stream)) for stream in streams]
        with cleanup:
            for task in tasks:
                cleanup.callback(task.cancel)
            texts, begun, running = [""] * len(streams), set[int](), len(streams)
            deadline = time.monotonic() + self.settings.timeout
            while running:
                stream, piece = await asyncio.wait_for(pieces.get(), max(deadline - time.monotonic(), 0))
                if isinstance(piece, BaseException):
                    raise piece
                if stream.index not in begun and (first := replies.first(stream)) is not None:
                    yield first
                begun.add(stream.index)
                running -= isinstance(piece, Choice)
                texts[streams.index(stream)] += piece.text
                if piece.text or isinstance(piece, Choice):
                    yield replies.next(stream, piece)
            self._log_prompts([prompt.text for prompt in prompts], texts)
            if (last := replies.last()) is not None:
                yield last

    async def _echoed(self, completion: Completion, prompt: Prompt, choice: Choice) -> Choice:
        """A choice that begins with its prompt, whose first token has no log-probability."""
        tokens: list[Token] = []
        if completion.n_top is not None:
            scored = await asyncio.wrap_future(self.engine.score(prompt.ids, completion.n_top))
            tokens = [Token(prompt.ids[0], math.nan, []), *scored]
        return choice._replace(text=prompt.text + choice.text, tokens=[*tokens, *choice.tokens])

    async def _knowledge(self, ids: list[int], located: Located) -> Knowledge:
        """P(knows) of a prompt, without a continuation."""
        stream = Stream(self.backend, Prompt("", ids, located), Sampling(max_new=0), 0, (), 0, None)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(stream.cancel)
            stream.submit()
            await stream.choice()
        assert stream.knowledge is not None
        return stream.knowledge

    # --- checks -----------------------------------------------------------------------------------

    def _authorise(self, request: HttpRequest) -> None:
        key = self.settings.api_key
        if not key:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        sent = given.strip().encode("latin-1")  # as the header was decoded
        if scheme.lower() != "bearer" or not hmac.compare_digest(sent, key.encode()):
            raise HTTPException(401, "Authorization: expected `Bearer KEY` with this server's key")

    async def _body(self, request: HttpRequest) -> Any:
        """The body as JSON."""
        limit, body = self.settings.max_body, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise HTTPException(413, f"body: expected at most {limit} bytes, found more")
        except TimeoutError:
            raise HTTPException(408, f"body: expected the whole of it within {BODY_SECONDS} s") from None
        try:
            return json_text.parse(body.decode("utf-8"), "body")
        except UnicodeDecodeError as error:
            raise FieldError("body", f"not UTF-8 at byte {error.start + 1}") from None

    def _check(self, completion: Completion) -> None:
        if completion.model is not None:
            self._check_model(completion.model)
        self._check_ready()

    def _check_model(self, name: str) -> None:
        if name != self.settings.name:
            raise HTTPException(404, f"model: expected {self.settings.name}, found {name!r:.60}")

    def _check_ready(self) -> None:
        if not (self.engine.ready and self.engine.alive):
            raise HTTPException(503, "expected a ready server; GET /health says when it is")

    def _description(self) -> dict[str, Any]:
        knows = {} if self.knows is None else {"knows": {"estimator": self.knows.estimator,
                                                         "calibrated_on": self.knows.calibrated_on}}
        return {"id": self.settings.name, "object": "model", "created": self.created,
                "owned_by": "tilelli_jax", "max_model_len": self.engine.max_len, **knows}

    async def _unless_gone(self, request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
        """Awaits work and returns its result; ends it if the client goes away or the time is over."""
        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
        task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
        try:
            async with asyncio.timeout(self.settings.timeout):
                await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return await task
        finally:
            for pending in (task, watcher):
                pending.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)


# ---------------------------------------------------------------------------------------------


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_reply(error.status_code, str(error.detail))


async def _server_sent(first: Tree, chunks: AsyncIterator[Tree], count: Callable[[int], None]
                       ) -> AsyncIterator[str]:
    """Chunks as server-sent events; an error after the first chunk is an event too. Counts at the end."""
    status = 499  # the client went away
    try:
        yield _event(first)
        async for chunk in chunks:
            yield _event(chunk)
        yield "data: [DONE]\n\n"
        status = 200
    except HTTPException as error:
        status = error.status_code
        yield _event(error_object(status, str(error.detail)))
    except TimeoutError:
        status = 504
        yield _event(error_object(status, "the reply took too long"))
    finally:
        count(status)
        await chunks.aclose()  # type: ignore[attr-defined]


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
