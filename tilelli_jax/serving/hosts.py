"""Checks the `Host` header of requests, which protects a local server from DNS rebinding.

In DNS rebinding another site makes its name point to this machine, so that its page can request the server as
same-origin. Such a request has the other site's name in its `Host` header.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class TrustedHosts:
    """An ASGI application that answers 421 unless `Host` is the server's address, localhost or an allowed
    name.

    Args:
        app: the application that answers accepted requests.
        allowed: further names or addresses, without a port.
    """

    def __init__(self, app: App, allowed: Iterable[str] = ()):
        self.app = app
        self.allowed = {*LOOPBACK, *(_plain(host) for host in allowed)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Rejects a request, or forwards it to the application."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        names = [value for key, value in scope["headers"] if key.lower() == b"host"]
        host = host_of(names[0].decode("latin-1")) if len(names) == 1 else None
        server = scope.get("server")
        if host is not None and (host in self.allowed or (server and host == _plain(str(server[0])))):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            message = "Host: expected the server's address, localhost or one of --allow-host, found another\n"
            await send({"type": "http.response.start", "status": 421,
                        "headers": [(b"content-type", b"text/plain; charset=utf-8"),
                                    (b"content-length", str(len(message)).encode())]})
            await send({"type": "http.response.body", "body": message.encode()})


def host_of(header: str) -> str | None:
    """Returns the host of a `Host` header in lower case, without its port; None if it is invalid."""
    name, port = header.strip(), ""
    if name.startswith("["):  # an IPv6 address
        name, _, port = name[1:].partition("]")
        if port and not port.startswith(":"):
            return None
        port = port[1:]
    elif ":" in name:
        name, _, port = name.partition(":")
    if not name or (port and not (port.isascii() and port.isdigit())):
        return None
    return _plain(name)


def _plain(host: str) -> str:
    """Returns a host in lower case; addresses in canonical form."""
    host = host.strip().strip("[]").rstrip(".").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host
