"""The page of one network and its sidecar, served: tilelli recall app (extra: app).

Whoever can reach it can ask the network; by default that is this machine alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from tilelli_jax import interrupts
from tilelli_jax.errors import InputError

from . import thought_seeding
from .info import facts
from .page import build, mounted
from .predictor import KnowledgePredictor
from .request_queue import RequestQueue

HOST, PORT = "127.0.0.1", 7860
ARENAS = 2


def share_arenas() -> None:
    """Lets all threads of this process take memory from the same few arenas, where glibc can be told so.

    By default each of the first threads has an arena to itself, and what is free in one serves no other:
    after 10,000 questions the page held 130 MiB more that way. A thread that has an arena keeps it.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has no such function
            ctypes.CDLL(None).mallopt(-8, ARENAS)  # M_ARENA_MAX


share_arenas()  # JAX starts its threads with the first array, before the page is served


def open_door(host: str, port: int) -> socket.socket:
    """Where the page will be heard; port 0 is any that is free.

    Raises:
        InputError: there is no such place, or it is taken.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port: expected a number from 0 to {2**16 - 1}, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        door = socket.socket(family, kind, protocol)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(address)
        except OSError:
            door.close()
            raise
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise InputError(f"--host, --port: {host}:{port}: cannot be listened at: {told}") from None
    return door


def serve(predictor: KnowledgePredictor, door: socket.socket, *, model: str, sidecar: str, study: str | Path,
          max_new_tokens: int = thought_seeding.MAX_NEW, allowed: Sequence[str] = ()) -> int:
    """Until it is interrupted.

    Args:
        model, sidecar: where they are, to be told of.
        study: of `find_study`.
        allowed: names under which the page may be asked for, besides its address and localhost.
    """
    host, port = door.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    # What is uploaded and made goes with the page.
    with tempfile.TemporaryDirectory(prefix="recall-app-") as room:
        os.environ["GRADIO_TEMP_DIR"] = room
        queue = RequestQueue(predictor, max_new_tokens)
        page = build(queue, facts(predictor, model, sidecar), study, Path(room))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the page's own libraries think of each other
            app = mounted(page, host, port, allowed)
        server = _Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        server.says = f"{url} (Ctrl-C ends it)"
        with interrupts.deferred(call=server.leave):
            server.run([door])
        print()
    return 0


class _Server(uvicorn.Server):
    """Says where it is when it can be asked, and not before."""

    says = ""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Not here: all commands have the same handlers."""
        yield

    def leave(self, number: int) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.says, flush=True)
