"""Reads files within size limits, and writes them atomically: a reader sees the old or the new content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tilelli_jax.cli import interrupts
from tilelli_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_BYTES = 512 << 20  # size limit of a file that is read into memory
OTHER_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"),
               (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"))
CHUNK = 1 << 22  # bytes read at a time
SUFFIX = ".tilelli-tmp"  # suffix of temporary files and directories; no user's file has it


def check_regular(path: Path) -> int:
    """Returns a regular file's size in bytes; other kinds, such as a pipe or a device, might never end.

    Raises:
        InputError: the file is missing or not a regular file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for is_kind, kind in OTHER_KINDS:
        if is_kind(status.st_mode):
            raise InputError(f"{path}: cannot be read: expected a regular file, found {kind}")
    return status.st_size


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the content of a file.

    Raises:
        InputError: the file is missing, not regular, larger than `max_bytes` bytes, or unreadable.
    """
    if (size := check_regular(path)) > max_bytes:
        raise InputError(f"{path}: cannot be read: expected at most {max_bytes:,} bytes, found {size:,}")
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > max_bytes:  # as for files of /proc, which report a size of 0
        raise InputError(f"{path}: cannot be read: expected at most {max_bytes:,} bytes, found more")
    return content


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Returns the content of a UTF-8 file, without a byte-order mark.

    Raises:
        InputError: see `read_bytes`; or the file is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: not UTF-8 at byte {error.start}") from None


def checksums(directory: Path, paths: Iterable[Path], max_bytes: int | None = None) -> dict[str, list[int]]:
    """Returns the checksums that `find_damage` compares with: relative path → [size in bytes, CRC-32].

    Args:
        max_bytes: larger files, in bytes, get their size only; None: no limit.
    """
    return {path.relative_to(directory).as_posix(): _size_and_checksum(path, max_bytes)
            for path in sorted(paths)}


def find_damage(directory: Path, expected_files: Any) -> str:
    """Describes the first file that differs from its checksum; returns "" if all match."""
    if not isinstance(expected_files, dict):
        return "its list of files is invalid"
    for name, expected in expected_files.items():
        try:
            size = check_regular(directory / name)
        except InputError:
            return f"{name} is missing"
        if not isinstance(expected, list) or expected[:1] != [size] or (  # a wrong size needs no reading
                len(expected) > 1 and _size_and_checksum(directory / name, None) != expected):
            return f"{name} was changed after it was written"
    return ""


def _size_and_checksum(path: Path, max_bytes: int | None) -> list[int]:
    size, checksum = path.stat().st_size, 0
    if max_bytes is not None and size > max_bytes:
        return [size]
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a temporary file next to the target and renames it."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes | Callable[[BinaryIO], None]],
                   obsolete: Iterable[Path] = ()) -> None:
    """Writes all files under temporary names next to their targets, and renames them when all are complete.

    A content is bytes, or a function that writes to the file it is given.

    A reader sees each file old or new. A process killed between the renames leaves no file of the last name:
    see `move_together`. Symbolic links are followed; a device or a pipe is written to, not replaced.
    Leftovers of killed processes that wrote the same files are removed.
    """
    written: list[tuple[Path, Path]] = []
    handles: list[int | None] = []
    try:
        for name, content in contents.items():
            if name.exists() and not name.is_file() and not name.is_dir():
                with name.open("wb") as file:
                    _put(content, file)
                continue
            path = Path(os.path.realpath(name))
            remove_leftovers(path)
            temporary, handle = _make_temporary(path, directory=False)
            written.append((temporary, path))
            handles.append(handle)
            with os.fdopen(os.open(temporary, os.O_WRONLY), "wb") as file:
                _put(content, file)
            os.chmod(temporary, 0o644)
        if written:
            move_together(written, obsolete)
    except BaseException:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
        raise
    finally:
        for handle in handles:
            if handle is not None:
                os.close(handle)


def move_together(moves: Sequence[tuple[Path, Path]], obsolete: Iterable[Path] = ()) -> None:
    """Renames files to their targets. To a reader, the last target's existence means that all are in place.

    The last target's old file is removed first and its new file comes last: a process killed in between
    leaves no file of that name.

    Args:
        obsolete: files to delete before the last one is in place.
    """
    *most, (last_source, last) = moves
    obsolete = [path for path in obsolete if path.exists()]
    aside = last.with_name(f".{last.name}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        with interrupts.blocked():
            if (most or obsolete) and last.is_file():
                os.replace(last, aside)
            for source, target in most:
                os.replace(source, target)
            for path in obsolete:
                path.unlink()
            os.replace(last_source, last)
    finally:  # decide by which files exist: a count of the renames could be wrong
        if aside.exists():
            if all(source.exists() for source, _ in moves) and all(path.exists() for path in obsolete):
                os.replace(aside, last)
            else:
                aside.unlink(missing_ok=True)


def leftovers(directory: Path, names: Iterable[str]) -> list[Path]:
    """Returns temporary files of these names that killed processes left in a directory."""
    pattern = re.compile(rf"\.(?:{'|'.join(map(re.escape, names))})\.[a-z0-9_]{{8}}{re.escape(SUFFIX)}")
    return [path for path in directory.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink()]


def remove_leftovers(path: Path) -> None:
    """Removes the temporary files that killed processes left next to a path."""
    try:
        leftover_paths = leftovers(path.parent, [path.name])
    except PermissionError:  # a directory that is writable but not listable
        return
    for left in leftover_paths:
        try:
            handle = lock(left, wait=False)
        except OSError:  # another process is using it, or it is gone
            continue
        if handle is None:
            continue
        try:
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        finally:
            os.close(handle)


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yields a temporary directory that is renamed to `out` on success and deleted on failure.

    Raises:
        InputError: `out` exists and is not empty, or cannot be created.
    """
    temporary: Path | None = None
    handle: int | None = None
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: already exists; choose another OUT")
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        temporary, handle = _make_temporary(out, directory=True)
        yield temporary
        os.chmod(temporary, 0o755)
        if out.is_dir():
            out.rmdir()
        os.replace(temporary, out)
    except InputError as error:
        raise InputError(str(error).replace(str(temporary or out), str(out))) from None
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _make_temporary(path: Path, *, directory: bool) -> tuple[Path, int | None]:
    """Creates a temporary file or directory next to a path, locked so that `remove_leftovers` skips it."""
    while True:
        if directory:
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX))
        else:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX)
            os.close(handle)
            temporary = Path(name)
        # Until it is locked, another process may remove it as a leftover: then try again.
        locked = None
        with contextlib.suppress(FileNotFoundError):
            locked = lock(temporary, wait=True)
            if locked is None or os.path.samestat(os.fstat(locked), temporary.stat()):
                return temporary, locked
        if locked is not None:
            os.close(locked)


