"""Which files a client of the page may name: those uploaded to this process, and no others (extra: app)."""

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
    """A page whose every endpoint refuses files that were not uploaded to it, and that keeps little.

    Gradio copies each file that the data of a request name, whatever the component, to where it can be
    downloaded. Its own check is off in a page that is mounted, and lets links and addresses pass.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state_session_capacity = SESSIONS

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **more: Any) -> Any:
        """What gradio calls with the data of every request, before it looks at the files in them."""
        forget_sessions(self._queue)
        try:
            check(inputs, uploads())
            if len(inputs) < len(block_fn.inputs):
                raise InputError(f"data: expected {len(block_fn.inputs)} values, found {len(inputs)}")
            return await super().preprocess_data(block_fn, inputs, *rest, **more)
        except Exception as error:  # data of another kind than the components take
            said = str(error) if isinstance(error, InputError) else f"data: {one_line(error)}"
            log.warning("%s: %s", block_fn.api_name, said)
            # Shown as HTML, and it may quote what was sent.
            raise gr.Error(html.escape(said, quote=False), print_exception=False) from None

    def delete_old_files(self) -> None:
        """Deletes what was uploaded or made more than `retention.HOURS` ago, and gradio's record of it.

        Gradio's own `delete_cache` leaves the directories, and the empty file that it makes of each upload.
        """
        delete_old(uploads())
        for names in self.temp_file_sets:
            for name in list(names):  # a copy: the server's thread adds to it
                if not os.path.exists(name):
                    names.discard(name)


def one_line(error: Exception) -> str:
    """What an error of another library says, in one line of at most 300 letters."""
    said = f"{type(error).__name__}: {error}"
    return " ".join("".join(letter if letter.isprintable() else " " for letter in said).split())[:300]


def uploads() -> Path:
    """Where gradio puts what is uploaded."""
    return Path(os.environ["GRADIO_TEMP_DIR"])


def check(data: Any, uploads: Path) -> None:
    """Raises InputError where `data`, a tree of JSON, names a file that is not a regular one in `uploads`.

    A file is a mapping with a `path`. What lies in `uploads` is meant by its resolved path: links are not
    followed out of it.
    """
    left = [data]
    while left:  # not by recursion: a client says how deep the tree is
        one = left.pop()
        if isinstance(one, dict):
            if "path" in one and not _uploaded(one["path"], uploads):
                raise InputError("file: expected one that was uploaded to this page in the last "
                                 f"{HOURS} hours, found another")
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)


def _uploaded(path: Any, uploads: Path) -> bool:
    if not isinstance(path, str):
        return path is None
    try:
        found, room = Path(path), uploads.resolve(strict=True)
        real = found.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # no such file, a name that is none, links in a circle
        return False
    return real.is_relative_to(room) and real.is_file() and not found.is_symlink()
