"""Sets of files in one directory that are replaced together, so that a reader never mixes two versions.

The files are written under temporary names and renamed when all are complete. The last name is renamed last:
if it exists, all files are complete.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tilelli_jax.errors import InputError
from tilelli_jax.io import files


@contextlib.contextmanager
def replace_files(directory: Path, names: Sequence[str], *, force: bool) -> Iterator[dict[str, Path]]:
    """Yields temporary paths to write several files of a directory to, and renames them at the end.

    If the process is killed, the directory has the old files, the new ones, or no file of the last name; then
    running again succeeds and removes the leftovers. If the block raises, the directory is unchanged.

    Args:
        force: replace existing files. Files left by a process killed while renaming are always replaced.

    Raises:
        InputError: a file exists and `force` is false, another process is writing them, or they cannot be
            written.
    """
    try:
        with _locked(directory):
            _remove_leftovers(directory, names, force)
            token = secrets.token_hex(4)
            temporary = {name: directory / f".{name}.{token}{files.SUFFIX}" for name in names}
            try:
                yield temporary
                for path in temporary.values():
                    _to_disk(path)
            except BaseException:
                for path in temporary.values():
                    path.unlink(missing_ok=True)
                raise
            files.move_together([(path, directory / name) for name, path in temporary.items()])
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror or error}") from error


def left_behind(directory: Path, names: Sequence[str]) -> list[Path]:
    """Returns what killed processes left in a directory of files with these names."""
    return [*files.leftovers(directory, names),
            # Leftovers of earlier versions.
            *(path for path in directory.glob(".partial-*") if path.is_dir()
              and {file.name for file in path.iterdir()} <= set(names))]


# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Locks the directory; creates it if needed, and removes it again if the block raises."""
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        handle = files.lock(directory, wait=False)
    except BlockingIOError:
        raise InputError(f"{directory}: is in use by another process") from None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            for path in new:
                path.rmdir()
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _remove_leftovers(directory: Path, names: Sequence[str], force: bool) -> None:
    """Removes what killed processes left. Raises InputError if complete files exist and `force` is false."""
    left = left_behind(directory, names)
    existing = [directory / name for name in names if (directory / name).exists()]
    interrupted = directory / names[-1] not in existing and any(  # killed while renaming
        path.name.startswith(f".{names[-1]}.") for path in left)
    if existing and not (force or interrupted):
        raise InputError(f"{existing[0]}: already exists; --force replaces it")
    if folder := next((path for path in existing if path.is_dir()), None):
        raise InputError(f"{folder}: expected a file, found a directory")
    for path in [*(existing if interrupted else ()), *left]:  # the file that marks the interruption goes last
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _to_disk(path: Path) -> None:
    """Flushes a file to disk, so that its content is there if the machine fails after the rename."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
