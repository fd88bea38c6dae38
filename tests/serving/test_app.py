"""The server's routes with a byte-level network and a stand-in for the predictor, in this process."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.no_compilation import no_compilation
from tests.reference_impl.random_weights import random_network
from tilelli_jax.generation.engine import Engine
from tilelli_jax.generation.programs import FinalStream
from tilelli_jax.loading.language import ByteTokenizer, LanguageModel
from tilelli_jax.models.vanilla import VanillaConfig

pytest.importorskip("starlette", reason="starlette (extra: serve) is not installed")
pytest.importorskip("openai", reason="openai (extra: test), which brings httpx, is not installed")
import httpx
import uvicorn

from tilelli_jax.serving import app as app_module
from tilelli_jax.serving import listening
from tilelli_jax.serving.app import Server, Settings
from tilelli_jax.serving.knowledge import Knowledge, Located
from tilelli_jax.serving.requests import Abstain

SLOTS, WAITING, MAX_LEN = 1, 2, 150
LANGUAGE = LanguageModel(random_network(VanillaConfig(
    d_model=16, n_layers=2, n_heads=2, max_seq_len=MAX_LEN), 0)[0], ByteTokenizer())


class ByLength:
    """P(knows) is the question's length in percent."""

    signals, reads_questions, estimator, calibrated_on = FinalStream(), False, "length", "nothing"

    def __init__(self) -> None:
        self.n_predictions, self.p, self.calibrated = 0, 0.5, True

    def locate(self, encoding: Any, text: str, question: str | None) -> Located:
        return Located(0, len(text), self.calibrated)

    def prompt(self, question: str, where: str) -> tuple[list[int], int, int]:
        return list(question.encode()), 0, len(question)

    def predict(self, outputs: Any) -> Knowledge:
        assert np.shape(outputs) == (2, 16)
        self.n_predictions += 1
        return Knowledge(self.p, "likely knows", None)


@pytest.fixture(scope="module")
def engine() -> Engine:
    compiled = Engine(LANGUAGE.model, slots=SLOTS, max_len=MAX_LEN, max_waiting=WAITING,
                      signals=FinalStream(), reads_questions=False)
    compiled.compile()
    return compiled


@contextlib.contextmanager
def served(engine: Engine, knows: Any = None, **settings: Any) -> Iterator[tuple[str, Server]]:
    """A server in a thread, and its URL."""
    engine._thread, engine._stopping = None, ""
    with listening.open_socket("127.0.0.1", 0) as listener, engine.running():
        server = Server(LANGUAGE, engine, Settings("tiny", **settings), knows)
        started = threading.Event()
        http = listening.Http(uvicorn.Config(server.app(), log_level="warning", lifespan="off"), started.set)
        thread = threading.Thread(target=http.run, args=([listener],))
        thread.start()
        assert started.wait(60)
        try:
            yield listening.address_of(listener), server
        finally:
            http.leave(0)
            thread.join(60)
            assert not thread.is_alive()


@contextlib.contextmanager
def paused(engine: Engine) -> Iterator[None]:
    """Prompts are processed, but no tokens decoded after their first ones."""
    go_on, step = threading.Event(), engine._decode

    def decode() -> None:
        go_on.wait()
        step()
    engine._decode = decode  # type: ignore[method-assign]
    try:
        yield
    finally:
        go_on.set()
        del engine.__dict__["_decode"]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def metric(url: str, name: str) -> float:
    value, = [line.split()[-1] for line in httpx.get(f"{url}metrics").text.splitlines()
              if line.startswith(f"{name} ")]
    return float(value)


def complete(url: str, **fields: Any) -> Any:
    return httpx.post(f"{url}v1/completions", json={"prompt": "Hello", "max_tokens": 3} | fields, timeout=60)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_body_that_never_arrives(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.2)
    with served(engine) as (url, _):
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.settimeout(60)
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(engine: Engine, stream: bool, caplog: pytest.LogCaptureFixture
                                       ) -> None:
    with served(engine, ByLength(), timeout=1) as (url, _):
        with paused(engine):  # the first token is in time, the others are not
            reply = complete(url, max_tokens=100, stream=stream)
        if stream:
            assert reply.status_code == 200 and '"type": "timeout_error"' in reply.text.splitlines()[-2]
        else:
            assert reply.status_code == 504 and reply.json()["error"]["type"] == "timeout_error"
        until(lambda: metric(url, "tilelli_slots_active") == 0)
        until(lambda: metric(url, 'tilelli_requests_total{endpoint="/v1/completions",status="504"}') == 1)
    assert not caplog.records, "no traceback"