def _put(content: bytes | Callable[[BinaryIO], None], file: BinaryIO) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content)


def lock(path: Path, *, wait: bool) -> int | None:
    """Locks a directory or file against other callers until the handle is closed or the process ends.

    Returns:
        The handle, for `os.close`; None if the system has no such locks.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY)
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
    """Writes indented JSON atomically."""
    write_atomically(path, as_json(tree))


def as_json(tree: Any) -> bytes:
    """Returns indented JSON as UTF-8."""
    return json.dumps(tree, indent=2, ensure_ascii=False).encode() + b"\n"


def check_output(option: str, path: Path | None) -> None:
    """Checks that a file can be written, before a long computation instead of after it.

    Args:
        option: option that names the file, for errors.
        path: the file; None: nothing to check.

    Raises:
        InputError: the path is a directory, or its directory is missing or cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{option}: {path}: expected a file, found a directory")
    with writing_to(option, path):
        tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def writing_to(option: str, path: Path) -> Iterator[None]:
    """Raises an InputError that names the option and the file if they cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be written: {error.strerror}") from None


def fingerprint(paths: Iterable[Path]) -> str:
    """Returns a hash of the names and contents of files, independent of their directories.

    Raises:
        InputError: a path is not a regular file.
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        check_regular(path)
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
