"""Limits what a served page keeps of finished requests.

Gradio keeps a copy of the page's layout for each session (0.1 MB; for 10,000 sessions by default), the
messages of every session (without limit), and every uploaded or generated file.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

SESSIONS = 100  # sessions whose layout is kept; sessions of this page have no state to lose
HOURS = 24  # that files are kept


def forget_sessions(queue: Any) -> None:
    """Removes sessions that wait for no message from gradio's queue.

    Args:
        queue: of a `gr.Blocks`; call this in its server's event loop.
    """
    waiting, messages = queue.pending_event_ids_session, queue.pending_messages_per_session
    for session in [session for session, events in waiting.items() if not events or session not in messages]:
        del waiting[session]
        messages.pop(session, None)


def delete_old(folder: Path, hours: float = HOURS) -> None:
    """Deletes files and directories of `folder` that were last modified more than `hours` ago.

    A directory's time is that of the last file added to it.
    """
    before = time.time() - 3600 * hours
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may delete it first
            if path.lstat().st_mtime < before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
