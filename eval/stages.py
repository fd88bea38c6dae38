"""Cache of a study's stages on disk: each stage has a directory named by a hash of its inputs.

    ROOT/extract-3f09c2a41b7d/manifest.json     inputs and checksums; written last, when the stage is complete

A stage with the same inputs is reused. Other weights, data or options give another key and thus another
directory, and older results remain. An interrupted stage finds its partial files when it runs again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tilelli_jax.cli import interrupts
from tilelli_jax.errors import InputError
from tilelli_jax.io.files import as_json, checksums, find_damage, lock, write_atomically
from tilelli_jax.io.json_text import read_json

from . import tables

T = TypeVar("T")
FORMAT = 4  # increment whenever a stage's result for the same inputs changes
MANIFEST = "manifest.json"
MAX_CHECKSUM_BYTES = 64 << 20  # larger files are checked by their size only
RESULT = "result.json"  # numbers that a stage computed
REBUILD_HINT = "delete that directory, and the same command runs the stage again"
RESULTS = "results.json"  # all numbers of a study, next to its report


class BusyError(Exception):
    """Another process is running this stage."""


class Stages:
    """The stages of one study.

    Args:
        root: directory that contains the stages' directories.
        notify: called with a line for every stage that runs or is reused.
    """

    def __init__(self, root: Path, notify: Callable[[str], None] = lambda line: None) -> None:
        self.root, self.notify = root, notify
        self._verified: set[Path] = set()  # directories whose files this object has checked

    def open(self) -> None:
        """Creates the root, before any work is done. Raises InputError if it cannot be written."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out: {self.root.parent}: cannot be written: {error.strerror}") from None

    def directory(self, name: str, manifest: Mapping[str, Any]) -> Path:
        """Returns the directory of a stage with these inputs, whether or not it exists."""
        return self.root / f"{name}-{key(manifest)}"

    def is_complete(self, name: str, manifest: Mapping[str, Any]) -> bool:
        """Returns whether the stage is complete."""
        return (self.directory(name, manifest) / MANIFEST).is_file()

    def make(self, name: str, manifest: Mapping[str, Any], work: Callable[[Path], None]) -> Path:
        """Returns the directory of a stage; runs `work` first unless the stage is complete.

        Args:
            manifest: everything that the result depends on, as JSON.
            work: fills the directory; it may find partial files of an interrupted run there.

        Raises:
            BusyError: another process is running this stage.
            InputError: a file of the complete stage has changed, or the directory's path is occupied by
                something else.
        """
        interrupts.raise_if_received()
        path = self.directory(name, manifest)
        if self.is_complete(name, manifest):
            self._check(path)
            self.notify(f"{name}: reused as it is from {path}")
            return path
        manifest_file = path / MANIFEST
        # Another process may have completed the stage since the check above.
        if os.path.lexists(manifest_file) and not manifest_file.is_file():
            raise InputError(f"{manifest_file}: expected a regular file; {REBUILD_HINT}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
        try:
            handle = lock(path, wait=False)
        except BlockingIOError:
            raise BusyError(f"{path}: another process is running this stage") from None
        try:
            self.notify(f"{name}: {path}")
            if not self.is_complete(name, manifest):  # another process may just have completed it
                work(path)
                # Hidden files are temporary files of killed processes.
                files = (file for file in path.rglob("*") if file.is_file() and not any(
                    part.startswith(".") for part in file.relative_to(path).parts))
                write_atomically(path / MANIFEST, as_json(
                    {**manifest, "files": checksums(path, files, MAX_CHECKSUM_BYTES)}))
        finally:
            if handle is not None:
                os.close(handle)
        return path

    def _check(self, path: Path) -> None:
        if path not in self._verified:
            try:
                recorded = read_json(path / MANIFEST).get("files")
            except InputError as error:
                raise InputError(f"{error}; {REBUILD_HINT}") from None
            if damaged := find_damage(path, recorded):
                raise InputError(f"{path}: {damaged}; {REBUILD_HINT}")
            self._verified.add(path)


def stage_manifest(stage: str, **parts: Any) -> dict[str, Any]:
    """Returns a stage's manifest: its name, the format version and its inputs."""
    return {"stage": stage, "format": FORMAT, **parts}


def without(tree: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Returns a configuration section without some keys, such as those that do not affect the result."""
    return {name: value for name, value in tree.items() if name not in names}


def write_result(path: Path, tree: Any) -> None:
    """Writes a stage's numbers as JSON, non-finite ones as null."""
    write_atomically(path / RESULT, tables.json_with_nulls(tree))


def read_result(path: Path) -> dict[str, Any]:
    """Reads a stage's numbers, written by `write_result`. Raises InputError if the file is damaged."""
    return read_json(path / RESULT)


def key(manifest: Mapping[str, Any]) -> str:
    """Returns the hash of a JSON tree: twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:12]


def cached_method(method: Callable[..., T]) -> Callable[..., T]:
    """Decorates a method: its result is cached per object and arguments, like a cached property."""
    @functools.wraps(method)
    def cached(self: Any, *arguments: Any) -> T:
        cache = self.__dict__.setdefault("_cached_calls", {})
        if (call := (method.__name__, *arguments)) not in cache:
            cache[call] = method(self, *arguments)
        return cache[call]
    return cached


def print_to_stderr(line: str) -> None:
    """Prints a progress line to stderr; commands pass it to `Stages` as `notify`."""
    print(line, file=sys.stderr, flush=True)
