"""Which names a server answers to: a page of another site cannot reach it under a name of its own.

DNS rebinding: a site's name is made to point to this machine, and its page then asks the server as if both
were one origin. Such a request names the other site in its `Host` header.
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
    """An ASGI application that answers 421 unless `Host` names the address asked, localhost, or one allowed.

    Args:
        app: what answers the others.
        allowed: further names or addresses, without a port.
    """

    def __init__(self, app: App, allowed: Iterable[str] = ()):
        self.app = app
        self.allowed = {*LOOPBACK, *(_plain(host) for host in allowed)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or hands it on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        names = [value for key, value in scope["headers"] if key.lower() == b"host"]
        host = host_of(names[0].decode("latin-1")) if len(names) == 1 else None
        here = scope.get("server")
        if host is not None and (host in self.allowed or (here and host == _plain(str(here[0])))):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            said = "Host: expected the server's address, localhost or one of --allow-host, found another\n"
            await send({"type": "http.response.start", "status": 421,
                        "headers": [(b"content-type", b"text/plain; charset=utf-8"),
                                    (b"content-length", str(len(said)).encode())]})
            await send({"type": "http.response.body", "body": said.encode()})


def host_of(header: str) -> str | None:
    """The name or address of a `Host` header, in lower case, without its port; None if there is none."""
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
    """In lower case; addresses as they are usually written."""
    host = host.strip().strip("[]").rstrip(".").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host
