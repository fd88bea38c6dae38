"""Serves the page of one network and its sidecar: `tilelli recall app` (extra: app).

Whoever can reach the address can query the network. The default address is this machine only.
"""

from __future__ import annotations

import os
import socket
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from tilelli_jax.cli import interrupts
from tilelli_jax.serving.listening import Http, address_of

from ..predictor import KnowledgePredictor
from . import thought_seeding
from .info import facts
from .page import build, mounted
from .request_queue import RequestQueue


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
    # Uploads and files of scores are deleted when the page ends.
    with (tempfile.TemporaryDirectory(prefix="recall-app-") as directory,
          RequestQueue(predictor, max_new_tokens) as queue):
        os.environ["GRADIO_TEMP_DIR"] = directory
        page = build(queue, facts(predictor, model, sidecar), study, Path(directory))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the page's libraries warn about each other
            app = mounted(page, host, port, allowed)
        greeting = f"{address_of(listener)} (Ctrl-C ends it)"
        server = Http(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2),
                      lambda: print(greeting, flush=True))
        with interrupts.deferred(call=server.leave):
            server.run([listener])
        print()
    return 0
