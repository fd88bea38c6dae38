"""Binds the server's address, runs it, and ends it on a signal."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn

from tilelli_jax.cli import interrupts
from tilelli_jax.errors import InputError

from .app import BODY_SECONDS, Server
from .hosts import TrustedHosts

PROGRESS_SECONDS = 10  # between two lines of progress


def open_socket(host: str, port: int) -> socket.socket:
    """Returns a socket bound to the address; port 0 chooses a free one.

    Raises:
        InputError: the address does not exist or is in use.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port: expected a number from 0 to {2**16 - 1}, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host, --port: {host}:{port}: cannot bind to this address: {reason}") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a bound socket, with a slash at its end."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve(server: Server, listener: socket.socket, *, allowed: Sequence[str] | None) -> int:
    """Serves until a signal ends it, finishes the running requests, and returns the exit status.

    Args:
        allowed: host names that requests may use besides the address and localhost; None: all.
    """
    url = address_of(listener)
    app: Any = server.app()
    if allowed is not None:
        app = TrustedHosts(app, allowed)

    shown = time.monotonic()

    def compiled(done: int, total: int) -> None:
        nonlocal shown
        if done == total:
            server.warm_up()
        with contextlib.suppress(OSError):  # nobody reads the output any more
            if done == total:
                print(f"ready: {url}v1 (Ctrl-C ends it)", flush=True)
            elif time.monotonic() - shown > PROGRESS_SECONDS:
                print(f"compiling: {done} of {total} programs", flush=True)
                shown = time.monotonic()
        server.progress = done, total
    print(f"{url}: compiling; {url}health says when it is ready", flush=True)
    limit = math.ceil(server.settings.timeout) + BODY_SECONDS
    http = Http(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off",
                               timeout_graceful_shutdown=limit))
    server.engine.ended = lambda: http.leave(0)  # also of an error
    with interrupts.deferred("finishing the running requests", call=http.leave):
        server.engine.start(compiled)
        http.run([listener])
        server.engine.stop(drain=True)
    return 1 if server.engine.failed else 0


class Http(uvicorn.Server):
    """A server that leaves signals to the handlers that all commands share.

    Args:
        started_up: called once it accepts requests.
    """

    def __init__(self, config: uvicorn.Config, started_up: Callable[[], object] = lambda: None) -> None:
        super().__init__(config)
        self._started_up = started_up

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def leave(self, number: int) -> None:
        """Ends the server after the running requests."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started_up()
