"""What a served page keeps of requests that are over: little, and not for long.

Gradio keeps a copy of the page's layout for each session (0.1 MB; of 10,000 sessions by default), which
messages each session waits for (of all sessions, for ever), and every file that was uploaded or made.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

SESSIONS = 100  # whose layout is kept; no session of this page has a state that could be lost
HOURS = 24  # that files are kept


def forget_sessions(queue: Any) -> None:
    """Drops from gradio's queue the sessions that wait for no message.

    Args:
        queue: that of a `gr.Blocks`; to be called in its server's event loop.
    """
    waiting, messages = queue.pending_event_ids_session, queue.pending_messages_per_session
    for session in [session for session, events in waiting.items() if not events or session not in messages]:
        del waiting[session]
        messages.pop(session, None)


def delete_old(folder: Path, hours: float = HOURS) -> None:
    """Deletes the files and directories of `folder` in which nothing has changed for so many hours.

    A directory is as old as the last file that was put into it.
    """
    before = time.time() - 3600 * hours
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # who else deletes it, is welcome
            if path.lstat().st_mtime < before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
