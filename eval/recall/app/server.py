"""Serves the page of one network and its sidecar: `tilelli recall app` (extra: app).

Whoever can reach the address can query the network. The default address is this machine only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from tilelli_jax.cli import interrupts
from tilelli_jax.errors import InputError

from ..predictor import KnowledgePredictor
from . import thought_seeding
from .info import facts
from .page import build, mounted
from .request_queue import RequestQueue


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


def serve(predictor: KnowledgePredictor, listener: socket.socket, *, model: str, sidecar: str,
          study: str | Path, max_new_tokens: int = thought_seeding.MAX_NEW,
          allowed: Sequence[str] = ()) -> int:
    """Serves the page until a signal ends it. Returns the exit status.

    Args:
        model, sidecar: their directories, shown in the page's last tab.
        study: what `find_study` returned.
        allowed: host names that requests may use, besides the page's address and localhost.
    """
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    # Uploads and files of scores are deleted when the page ends.
    with tempfile.TemporaryDirectory(prefix="recall-app-") as directory:
        os.environ["GRADIO_TEMP_DIR"] = directory
        queue = RequestQueue(predictor, max_new_tokens)
        page = build(queue, facts(predictor, model, sidecar), study, Path(directory))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the page's libraries warn about each other
            app = mounted(page, host, port, allowed)
        server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        server.greeting = f"{url} (Ctrl-C ends it)"
        with interrupts.deferred(call=server.leave):
            server.run([listener])
        print()
    return 0


class _Server(uvicorn.Server):
    """Prints its address once it accepts requests."""

    greeting = ""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the handlers that all commands share."""
        yield

    def leave(self, number: int) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.greeting, flush=True)
