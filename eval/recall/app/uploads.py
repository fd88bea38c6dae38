"""Restricts the files that a request to the page may name to those uploaded to this process (extra: app)."""

from __future__ import annotations

import html
import logging
import os
from pathlib import Path
from typing import Any

import gradio as gr

from tilelli_jax.errors import InputError

from .retention import HOURS, SESSIONS, delete_old, forget_sessions

log = logging.getLogger(__name__)


class Page(gr.Blocks):
    """A page whose endpoints all reject files that were not uploaded to it, and that keeps few sessions.

    Gradio copies every file that a request names, for any component, to a directory from which it can be
    downloaded. Gradio's own check is disabled in a mounted page, and accepts links and URLs.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state_session_capacity = SESSIONS

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **more: Any) -> Any:
        """Checks the data of every request; gradio calls this before it opens the files in them."""
        forget_sessions(self._queue)
        try:
            check(inputs, uploads())
            if len(inputs) < len(block_fn.inputs):
                raise InputError(f"data: expected {len(block_fn.inputs)} values, found {len(inputs)}")
            return await super().preprocess_data(block_fn, inputs, *rest, **more)
        except Exception as error:  # data of a type that the components do not accept
            message = str(error) if isinstance(error, InputError) else f"data: {one_line(error)}"
            log.warning("%s: %s", block_fn.api_name, message)
            # The message is shown as HTML and may quote the request.
            raise gr.Error(html.escape(message, quote=False), print_exception=False) from None

    def delete_old_files(self) -> None:
        """Deletes uploads and generated files older than `retention.HOURS`, and gradio's record of them.

        Gradio's own `delete_cache` leaves the directories and the empty file that it creates for each upload.
        """
        delete_old(uploads())
        for names in self.temp_file_sets:
            for name in list(names):  # a copy, because the server's thread adds to the set
                if not os.path.exists(name):
                    names.discard(name)


def one_line(error: Exception) -> str:
    """Formats another library's error as one line of at most 300 characters."""
    text = f"{type(error).__name__}: {error}"
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:300]


def uploads() -> Path:
    """Returns the directory of gradio's uploads."""
    return Path(os.environ["GRADIO_TEMP_DIR"])


def check(data: Any, uploads: Path) -> None:
    """Raises InputError if `data`, a JSON tree, names a file that is not a regular file in `uploads`.

    A file is a mapping with a `path`. Paths are resolved, so links out of `uploads` are rejected.
    """
    pending = [data]
    while pending:  # not recursive, because the client chooses the depth of the tree
        node = pending.pop()
        if isinstance(node, dict):
            if "path" in node and not _is_uploaded(node["path"], uploads):
                raise InputError("file: expected one that was uploaded to this page in the last "
                                 f"{HOURS} hours, found another")
            pending.extend(node.values())
        elif isinstance(node, list | tuple):
            pending.extend(node)


def _is_uploaded(name: Any, uploads: Path) -> bool:
    if not isinstance(name, str):
        return name is None
    try:
        path, directory = Path(name), uploads.resolve(strict=True)
        resolved = path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # no such file, an invalid name, a cycle of links
        return False
    return resolved.is_relative_to(directory) and resolved.is_file() and not path.is_symlink()