def test_a_stream_is_counted_at_its_end(engine: Engine) -> None:
    with served(engine, ByLength()) as (url, _), contextlib.ExitStack() as pause:
        pause.enter_context(paused(engine))
        with httpx.stream("POST", f"{url}v1/completions", timeout=60, json={
                "prompt": "Hello", "max_tokens": 20, "stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            assert "/v1/completions" not in httpx.get(f"{url}metrics").text
            pause.close()
            assert list(lines)[-2] == "data: [DONE]"
        until(lambda: metric(url, 'tilelli_request_seconds_count{endpoint="/v1/completions"}') == 1)
        assert metric(url, 'tilelli_requests_total{endpoint="/v1/completions",status="200"}') == 1
        assert metric(url, "tilelli_first_token_seconds_count") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_the_queue_make_room(engine: Engine, stream: bool) -> None:
    """One slot and two places: both waiting clients leave, and two others get their places and answers."""
    with served(engine) as (url, _server), contextlib.ExitStack() as clients:
        pause = clients.enter_context(contextlib.ExitStack())
        pause.enter_context(paused(engine))  # the first request stays in its slot
        host, port = url.removeprefix("http://").rstrip("/").split(":")
        body = json.dumps({"prompt": "Hello", "max_tokens": 140, "stream": stream}).encode()
        sockets = []
        for _ in range(3):
            sockets.append(clients.enter_context(socket.create_connection((host, int(port)))))
            sockets[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
                                % (len(body), body))
            until(lambda: sum(metric(url, f"tilelli_{name}") for name in ("slots_active", "queue"))
                  == len(sockets))
        assert complete(url).status_code == 429
        tokens = metric(url, 'tilelli_tokens_total{kind="completion"}')
        for waiting in sockets[1:]:
            waiting.close()
        until(lambda: metric(url, "tilelli_queue") == 0)
        results: list[Any] = []
        others = [threading.Thread(target=lambda: results.append(complete(url))) for _ in range(2)]
        for other in others:
            other.start()
        until(lambda: metric(url, "tilelli_queue") == 2)
        pause.close()
        for other in others:
            other.join(60)
        assert [reply.status_code for reply in results] == [200, 200]
        until(lambda: metric(url, "tilelli_slots_active") == 0)
        new = metric(url, 'tilelli_tokens_total{kind="completion"}') - tokens
        assert new <= 140 + 6, "nothing was generated for those who left"


def test_the_log_has_prompts_only_if_asked(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for log_prompts in (False, True):
        with served(engine, ByLength(), log_prompts=log_prompts) as (url, _):
            for stream in (False, True):
                assert complete(url, prompt="a secret", stream=stream).status_code == 200
            assert httpx.post(f"{url}v1/knows", json={"questions": "a secret"}, timeout=60).status_code == 200
        assert len([record for record in caplog.records if "a secret" in record.message]) == 3 * log_prompts


def test_the_server_abstains_unless_a_request_says_otherwise(engine: Engine) -> None:
    knows = ByLength()
    with served(engine, knows, abstain=Abstain(0.6, "No.")) as (url, server):
        choice, = complete(url).json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("No.", "abstained")
        choice, = complete(url, abstain={"below": 0.4}).json()["choices"]
        assert choice["finish_reason"] == "length"
        knows.calibrated = False  # the threshold and the verdict are for the study's prompts
        reply = complete(url).json()
        assert reply["choices"][0]["finish_reason"] == "length" and reply["knows"]["verdict"] is None
        assert complete(url, abstain={"below": 0.6}).json()["choices"][0]["finish_reason"] == "abstained"
        knows.calibrated = True
        assert complete(url, abstain={"below": 0}).json()["knows"]["verdict"] == "likely knows"
        knows.p = 0.7
        assert complete(url).json()["choices"][0]["finish_reason"] == "length"
        n = knows.n_predictions
        server.warm_up()
        with no_compilation():
            complete(url)
        assert knows.n_predictions == n + 2


def test_several_choices(engine: Engine) -> None:
    with served(engine) as (url, _):
        texts = [choice["text"] for choice in complete(url, n=3, max_tokens=20).json()["choices"]]
        assert len(set(texts)) == 3
        reply = complete(url, n=4)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "n"
        assert "n: expected at most 3 choices in one request" in reply.json()["error"]["message"]


def test_an_unexpected_error_is_a_reply(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "parse_completion", lambda tree: 1 / 0)
    with served(engine) as (url, _):
        reply = complete(url)
        assert reply.status_code == 500
        assert reply.json()["error"] == {"message": "internal error", "type": "server_error", "param": None,
                                         "code": None}
        assert metric(url, 'tilelli_requests_total{endpoint="/v1/completions",status="500"}') == 1


def test_a_failed_compilation_ends_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(LANGUAGE.model, slots=1, max_len=MAX_LEN)
    engine.programs = SimpleNamespace(all=lambda: iter([lambda: 1 / 0]), sizes=[64])  # type: ignore[assignment]
    with listening.open_socket("127.0.0.1", 0) as listener:
        assert listening.serve(Server(LANGUAGE, engine, Settings("tiny")), listener, allowed=None) == 1
    assert engine.failed and not engine.alive
