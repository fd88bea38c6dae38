"""Files of a directory that are made together: all of one making, or a reader sees that they are not.

They are written beside their places and moved when all are whole, the last one last: that it is there says
that all are.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tilelli_jax import files
from tilelli_jax.errors import InputError


@contextlib.contextmanager
def replace_files(directory: Path, names: Sequence[str], *, force: bool) -> Iterator[dict[str, Path]]:
    """Several files of a directory: gives paths to write them to, and moves them to their places at the end.

    If the process is killed, the directory has the older files, the newer ones, or none of the last name.
    Running it again then succeeds, and removes what was left. If the block raises, all is as it was before.

    Args:
        force: replace files that exist. What a process has left that was killed while it moved them is
            always replaced.

    Raises:
        InputError: a file exists and `force` is false, another process is making them, or they cannot be
            written.
    """
    try:
        with _claimed(directory):
            _settle(directory, names, force)
            token = secrets.token_hex(4)
            beside = {name: directory / f".{name}.{token}{files.SUFFIX}" for name in names}
            try:
                yield beside
                for path in beside.values():
                    _to_disk(path)
            except BaseException:
                for path in beside.values():
                    path.unlink(missing_ok=True)
                raise
            files.move_together([(path, directory / name) for name, path in beside.items()])
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror or error}") from error


def left_behind(directory: Path, names: Sequence[str]) -> list[Path]:
    """What a killed process has left in a directory of files of these names."""
    return [*files.leftovers(directory, names),
            # As earlier versions left them.
            *(path for path in directory.glob(".partial-*") if path.is_dir()
              and {one.name for one in path.iterdir()} <= set(names))]


# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Keeps other processes out; the directory is made if need be, and removed again if the block fails."""
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


def _settle(directory: Path, names: Sequence[str], force: bool) -> None:
    """Removes what a killed process has left, and refuses to go on where files are whole."""
    left = left_behind(directory, names)
    there = [directory / name for name in names if (directory / name).exists()]
    interrupted = directory / names[-1] not in there and any(  # while it moved them
        path.name.startswith(f".{names[-1]}.") for path in left)
    if there and not (force or interrupted):
        raise InputError(f"{there[0]}: already exists; --force replaces it")
    if folder := next((path for path in there if path.is_dir()), None):
        raise InputError(f"{folder}: is a directory, expected a file")
    for path in [*(there if interrupted else ()), *left]:  # what states the interruption goes last
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _to_disk(path: Path) -> None:
    """A machine that fails later has the content where it has the name."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
