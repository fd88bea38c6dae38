"""Writing files so that a reader sees the old one or the new one, never a part; and telling them apart."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside the target and renames."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes | Callable[[BinaryIO], None]]) -> None:
    """Writes all the files beside their targets, and renames when all of them are whole.

    A content is bytes, or a function that writes them to the file that it is given.

    Each is seen old or new. A machine that fails between two renames leaves some of both. What is
    behind a symbolic link is written; a device or a pipe is written to, not replaced.
    """
    written: list[tuple[Path, Path]] = []
    try:
        for name, content in contents.items():
            if name.exists() and not name.is_file() and not name.is_dir():
                with name.open("wb") as file:
                    _put(content, file)
                continue
            path = Path(os.path.realpath(name))
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            written.append((Path(temporary), path))
            with os.fdopen(handle, "wb") as file:
                _put(content, file)
            os.chmod(temporary, 0o644)
        for beside, path in written:
            os.replace(beside, path)
    except BaseException:
        for beside, _ in written:
            beside.unlink(missing_ok=True)
        raise


def unfinished(directory: Path, names: Iterable[str]) -> list[Path] | None:
    """What a process that was killed in `write_together` left of files of these names.

    None where the directory holds anything else: it is somebody's.
    """
    own = re.compile(rf"\.(?:{'|'.join(map(re.escape, names))})\.[a-z0-9_]{{8}}")
    found = list(directory.iterdir())
    return found if all(own.fullmatch(path.name) and path.is_file() for path in found) else None


def _put(content: bytes | Callable[[BinaryIO], None], file: BinaryIO) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content)


def lock(directory: Path, *, wait: bool) -> int | None:
    """Keeps other processes that ask for it out of a directory, until the handle is closed or they end.

    Returns:
        The handle, for `os.close`; None where the system has no such locks.

    Raises:
        BlockingIOError: another process has it, and `wait` is false.
    """
    if fcntl is None:
        return None
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # some network file systems
        os.close(handle)
        return None
    return handle


def write_json(path: Path, tree: Any) -> None:
    """Indented JSON, atomically."""
    write_atomically(path, as_json(tree))


def as_json(tree: Any) -> bytes:
    """Indented JSON, UTF-8."""
    return json.dumps(tree, indent=2, ensure_ascii=False).encode() + b"\n"


def fingerprint(paths: Iterable[Path]) -> str:
    """Of the contents of files, in the order of their names; where they are does not count."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
