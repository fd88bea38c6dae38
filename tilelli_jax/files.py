"""Files: read within limits, and written so that a reader sees the old one or the new one, never a part."""

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

from tilelli_jax import interrupts
from tilelli_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_BYTES = 512 << 20  # of a file that is read whole
OTHERS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"),
          (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"))
CHUNK = 1 << 22
SUFFIX = ".tilelli-tmp"  # of files and directories on the way to their names: no user's file ends so


def check_regular(path: Path) -> int:
    """The size in bytes of what is to be read; a pipe or a device might never end.

    Raises:
        InputError: there is nothing, or no regular file.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for is_one, called in OTHERS:
        if is_one(found.st_mode):
            raise InputError(f"{path}: cannot be read: expected a regular file, found {called}")
    return found.st_size


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """A whole file.

    Raises:
        InputError: it is not there, no regular file, larger than `most` bytes, or cannot be read.
    """
    if (size := check_regular(path)) > most:
        raise InputError(f"{path}: cannot be read: expected at most {most:,} bytes, found {size:,}")
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > most:  # such as /proc has, whose size is told as 0
        raise InputError(f"{path}: cannot be read: expected at most {most:,} bytes, found more")
    return content


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """A whole file of UTF-8, without a byte-order mark.

    Raises:
        InputError: as of `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: not UTF-8 at byte {error.start}") from None


def checksums(directory: Path, paths: Iterable[Path], most: int | None = None) -> dict[str, list[int]]:
    """What `damage` compares files of a directory with: path within it → size in bytes, CRC-32.

    Args:
        most: files of more bytes have their size alone.
    """
    return {path.relative_to(directory).as_posix(): _size_and_checksum(path, most) for path in sorted(paths)}


def find_damage(directory: Path, sealed: Any) -> str:
    """The first of the sealed files that is not what was written, as a sentence; "" where all are."""
    if not isinstance(sealed, dict):
        return "the list of its files is none"
    for name, expected in sealed.items():
        try:
            size = check_regular(directory / name)
        except InputError:
            return f"{name} is missing"
        if not isinstance(expected, list) or expected[:1] != [size] or (  # nothing is read of another size
                len(expected) > 1 and _size_and_checksum(directory / name, None) != expected):
            return f"{name} is not what was written"
    return ""


def _size_and_checksum(path: Path, most: int | None) -> list[int]:
    size, checksum = path.stat().st_size, 0
    if most is not None and size > most:
        return [size]
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside the target and renames."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes | Callable[[BinaryIO], None]],
                   obsolete: Iterable[Path] = ()) -> None:
    """Writes all the files beside their targets, and moves them when all of them are whole.

    A content is bytes, or a function that writes them to the file that it is given.

    Each is seen old or new, and a process that is killed leaves none of the last name where it leaves some
    old and some new: see `move_together`. What is behind a symbolic link is written; a device or a pipe is
    written to, not replaced. What a process has left that was killed in writing the same files is removed.
    """
    written: list[tuple[Path, Path]] = []
    held: list[int | None] = []
    try:
        for name, content in contents.items():
            if name.exists() and not name.is_file() and not name.is_dir():
                with name.open("wb") as file:
                    _put(content, file)
                continue
            path = Path(os.path.realpath(name))
            remove_leftovers(path)
            beside, handle = _make_beside(path, directory=False)
            written.append((beside, path))
            held.append(handle)
            with os.fdopen(os.open(beside, os.O_WRONLY), "wb") as file:
                _put(content, file)
            os.chmod(beside, 0o644)
        if written:
            move_together(written, obsolete)
    except BaseException:
        for beside, _ in written:
            beside.unlink(missing_ok=True)
        raise
    finally:
        for lock_of in held:
            if lock_of is not None:
                os.close(lock_of)


def move_together(moves: Sequence[tuple[Path, Path]], obsolete: Iterable[Path] = ()) -> None:
    """Renames files to what they replace. The last one tells a reader that all are there.

    Its old file is taken away first, and its new one comes last: a process that is killed in between leaves
    none of that name.

    Args:
        obsolete: what is not to be there once the last one is.
    """
    *most, (beside, last) = moves
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
            os.replace(beside, last)
    finally:  # by what is there: no count of the renames could be sure
        if aside.exists():
            if all(source.exists() for source, _ in moves) and all(path.exists() for path in obsolete):
                os.replace(aside, last)
            else:
                aside.unlink(missing_ok=True)


def leftovers(directory: Path, names: Iterable[str]) -> list[Path]:
    """What processes that were killed have left in a directory on the way to these names."""
    own = re.compile(rf"\.(?:{'|'.join(map(re.escape, names))})\.[a-z0-9_]{{8}}{re.escape(SUFFIX)}")
    return [path for path in directory.iterdir() if own.fullmatch(path.name) and not path.is_symlink()]


def remove_leftovers(path: Path) -> None:
    """Removes what processes that were killed have left beside a path on their way to it."""
    try:
        found = leftovers(path.parent, [path.name])
    except PermissionError:  # a directory that may be written to and not listed
        return
    for left in found:
        try:
            handle = lock(left, wait=False)
        except OSError:  # somebody is at work there, or it is gone
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
    """A directory to fill, which becomes `out` when all went well and is gone otherwise.

    Raises:
        InputError: `out` is there and not empty, or cannot be made.
    """
    made: Path | None = None
    handle: int | None = None
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out}: already exists; choose another OUT")
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        made, handle = _make_beside(out, directory=True)
        yield made
        os.chmod(made, 0o755)
        if out.is_dir():
            out.rmdir()
        os.replace(made, out)
    except InputError as error:
        raise InputError(str(error).replace(str(made or out), str(out))) from None
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        if made is not None and made.exists():
            shutil.rmtree(made, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _make_beside(path: Path, *, directory: bool) -> tuple[Path, int | None]:
    """A new file or directory beside a path, and the handle that keeps `remove_left` of others from it."""
    while True:
        if directory:
            beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX))
        else:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX)
            os.close(handle)
            beside = Path(name)
        # Until it is locked, another process may take it for a leftover and remove it: then once more.
        locked = None
        with contextlib.suppress(FileNotFoundError):
            locked = lock(beside, wait=True)
            if locked is None or os.path.samestat(os.fstat(locked), beside.stat()):
                return beside, locked
        if locked is not None:
            os.close(locked)


def _put(content: bytes | Callable[[BinaryIO], None], file: BinaryIO) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content)


def lock(path: Path, *, wait: bool) -> int | None:
    """Keeps other processes that ask for it from a directory or file, until the handle is closed or they end.

    Returns:
        The handle, for `os.close`; None where the system has no such locks.

    Raises:
        BlockingIOError: another process has it, and `wait` is false.
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
    """Indented JSON, atomically."""
    write_atomically(path, as_json(tree))


def as_json(tree: Any) -> bytes:
    """Indented JSON, UTF-8."""
    return json.dumps(tree, indent=2, ensure_ascii=False).encode() + b"\n"


def fingerprint(paths: Iterable[Path]) -> str:
    """Of the contents of files, in the order of their names; where they are does not count.

    Raises:
        InputError: one is no regular file.
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        check_regular(path)
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
