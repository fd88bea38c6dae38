"""Which `Host` headers are served, and the answer to the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tilelli_jax.serving.hosts import TrustedHosts, host_of


@pytest.mark.parametrize(("header", "host"), [
    ("localhost", "localhost"), ("LocalHost:7860", "localhost"), ("127.0.0.1:80", "127.0.0.1"),
    ("[::1]:7860", "::1"), ("[0:0:0:0:0:0:0:1]", "::1"), ("example.org.:1", "example.org"),
    (" a ", "a"), ("", None), (":80", None), ("a:b", None), ("[::1]x", None), ("[", None), ("a:80:90", None),
    ("a:٣", None)])
def test_the_name_in_a_header(header: str, host: str | None) -> None:
    assert host_of(header) == host


def responses(headers: list[tuple[bytes, bytes]], *, kind: str = "http", server: Any = ("10.0.0.7", 7860),
              allowed: tuple[str, ...] = ("Proxy.example",)) -> list[Any]:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send("served")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body of a rejected request is not read")
    scope = {"type": kind, "headers": headers, "server": server}
    asyncio.run(TrustedHosts(app, allowed)(scope, receive, send))
    return sent


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:7860", "[::1]:7860", "10.0.0.7:7860",
                                  "proxy.example", "PROXY.example:443"])
def test_hosts_that_are_served(host: str) -> None:
    assert responses([(b"accept", b"*/*"), (b"host", host.encode())]) == ["served"]
    assert responses([(b"host", host.encode())], kind="websocket") == ["served"]


@pytest.mark.parametrize("headers", [
    [], [(b"host", b"rebound.example")], [(b"host", b"localhost.rebound.example")], [(b"host", b"10.0.0.8")],
    [(b"host", b"localhost@rebound.example")], [(b"host", b"localhost"), (b"host", b"rebound.example")],
    [(b"host", b"\xff")], [(b"host", b"127.0.0.1:80:90")], [(b"x-forwarded-host", b"localhost")]])
def test_hosts_that_are_not(headers: list[tuple[bytes, bytes]]) -> None:
    start, body = responses(headers)
    assert start["status"] == 421 and dict(start["headers"])[b"content-length"] == b"%d" % len(body["body"])
    assert body["body"].startswith(b"Host: expected ") and body["body"].count(b"\n") == 1
    assert responses(headers, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_without_a_server_address() -> None:
    """For example behind a Unix socket."""
    assert responses([(b"host", b"localhost")], server=None) == ["served"]
    assert responses([(b"host", b"none")], server=None)[0]["status"] == 421


def test_other_events_are_forwarded() -> None:
    assert responses([], kind="lifespan") == ["served"]
